"""Rounds: what a site answers, spends and keeps."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

import client.handlers
from common.messages import (
    Status,
    TrainReply,
    TrainRequest,
)
from common.privacy.events import BoundedInfluence
from common.privacy.ledger import Ledger
from common.privacy.update import update_norm
from common.records import ARRAYS, HEADER, PROTOCOL_VERSION
from tests.client.hospital import (
    PROTOCOL,
    RADIUS,
    ROUNDS,
    SECRET,
    Hospital,
    decoder_of,
    digest_of,
    study,
    train_request,
)
from tests.packed import pack, unpack


def test_a_round_is_spent_before_its_reply_exists(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[tuple[int, str]]] = []

    def watched(status: Status, *rest: Any) -> TrainReply:
        seen.append(hospital.spends())  # what a power cut at this moment would leave
        return TrainReply(status, *rest)

    hospital.joined()
    monkeypatch.setattr(client.handlers, "TrainReply", watched)
    reply = hospital.train(train_request(1))
    assert (reply.status, reply.site, reply.study, reply.round) == (Status.OK, "anna", PROTOCOL.digest, 1)
    assert seen == [[(1, digest_of(reply.update))]]
    assert 0 < update_norm(reply.update or {}) <= RADIUS


def test_the_ledger_says_what_was_exposed(hospital: Hospital) -> None:
    hospital.joined()
    updates = [hospital.train(train_request(n, seed=n, weight=0.25)).update for n in range(1, ROUNDS + 1)]
    with Ledger(hospital.state / "ledger.sqlite", "anna") as ledger:
        entries = ledger.entries(PROTOCOL.digest)
    assert [entry.event for entry in entries] == [BoundedInfluence(n, RADIUS, 0.25) for n in range(1, ROUNDS + 1)]
    assert [entry.payload_digest for entry in entries] == [digest_of(update) for update in updates]


def test_a_repeated_request_gets_the_same_bytes_and_spends_nothing(hospital: Hospital) -> None:
    hospital.joined()
    first = hospital.site.train(train_request(1)).to_record()
    again = hospital.site.train(train_request(1)).to_record()
    assert dict(first.config_records[HEADER]) == dict(again.config_records[HEADER])
    assert dict(first.config_records[ARRAYS]) == dict(again.config_records[ARRAYS])
    assert len(hospital.spends()) == 1
    assert hospital.train(train_request(2)).status is Status.OK
    assert hospital.train(train_request(1)).status is Status.WRONG_ROUND  # the bytes of round 1 are gone
    assert len(hospital.spends()) == 2


def test_an_answered_round_is_not_answered_for_another_decoder_or_weight(hospital: Hospital) -> None:
    assert hospital.joined().train(train_request(2)).status is Status.OK
    assert hospital.train(train_request(2, seed=1)).status is Status.WRONG_ROUND
    assert "answered from another decoder" in hospital.reason(Status.WRONG_ROUND)
    assert hospital.train(train_request(1, seed=1)).status is Status.WRONG_ROUND
    assert hospital.train(train_request(2, weight=0.5)).status is Status.LEDGER_FAILED
    assert len(hospital.spends()) == 1


def test_a_round_the_study_does_not_have(hospital: Hospital) -> None:
    assert hospital.joined().train(train_request(ROUNDS + 1)).status is Status.WRONG_ROUND
    assert "fewer rounds" in hospital.reason(Status.WRONG_ROUND) and hospital.spends() == []


def test_a_study_the_site_has_not_accepted(hospital: Hospital) -> None:
    reply = hospital.train(train_request())
    assert reply == TrainReply(Status.UNKNOWN_STUDY, "anna", PROTOCOL.digest, 1)
    hospital.joined()
    for digest in ("", "..", "../../etc", PROTOCOL.digest[:32], PROTOCOL.digest[:-1] + "x", "a" * 64):
        request = TrainRequest(digest, 1, 0.25, decoder_of(PROTOCOL)).to_record()
        assert hospital.train(request).status is Status.UNKNOWN_STUDY
    assert hospital.spends() == []


def test_a_protocol_swapped_on_disk_is_not_the_one_accepted(hospital: Hospital) -> None:
    hospital.joined()
    path = hospital.state / "studies" / PROTOCOL.digest[:32] / "protocol.json"
    path.write_text(json.dumps(study(training={"update_norm": 9.0}).to_json()))
    assert hospital.train(train_request()).status is Status.UNKNOWN_STUDY


def test_a_policy_that_became_stricter_holds_for_the_next_round(hospital: Hospital) -> None:
    assert hospital.joined().train(train_request(1)).status is Status.OK
    policy = hospital.config.policy.model_copy(update={"max_update_norm": 0.1})
    hospital.config = hospital.config.model_copy(update={"policy": policy})
    assert hospital.train(train_request(2)).status is Status.REFUSED_BY_POLICY
    assert "exceeds this site's limit 0.1" in hospital.reason(Status.REFUSED_BY_POLICY)


def changed_request(change: Callable[[ConfigRecord, dict[str, np.ndarray]], None]) -> RecordDict:
    record = train_request()
    header, arrays = record.config_records[HEADER], unpack(record.config_records[ARRAYS])
    change(header, arrays)
    return RecordDict({HEADER: header, ARRAYS: pack(arrays)})


def non_finite(value: float) -> Callable[[ConfigRecord, dict[str, np.ndarray]], None]:
    def change(header: ConfigRecord, arrays: dict[str, np.ndarray]) -> None:
        arrays["network.layers.0.bias"][0] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda header, arrays: header.update(version=PROTOCOL_VERSION + 1),
        lambda header, arrays: header.update(round=0),
        lambda header, arrays: header.update(round=True),
        lambda header, arrays: header.update(round="1"),
        lambda header, arrays: header.update(weight=0.0),
        lambda header, arrays: header.update(weight=1.5),
        lambda header, arrays: header.update(weight=float("nan")),
        lambda header, arrays: header.update(note=SECRET),
        lambda header, arrays: header.pop("study"),
        lambda header, arrays: arrays.pop("head.base"),
        lambda header, arrays: arrays.update(extra=np.zeros(3, np.float32)),
        lambda header, arrays: arrays.update({"head.base": np.zeros(3, np.float32)}),
        lambda header, arrays: arrays.update({"head.base": arrays["head.base"].astype(np.float64)}),
        non_finite(np.nan),
        non_finite(np.inf),
    ],
)
def test_a_garbage_request(hospital: Hospital, change: Callable[[ConfigRecord, dict[str, np.ndarray]], None]) -> None:
    hospital.joined()
    assert hospital.train(changed_request(change)).status is Status.BAD_REQUEST
    assert hospital.reason(Status.BAD_REQUEST)
    assert hospital.train(train_request()).status is Status.OK
    assert len(hospital.spends()) == 1


def test_an_empty_request(hospital: Hospital) -> None:
    hospital.joined()
    assert hospital.train(RecordDict({})) == TrainReply(Status.BAD_REQUEST, "anna", "", 0)
    without_arrays = RecordDict({HEADER: train_request().config_records[HEADER]})
    assert hospital.train(without_arrays).status is Status.BAD_REQUEST
