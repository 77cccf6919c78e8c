import dataclasses
import io
import json
import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from common import messages
from common.messages import (
    ARRAYS,
    HEADER,
    JOIN,
    PROTOCOL_VERSION,
    REPLY_FIELDS,
    TRAIN,
    Exposure,
    JoinReply,
    JoinRequest,
    MessageError,
    Status,
    TrainReply,
    TrainRequest,
    arrays_digest,
    arrays_from_record,
    arrays_to_record,
    read_train_header,
)

SECRET = "Zq7731"
EXPECTED: dict[str, tuple[int, ...]] = {"w": (2, 3), "b": (2,), "empty": (0,)}
STUDY = "a" * 64


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


# The form of a signed head; whether a signature holds is not for the messages to know.
LEDGER: dict[str, Any] = {"ledger_length": 3, "ledger_head": "b" * 64, "ledger_signature": "c" * 128}
WITNESS: dict[str, Any] = {
    "witness_length": 2, "witness_head": "b" * 64, "witness_signature": "c" * 128, "witness_key": "e" * 64,
}  # fmt: skip
NO_LEDGER: dict[str, Any] = {"ledger_length": 0, "ledger_head": "", "ledger_signature": ""}
GOOD: dict[str, dict[str, Any]] = {
    "join request": {"version": 1, "protocol": "{}"},
    "join reply": {
        "version": 1, "status": "ok", "site": "north", "study": STUDY, "patients": 5, **LEDGER, "ledger_key": "d" * 64,
    },
    "train request": {"version": 1, "study": STUDY, "round": 2, "weight": 0.5, **WITNESS},
    "train reply": {"version": 1, "status": "ok", "site": "north", "study": STUDY, "round": 2, **LEDGER},
}  # fmt: skip
BAD_LEDGER: tuple[tuple[str, Any], ...] = (
    ("ledger_length", -1), ("ledger_length", 1 << 63), ("ledger_head", ""), ("ledger_head", SECRET),
    ("ledger_head", "B" * 64), ("ledger_head", "b" * 64 + "\n"), ("ledger_signature", ""),
    ("ledger_signature", "c" * 126),
)  # fmt: skip
READERS: dict[str, Callable[[RecordDict], Any]] = {
    "join request": JoinRequest.from_record,
    "join reply": JoinReply.from_record,
    "train request": lambda record: TrainRequest.from_record(record, EXPECTED),
    "train reply": lambda record: TrainReply.from_record(record, EXPECTED),
}


def record_of(kind: str, **changes: Any) -> RecordDict:
    header = {key: value for key, value in {**GOOD[kind], **changes}.items() if value is not ...}
    records: dict[str, Any] = {HEADER: ConfigRecord(header)}
    if kind.startswith("train"):
        records[ARRAYS] = arrays_to_record(arrays())
    return RecordDict(records)


def same(one: Any, two: Any) -> bool:
    a, b = one or {}, two or {}
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_join_round_trips() -> None:
    request = JoinRequest({"study": {"name": "zwölf"}, "schema": {"fields": [1, None]}})
    assert JoinRequest.from_record(request.to_record()) == request
    for reply in (
        JoinReply(Status.OK, "north", STUDY, 5, **LEDGER, ledger_key="d" * 64),
        JoinReply(Status.REFUSED_BY_POLICY, "north"),
    ):
        assert JoinReply.from_record(reply.to_record()) == reply


@pytest.mark.parametrize("status", list(Status))
def test_train_round_trips_to_the_bit(status: Status) -> None:
    assert TrainRequest.from_record(TrainRequest(STUDY, 3, 0.1, arrays(1)).to_record(), EXPECTED).witness_key == ""
    request = TrainRequest(STUDY, 3, 0.1, arrays(1), **WITNESS)
    found = TrainRequest.from_record(request.to_record(), EXPECTED)
    assert {name: getattr(found, name) for name in WITNESS} == WITNESS
    assert (found.study, found.round, found.weight) == (STUDY, 3, 0.1) and same(found.decoder, request.decoder)
    ledger = LEDGER if status is Status.OK else NO_LEDGER
    reply = TrainReply(status, "north", STUDY, 3, arrays(2) if status is Status.OK else None, **ledger)
    back = TrainReply.from_record(reply.to_record(), EXPECTED)
    assert (back.status, back.site, back.study, back.round) == (status, "north", STUDY, 3)
    assert {name: getattr(back, name) for name in LEDGER} == ledger
    assert same(back.update, reply.update) and (back.update is None) == (status is not Status.OK)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 3.4028235e38, -1e-38])
def test_float32_extremes_survive(value: float) -> None:
    sent = {**arrays(), "b": torch.tensor([value, 1.0])}
    back = arrays_from_record(arrays_to_record(sent), EXPECTED)
    assert back["b"].numpy().tobytes() == sent["b"].numpy().tobytes()
    back["b"] += 1  # what arrives is writable and its own


def test_arrays_that_are_not_contiguous_are_sent_in_order() -> None:
    sent = {**arrays(), "w": torch.arange(6.0).reshape(3, 2).T}
    assert torch.equal(arrays_from_record(arrays_to_record(sent), EXPECTED)["w"], sent["w"])


@pytest.mark.parametrize("kind", GOOD)
def test_good_headers_are_read(kind: str) -> None:
    READERS[kind](record_of(kind))


@pytest.mark.parametrize("kind", GOOD)
def test_missing_header(kind: str) -> None:
    assert refused(lambda: READERS[kind](RecordDict({}))) == "no header"
    metrics = RecordDict({HEADER: MetricRecord({"version": 1})})
    assert refused(lambda: READERS[kind](metrics)) == "no header"


@pytest.mark.parametrize("version", [0, 2, ..., "1", 1.0, True, SECRET, [1], SECRET.encode()])
@pytest.mark.parametrize("kind", GOOD)
def test_wrong_version(kind: str, version: Any) -> None:
    assert "version" in refused(lambda: READERS[kind](record_of(kind, version=version)))


@pytest.mark.parametrize("kind", GOOD)
def test_extra_and_absent_fields(kind: str) -> None:
    refused(lambda: READERS[kind](record_of(kind, **{SECRET: SECRET})))
    refused(lambda: READERS[kind](record_of(kind, loss=0.5)))
    for name in GOOD[kind]:
        refused(lambda name=name: READERS[kind](record_of(kind, **{name: ...})))


@pytest.mark.parametrize("kind", GOOD)
def test_wrong_types(kind: str) -> None:
    alternatives: list[Any] = [SECRET, 3, 0.5, True, [1, 2], [SECRET], SECRET.encode()]
    for name, good in GOOD[kind].items():
        for value in alternatives:
            if type(value) is not type(good):
                refused(lambda name=name, value=value: READERS[kind](record_of(kind, **{name: value})))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("join request", {"protocol": SECRET}),
        ("join request", {"protocol": "[1]"}),
        ("join request", {"protocol": f'"{SECRET}"'}),
        ("join request", {"protocol": ""}),
        ("join request", {"protocol": "[" * 200_000}),
        ("join request", {"protocol": '{"a":' * 200_000}),
        ("join reply", {"status": SECRET}),
        ("join reply", {"status": "OK"}),
        ("join reply", {"site": ""}),
        ("join reply", {"patients": 0}),
        ("join reply", {"patients": -3}),
        ("train request", {"round": 0}),
        ("train request", {"round": -1}),
        ("train request", {"weight": 0.0}),
        ("train request", {"weight": 1.0000001}),
        ("train request", {"weight": -0.5}),
        ("train request", {"weight": math.nan}),
        ("train request", {"weight": math.inf}),
        ("train reply", {"status": SECRET}),
        ("train reply", {"status": ""}),
        *((kind, {name: value}) for kind in ("join reply", "train reply") for name, value in BAD_LEDGER),
        *((kind, {"status": "ledger-failed"}) for kind in ("join reply", "train reply")),
        ("join reply", {"ledger_key": ""}),
        ("join reply", {"ledger_key": SECRET}),
        ("train request", {"witness_length": -1}),
        ("train request", {"witness_head": ""}),
        ("train request", {"witness_signature": SECRET}),
        ("train request", {"witness_key": ""}),
    ],
)
def test_values_outside_the_protocol(kind: str, changes: dict[str, Any]) -> None:
    refused(lambda: READERS[kind](record_of(kind, **changes)))


def test_the_header_of_a_request_is_read_without_its_arrays() -> None:
    record = RecordDict({HEADER: ConfigRecord(GOOD["train request"])})
    assert read_train_header(record) == GOOD["train request"]
    assert refused(lambda: TrainRequest.from_record(record, EXPECTED)) == "no arrays"


def test_arrays_are_required_exactly_when_the_status_is_ok() -> None:
    record = RecordDict({HEADER: ConfigRecord(GOOD["train reply"])})
    assert refused(lambda: TrainReply.from_record(record, EXPECTED)) == "no arrays"
    failed = record_of("train reply", status="non-finite-loss", **NO_LEDGER)
    assert TrainReply.from_record(failed, EXPECTED).update is None


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
    for kind in ("train request", "train reply"):
        record = RecordDict(
            {HEADER: ConfigRecord(GOOD[kind]), ARRAYS: with_array("b", BAD_ARRAYS[name])}  # type: ignore[dict-item]
        )
        refused(lambda kind=kind, record=record: READERS[kind](record))


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


def test_every_field_of_every_reply_is_classified() -> None:
    def header_fields(reply: type) -> set[str]:
        return {field.name for field in dataclasses.fields(reply)} | {"version"}

    assert header_fields(JoinReply) == set(REPLY_FIELDS[JOIN])
    assert header_fields(TrainReply) == set(REPLY_FIELDS[TRAIN])
    assert {k: v for k, v in REPLY_FIELDS[TRAIN].items() if v is Exposure.ACCOUNTED} == {"update": Exposure.ACCOUNTED}
    # What is really on the wire.
    sent = TrainReply(Status.OK, "north", STUDY, 1, arrays()).to_record()
    assert set(sent) == {HEADER, ARRAYS} and set(sent.config_records[HEADER]) == set(REPLY_FIELDS[TRAIN]) - {"update"}
    assert set(JoinReply(Status.OK, "n", STUDY, 1).to_record().config_records[HEADER]) == set(REPLY_FIELDS[JOIN])


@pytest.mark.parametrize("kind", [JOIN, TRAIN])
@pytest.mark.parametrize("field", ["loss", "norm", "reason", "certificate"])
def test_a_field_without_classification_cannot_leave(kind: str, field: str) -> None:
    with pytest.raises(MessageError, match=f"'{field}'.* must not leave the site"):
        messages._reply_record(kind, Status.OK, {"site": "north", field: 0.5})


def test_a_join_reply_cannot_carry_arrays() -> None:
    with pytest.raises(MessageError, match="must not leave the site"):
        messages._reply_record(JOIN, Status.OK, {"site": "north"}, arrays())


def test_a_reply_that_reports_a_failure_cannot_carry_an_update() -> None:
    # Only Status.OK is accounted in the ledger; see privacy.md, section 0.
    with pytest.raises(MessageError):
        TrainReply(Status.NON_FINITE_LOSS, "north", STUDY, 1, arrays()).to_record()


def test_status_codes_are_fixed_words() -> None:
    assert all(code.value == code.value.lower() and " " not in code.value for code in Status)
    assert PROTOCOL_VERSION == 1


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
