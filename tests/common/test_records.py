import io
import json
import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.records import (
    MessageError,
    arrays_digest,
    arrays_from_record,
    arrays_to_record,
    values_from_record,
    values_to_record,
)

SECRET = "Zq7731"
EXPECTED: dict[str, tuple[int, ...]] = {"w": (2, 3), "b": (2,), "empty": (0,)}
SHAPE = (3, 2)


def arrays(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in EXPECTED.items()}


def npy(values: np.ndarray, *, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=allow_pickle)
    return buffer.getvalue()


def with_array(name: str, array: Array) -> ArrayRecord:
    good = {key: Array(value.numpy()) for key, value in arrays().items()}
    return ArrayRecord(array_dict={**good, name: array})


def declared(data: bytes, shape: tuple[int, ...] = (2,), dtype: str = "float32", stype: str = "numpy.ndarray") -> Array:
    return Array(dtype=dtype, shape=shape, stype=stype, data=data)


def refused(read: Callable[[], Any]) -> str:
    with pytest.raises(MessageError) as caught:
        read()
    text = str(caught.value)
    assert text and SECRET not in text
    return text


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 3.4028235e38, -1e-38])
def test_float32_extremes_survive(value: float) -> None:
    sent = {**arrays(), "b": torch.tensor([value, 1.0])}
    back = arrays_from_record(arrays_to_record(sent), EXPECTED)
    assert back["b"].numpy().tobytes() == sent["b"].numpy().tobytes()
    back["b"] += 1  # what arrives is writable and its own


def test_arrays_that_are_not_contiguous_are_sent_in_order() -> None:
    sent = {**arrays(), "w": torch.arange(6.0).reshape(3, 2).T}
    assert torch.equal(arrays_from_record(arrays_to_record(sent), EXPECTED)["w"], sent["w"])


@pytest.mark.parametrize(
    "record",
    [
        values_to_record("rows", np.zeros((3, 3))),
        values_to_record("rows", np.zeros((2, 2))),
        values_to_record("rows", np.zeros(6)),
        values_to_record("table", np.zeros(SHAPE)),
        values_to_record("rows", np.array([[0.0, np.inf]] * 3)),
        ArrayRecord(array_dict={"rows": Array(np.zeros(SHAPE, np.float32))}),
        ArrayRecord(array_dict={"rows": Array(np.zeros(SHAPE)), "more": Array(np.zeros(SHAPE))}),
        ArrayRecord(array_dict={"rows": declared(b"", SHAPE, "float64")}),
        ArrayRecord(array_dict={"rows": declared(npy(np.zeros((3, 2), object), allow_pickle=True), SHAPE, "float64")}),
        ArrayRecord(array_dict={"rows": declared(npy(np.zeros((300, 200))), SHAPE, "float64")}),
    ],
)
def test_rows_of_another_form_are_refused(record: ArrayRecord) -> None:
    refused(lambda: values_from_record(record, "rows", SHAPE))


def good_arrays() -> dict[str, Array]:
    return {key: Array(value.numpy()) for key, value in arrays().items()}


@pytest.mark.parametrize("names", [{SECRET: "w"}, {"W": "w"}, {"w": "b", "b": "w"}])
def test_wrong_names(names: dict[str, str]) -> None:
    renamed = {new: good_arrays()[old] for new, old in names.items()}
    kept = {key: value for key, value in good_arrays().items() if key not in names.values()}
    refused(lambda: arrays_from_record(ArrayRecord(array_dict={**kept, **renamed}), EXPECTED))


def test_missing_and_extra_names() -> None:
    for name in EXPECTED:
        fewer = {key: value for key, value in good_arrays().items() if key != name}
        refused(lambda fewer=fewer: arrays_from_record(ArrayRecord(array_dict=fewer), EXPECTED))
    refused(lambda: arrays_from_record(with_array(SECRET, Array(np.zeros(1, np.float32))), EXPECTED))
    refused(lambda: arrays_from_record(ArrayRecord(array_dict={}), EXPECTED))


ONE = np.ones(2, np.float32)
BAD_ARRAYS: dict[str, Array] = {
    "shape": Array(np.zeros(3, np.float32)),
    "transposed shape": Array(np.zeros((1, 2), np.float32)),
    "scalar": Array(np.array(1, np.float32)),
    "float64": Array(np.zeros(2)),
    "float16": Array(np.zeros(2, np.float16)),
    "integers": Array(np.zeros(2, np.int32)),
    "complex": Array(np.zeros(2, np.complex64)),
    "NaN": Array(np.array([1, math.nan], np.float32)),
    "infinity": Array(np.array([-math.inf, 1], np.float32)),
    "declares another shape than it holds": declared(npy(np.ones(3, np.float32))),
    "holds two dimensions": declared(npy(np.ones((1, 2), np.float32))),
    "holds float64": declared(npy(np.ones(2))),
    "holds big-endian": declared(npy(np.ones(2, ">f4"))),
    "holds text": declared(npy(np.array([SECRET, "b"]))),
    "pickled objects": declared(npy(np.array([SECRET, None], dtype=object), allow_pickle=True)),
    "pickle without npy": declared(
        b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x06" + SECRET.encode() + b"\x94."
    ),
    "oversized": declared(npy(ONE) + b"\x00" * 5000),
    "gigabytes declared": Array(dtype="float32", shape=(10**9,), stype="numpy.ndarray", data=npy(ONE)),
    "cut off": declared(npy(ONE)[:-1]),
    "cut off in the header": declared(npy(ONE)[:20]),
    "empty": declared(b""),
    "text": declared(SECRET.encode()),
    "another serialisation": declared(npy(ONE), stype="torch.tensor"),
    "unknown dtype": declared(npy(ONE), dtype=SECRET),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays(name: str) -> None:
    assert "'b'" in refused(lambda: arrays_from_record(with_array("b", BAD_ARRAYS[name]), EXPECTED))


def npy_with_header(header: str, body: bytes = b"\x00" * 8) -> bytes:
    text = header.encode("latin1")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


def zipped() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, np.float32(1))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        zipped(),
        npy_with_header("{(\n"),
        npy_with_header("('\n"),
        npy_with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000,), }\n"),
        npy_with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999999,), }\n"),
        npy_with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }\n"),
        npy_with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (True, 2), }\n"),
        npy_with_header("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,), }\n"),
        npy_with_header("{'descr': 3, 'fortran_order': False, 'shape': (2,), }\n"),
        npy_with_header("{'descr': {}, 'fortran_order': False, 'shape': (2,), }\n"),
        npy_with_header("{'descr': ('<f4',), 'fortran_order': False, 'shape': (2,), }\n"),
        npy_with_header("{'descr': '|O', 'fortran_order': False, 'shape': (2,), }\n"),
        npy_with_header("{[]: 1}\n"),
        npy_with_header("-" * 500 + "1\n"),
        npy_with_header("(" * 900 + "\n"),
        npy_with_header(""),
        b"\x93NUMPY\x09\x00" + b"\x00" * 50,
        b"PK\x03\x04" + b"\x00" * 50,
    ],
)
def test_bytes_made_to_break_a_reader_are_refused(data: bytes) -> None:
    assert "'b'" in refused(lambda: arrays_from_record(with_array("b", declared(data)), EXPECTED))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_corruption_is_read_as_finite_float32_or_refused(data: st.DataObject) -> None:
    content = bytearray(npy(ONE))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = arrays_from_record(with_array("b", declared(bytes(content))), EXPECTED)
    except MessageError:
        return
    assert found["b"].dtype == torch.float32 and found["b"].shape == (2,) and torch.isfinite(found["b"]).all()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
@example(zipped())
def test_random_bytes_are_refused(content: bytes) -> None:
    refused(lambda: arrays_from_record(with_array("b", declared(content)), EXPECTED))


def test_digest_of_arrays_tells_every_bit_apart() -> None:
    base = arrays()
    assert arrays_digest(base) == arrays_digest(dict(reversed(base.items())))
    changed = {**base, "b": torch.nextafter(base["b"], torch.full((2,), 9.0))}
    reshaped = {**base, "w": base["w"].reshape(3, 2)}
    renamed = {"v" if name == "w" else name: array for name, array in base.items()}
    negative = {**base, "b": torch.tensor([-0.0, 0.0])}
    positive = {**base, "b": torch.tensor([0.0, 0.0])}
    digests = [arrays_digest(a) for a in (base, changed, reshaped, renamed, negative, positive)]
    assert len(set(digests)) == 6 and all(len(digest) == 64 for digest in digests)
    assert json.loads(json.dumps(digests)) == digests
