import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from common import messages
from common.messages import (
    JOIN,
    RELEASE,
    REPLY_FIELDS,
    ROWS,
    TRAIN,
    Exposure,
    JoinReply,
    JoinRequest,
    ReleaseReply,
    ReleaseRequest,
    Status,
    TrainReply,
    TrainRequest,
    read_release_header,
    read_train_header,
)
from common.records import (
    ARRAYS,
    HEADER,
    PROTOCOL_VERSION,
    MessageError,
    arrays_to_record,
    values_digest,
    values_to_record,
)

SECRET = "Zq7731"
EXPECTED: dict[str, tuple[int, ...]] = {"w": (2, 3), "b": (2,), "empty": (0,)}
STUDY = "a" * 64


def arrays(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in EXPECTED.items()}


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
    "join request": {"version": 2, "protocol": "{}"},
    "join reply": {
        "version": 2, "status": "ok", "site": "north", "study": STUDY, "patients": 5, **LEDGER, "ledger_key": "d" * 64,
    },
    "train request": {"version": 2, "study": STUDY, "round": 2, "weight": 0.5, **WITNESS},
    "train reply": {"version": 2, "status": "ok", "site": "north", "study": STUDY, "round": 2, **LEDGER},
    "release request": {"version": 2, "study": STUDY, "rows": 3, **WITNESS},
    "release reply": {"version": 2, "status": "ok", "site": "north", "study": STUDY, **LEDGER},
}  # fmt: skip
REPLIES = ("join reply", "train reply", "release reply")
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
    "release request": lambda record: ReleaseRequest.from_record(record, EXPECTED),
    "release reply": lambda record: ReleaseReply.from_record(record, SHAPE),
}
SHAPE = (3, 2)
TABLE = np.array([[1.5, np.nan], [-0.0, 2.0], [1e300, 5e-324]])


def record_of(kind: str, **changes: Any) -> RecordDict:
    header = {key: value for key, value in {**GOOD[kind], **changes}.items() if value is not ...}
    records: dict[str, Any] = {HEADER: ConfigRecord(header)}
    if kind.startswith("train") or kind == "release request":
        records[ARRAYS] = arrays_to_record(arrays())
    if kind == "release reply":
        records[ARRAYS] = values_to_record(ROWS, TABLE)
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


@pytest.mark.parametrize("kind", GOOD)
def test_good_headers_are_read(kind: str) -> None:
    READERS[kind](record_of(kind))


@pytest.mark.parametrize("kind", GOOD)
def test_missing_header(kind: str) -> None:
    assert refused(lambda: READERS[kind](RecordDict({}))) == "no header"
    metrics = RecordDict({HEADER: MetricRecord({"version": 1})})
    assert refused(lambda: READERS[kind](metrics)) == "no header"


@pytest.mark.parametrize("version", [0, 1, 3, ..., "2", 2.0, True, SECRET, [1], SECRET.encode()])
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
        ("release request", {"rows": 0}),
        ("release request", {"rows": -1}),
        ("release request", {"witness_key": SECRET}),
        ("release reply", {"status": SECRET}),
        *((kind, {name: value}) for kind in REPLIES for name, value in BAD_LEDGER),
        *((kind, {"status": "ledger-failed"}) for kind in REPLIES),
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
    record = RecordDict({HEADER: ConfigRecord(GOOD["release reply"])})
    assert refused(lambda: ReleaseReply.from_record(record, SHAPE)) == "no arrays"
    failed = record_of("release reply", status="wrong-round", **NO_LEDGER)
    assert ReleaseReply.from_record(failed, SHAPE).rows is None


def test_release_round_trips_to_the_bit() -> None:
    request = ReleaseRequest(STUDY, 3, arrays(1), **WITNESS)
    record = request.to_record()
    found = ReleaseRequest.from_record(record, EXPECTED)
    assert (found.study, found.rows) == (STUDY, 3) and same(found.decoder, request.decoder)
    assert {name: getattr(found, name) for name in WITNESS} == WITNESS
    assert read_release_header(record) == {"version": PROTOCOL_VERSION, "study": STUDY, "rows": 3, **WITNESS}
    reply = ReleaseReply(Status.OK, "north", STUDY, TABLE, **LEDGER)
    back = ReleaseReply.from_record(reply.to_record(), SHAPE)
    assert back.rows is not None and back.rows.tobytes() == TABLE.tobytes() and back.rows.dtype == np.float64
    assert values_digest(back.rows) == values_digest(TABLE) != values_digest(TABLE.T)


@pytest.mark.parametrize("kind", ["train request", "train reply", "release request"])
def test_a_bad_array_spoils_the_message(kind: str) -> None:
    spoiled = arrays_to_record(arrays() | {"b": torch.tensor([1.0, math.nan])})
    records: Any = {HEADER: ConfigRecord(GOOD[kind]), ARRAYS: spoiled}
    assert "'b'" in refused(lambda: READERS[kind](RecordDict(records)))


def test_every_field_of_every_reply_is_classified() -> None:
    def header_fields(reply: type) -> set[str]:
        return {field.name for field in dataclasses.fields(reply)} | {"version"}

    assert header_fields(JoinReply) == set(REPLY_FIELDS[JOIN])
    assert header_fields(TrainReply) == set(REPLY_FIELDS[TRAIN])
    assert header_fields(ReleaseReply) == set(REPLY_FIELDS[RELEASE])
    assert {k for k, v in REPLY_FIELDS[RELEASE].items() if v is Exposure.ACCOUNTED} == {"rows"}
    assert {k: v for k, v in REPLY_FIELDS[TRAIN].items() if v is Exposure.ACCOUNTED} == {"update": Exposure.ACCOUNTED}
    # What is really on the wire.
    sent = TrainReply(Status.OK, "north", STUDY, 1, arrays()).to_record()
    assert set(sent) == {HEADER, ARRAYS} and set(sent.config_records[HEADER]) == set(REPLY_FIELDS[TRAIN]) - {"update"}
    assert set(JoinReply(Status.OK, "n", STUDY, 1).to_record().config_records[HEADER]) == set(REPLY_FIELDS[JOIN])


@pytest.mark.parametrize("kind", [JOIN, TRAIN, RELEASE])
@pytest.mark.parametrize("field", ["loss", "norm", "reason", "certificate"])
def test_a_field_without_classification_cannot_leave(kind: str, field: str) -> None:
    with pytest.raises(MessageError, match=f"'{field}'.* must not leave the site"):
        messages.reply_record(kind, Status.OK, {"site": "north", field: 0.5})


def test_a_join_reply_cannot_carry_arrays() -> None:
    with pytest.raises(MessageError, match="must not leave the site"):
        messages.reply_record(JOIN, Status.OK, {"site": "north"}, ("update", arrays_to_record(arrays())))


def test_a_reply_that_reports_a_failure_cannot_carry_an_update() -> None:
    # Only Status.OK is accounted in the ledger; see privacy.md, section 0.
    with pytest.raises(MessageError):
        TrainReply(Status.NON_FINITE_LOSS, "north", STUDY, 1, arrays()).to_record()
    with pytest.raises(MessageError):
        ReleaseReply(Status.LEDGER_FAILED, "north", STUDY, TABLE).to_record()


def test_status_codes_are_fixed_words() -> None:
    assert all(code.value == code.value.lower() and " " not in code.value for code in Status)
    assert PROTOCOL_VERSION == 2
