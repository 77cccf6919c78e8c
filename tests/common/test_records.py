import json
import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.records import (
    CONTENT,
    MessageError,
    arrays_digest,
    arrays_from_record,
    arrays_to_record,
    values_from_record,
    values_to_record,
)
from tests.packed import pack

SECRET = "Zq7731"
EXPECTED: dict[str, tuple[int, ...]] = {"w": (2, 3), "b": (2,), "empty": (0,)}
SHAPE = (3, 2)


def arrays(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in EXPECTED.items()}


def plain() -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in arrays().items()}


def document(header: Any, body: bytes = b"") -> bytes:
    """A safetensors document with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


GOOD_HEADER = {"w": entry([2, 3], 0, 24), "b": entry([2], 24, 32), "empty": entry([0], 32, 32)}
BODY = np.arange(8, dtype=np.float32).tobytes()


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
        pack({"rows": np.zeros(SHAPE, np.float32)}),
        pack({"rows": np.zeros(SHAPE, np.int64)}),
        pack({"rows": np.zeros(SHAPE), "more": np.zeros(SHAPE)}),
        pack({"rows": np.zeros((300, 200))}),
        pack({}),
    ],
)
def test_rows_of_another_form_are_refused(record: ConfigRecord) -> None:
    refused(lambda: values_from_record(record, "rows", SHAPE))


@pytest.mark.parametrize("names", [{SECRET: "w"}, {"W": "w"}, {"w": "b", "b": "w"}])
def test_wrong_names(names: dict[str, str]) -> None:
    renamed = {new: plain()[old] for new, old in names.items()}
    kept = {key: value for key, value in plain().items() if key not in names.values()}
    refused(lambda: arrays_from_record(pack({**kept, **renamed}), EXPECTED))


def test_missing_and_extra_names() -> None:
    for name in EXPECTED:
        fewer = {key: value for key, value in plain().items() if key != name}
        refused(lambda fewer=fewer: arrays_from_record(pack(fewer), EXPECTED))
    refused(lambda: arrays_from_record(pack({**plain(), SECRET: np.zeros(1, np.float32)}), EXPECTED))
    refused(lambda: arrays_from_record(pack({}), EXPECTED))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(3, np.float32),
        np.zeros((1, 2), np.float32),
        np.array(1, np.float32),
        np.zeros(2),
        np.zeros(2, np.float16),
        np.zeros(2, np.int32),
        np.zeros(2, np.uint8),
        np.array([1, math.nan], np.float32),
        np.array([-math.inf, 1], np.float32),
    ],
)
def test_bad_arrays_are_named(array: np.ndarray) -> None:
    assert "'b'" in refused(lambda: arrays_from_record(pack({**plain(), "b": array}), EXPECTED))


def test_a_document_made_by_hand_is_read() -> None:
    found = arrays_from_record(ConfigRecord({CONTENT: document(GOOD_HEADER, BODY)}), EXPECTED)
    assert found["w"].tolist() == [[0, 1, 2], [3, 4, 5]] and found["b"].tolist() == [6, 7]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        SECRET.encode(),
        b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x06" + SECRET.encode() + b"\x94.",
        b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }",
        b"PK\x03\x04" + b"\x00" * 40,
        document(GOOD_HEADER, BODY)[:-1],
        document(GOOD_HEADER, BODY)[:20],
        document(GOOD_HEADER, BODY) + b"\x00" * 8,
        document(GOOD_HEADER, BODY) + b"\x00" * 5000,
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        document(b"{" * 900),
        document(b"[" * 900),
        document(b"not json"),
        document([]),
        document({"w": SECRET}),
        document(GOOD_HEADER | {"b": entry([2], 0, 8)}, BODY),  # two arrays share bytes
        document(GOOD_HEADER | {"b": entry([10**15], 24, 32)}, BODY),
        document(GOOD_HEADER | {"b": entry([-2], 24, 32)}, BODY),
        document(GOOD_HEADER | {"b": entry([2], 24, 1 << 60)}, BODY),
        document(GOOD_HEADER | {"b": entry([2], 24, 32, SECRET)}, BODY),
        document(GOOD_HEADER | {"b": entry([2], 24, 32, "I32")}, BODY),
        document(GOOD_HEADER | {"b": entry([1], 24, 32, "F64")}, BODY),
    ],
)
def test_bytes_made_to_break_a_reader_are_refused(content: bytes) -> None:
    refused(lambda: arrays_from_record(ConfigRecord({CONTENT: content}), EXPECTED))


@pytest.mark.parametrize(
    "fields", [{}, {CONTENT: SECRET}, {CONTENT: 1}, {CONTENT: [1.0]}, {CONTENT: b"", "more": 1}, {SECRET: b""}]
)
def test_another_record_than_one_document(fields: dict[str, Any]) -> None:
    assert "safetensors document" in refused(lambda: arrays_from_record(ConfigRecord(fields), EXPECTED))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_corruption_is_read_as_finite_float32_or_refused(data: st.DataObject) -> None:
    content = bytearray(document(GOOD_HEADER, BODY))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = arrays_from_record(ConfigRecord({CONTENT: bytes(content)}), EXPECTED)
    except MessageError as error:
        assert SECRET not in str(error)
        return
    assert {name: tuple(array.shape) for name, array in found.items()} == EXPECTED
    assert all(array.dtype == torch.float32 and bool(torch.isfinite(array).all()) for array in found.values())


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
@example(b"\x00" * 8)
def test_random_bytes_are_refused(content: bytes) -> None:
    refused(lambda: arrays_from_record(ConfigRecord({CONTENT: content}), EXPECTED))


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
