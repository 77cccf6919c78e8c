"""What goes wrong at a site: fixed codes, nothing spent, nothing said."""

import functools
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import RecordDict

from client.state import load_state, save_state
from common.messages import (
    JoinReply,
    Status,
    TrainReply,
    TrainRequest,
)
from common.privacy.ledger import GENESIS, Ledger
from common.privacy.ledger_keys import public_hex, sign_head
from common.privacy.update import update_norm
from common.records import HEADER
from tests.client.hospital import (
    COORDINATOR,
    PROTOCOL,
    RADIUS,
    Hospital,
    decoder_of,
    digest_of,
    join_request,
    study,
    train_request,
)
from tests.disk import full_disk


def plant(hospital: Hospital, value: float) -> Path:
    """Spoil the encoder that the site has kept since round 1."""
    path = hospital.state / "studies" / PROTOCOL.digest[:32] / "state.safetensors"
    state = load_state(path, PROTOCOL.digest)
    spoilt = {
        name: torch.full_like(a, value) if name.startswith("encoder.") else a for name, a in state.trainer.items()
    }
    save_state(path, PROTOCOL.digest, replace(state, trainer=spoilt))
    return path


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(hospital: Hospital, value: float) -> None:
    assert hospital.joined().train(train_request(1)).status is Status.OK
    path = plant(hospital, value)
    before = path.read_bytes()
    assert hospital.train(train_request(2)) == TrainReply(Status.NON_FINITE_LOSS, "anna", PROTOCOL.digest, 2)
    assert "no longer finite in round 2" in hospital.reason(Status.NON_FINITE_LOSS)
    assert [number for number, _ in hospital.spends()] == [1] and path.read_bytes() == before


def test_a_damaged_training_state(hospital: Hospital) -> None:
    assert hospital.joined().train(train_request(1)).status is Status.OK
    path = plant(hospital, 0.0)
    path.write_bytes(path.read_bytes()[:-7])
    assert hospital.train(train_request(2)).status is Status.STORAGE_FAILED
    assert "training state is damaged" in hospital.reason(Status.STORAGE_FAILED)
    assert len(hospital.spends()) == 1


def test_a_disk_that_fills_up_spends_nothing(hospital: Hospital) -> None:
    hospital.joined()
    with full_disk(2048):
        assert hospital.train(train_request(1)).status is Status.STORAGE_FAILED
    assert "cannot be written" in hospital.reason(Status.STORAGE_FAILED) and hospital.spends() == []
    assert hospital.train(train_request(1)).status is Status.OK


def test_a_ledger_that_cannot_grow_lets_nothing_out(hospital: Hospital) -> None:
    assert hospital.joined().train(train_request(1)).status is Status.OK
    state = hospital.state / "studies" / PROTOCOL.digest[:32] / "state.safetensors"
    limit = state.stat().st_size + 1024  # enough for the state, too little for the ledger's pages
    assert limit < (hospital.state / "ledger.sqlite").stat().st_size
    with full_disk(limit):
        assert hospital.train(train_request(2)).status is Status.LEDGER_FAILED
    assert [number for number, _ in hospital.spends()] == [1]
    reply = hospital.train(train_request(2))
    assert hospital.spends()[1:] == [(2, digest_of(reply.update))]


def test_the_ledger_of_another_site(hospital: Hospital) -> None:
    with Ledger(hospital.state / "ledger.sqlite", "berta"):
        pass
    assert hospital.join(join_request()) == JoinReply(Status.LEDGER_FAILED, "anna")
    assert "belongs to site 'berta'" in hospital.reason(Status.LEDGER_FAILED)


def test_a_file_that_is_no_ledger(hospital: Hospital) -> None:
    hospital.joined()
    (hospital.state / "ledger.sqlite").write_text("not a database, but long enough to look like one\n" * 40)
    assert hospital.train(train_request()).status is Status.LEDGER_FAILED
    assert "the ledger cannot be used" in hospital.reason(Status.LEDGER_FAILED)


def impatient(connect: Callable[..., sqlite3.Connection], path: Path, **options: Any) -> sqlite3.Connection:
    return connect(path, **(options | {"timeout": 0.05}))


def test_a_ledger_held_by_someone_else(hospital: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    hospital.joined()
    connect = sqlite3.connect
    # The ledger waits half a minute for the other to finish; here it need not.
    monkeypatch.setattr(sqlite3, "connect", functools.partial(impatient, connect))
    other = connect(hospital.state / "ledger.sqlite", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    assert hospital.train(train_request()).status is Status.LEDGER_FAILED
    assert "locked" in hospital.reason(Status.LEDGER_FAILED)
    other.execute("ROLLBACK")
    other.close()
    assert hospital.spends() == []
    trained = [entry for entry in hospital.log() if entry["action"] == "trained"]
    reply = hospital.train(train_request())
    assert reply.status is Status.OK and hospital.spends() == [(1, digest_of(reply.update))]
    # What had been trained is what is sent: no second training, no second draw of randomness.
    assert [entry for entry in hospital.log() if entry["action"] == "trained"] == trained and len(trained) == 1


def test_every_update_comes_with_the_signed_head_of_its_spend(hospital: Hospital) -> None:
    hospital.joined()
    heads = []
    for number in (1, 2, 2):
        reply = hospital.train(train_request(number))
        with Ledger(hospital.state / "ledger.sqlite") as ledger:
            head = ledger.head()
        assert (reply.ledger_length, reply.ledger_head) == (number, head.head) and head.holds
        heads.append((reply.ledger_length, reply.ledger_head, reply.ledger_signature))
    assert heads[0] != heads[1] == heads[2]


def witnessed(number: int, length: int, head: str) -> RecordDict:
    signature = sign_head("countersignature", COORDINATOR, "anna", length, head)
    request = TrainRequest(
        PROTOCOL.digest,
        number,
        0.25,
        decoder_of(PROTOCOL),
        witness_length=length,
        witness_head=head,
        witness_signature=signature,
        witness_key=public_hex(COORDINATOR),
    )
    return request.to_record()


def test_the_coordinators_countersignature_is_kept(hospital: Hospital) -> None:
    first = hospital.joined().train(witnessed(1, 0, GENESIS))
    assert hospital.train(witnessed(2, first.ledger_length, first.ledger_head)).status is Status.OK
    with Ledger(hospital.state / "ledger.sqlite") as ledger:
        (witness,) = ledger.inspect().witnesses
    assert (witness.key, witness.length, witness.head) == (public_hex(COORDINATOR), 1, first.ledger_head)


def test_a_ledger_restored_from_a_backup_spends_no_more(hospital: Hospital) -> None:
    path = hospital.state / "ledger.sqlite"
    hospital.joined().train(train_request(1))
    backup = path.read_bytes()
    second = hospital.train(train_request(2))
    path.write_bytes(backup)
    before = hospital.log()
    assert hospital.train(witnessed(3, 2, second.ledger_head)).status is Status.LEDGER_FAILED
    assert "it was rolled back" in hospital.reason(Status.LEDGER_FAILED)
    assert len(hospital.log()) == len(before) + 1, "and nothing was trained"
    forged = witnessed(3, 1, second.ledger_head)
    forged.config_records[HEADER]["witness_signature"] = "0" * 128
    assert hospital.train(forged).status is Status.LEDGER_FAILED
    assert "countersignature does not hold" in hospital.reason(Status.LEDGER_FAILED)
    assert [number for number, _ in hospital.spends()] == [1]


@pytest.mark.parametrize("when", ["joining", "training"])
def test_a_ledger_without_its_key_lets_nothing_out(hospital: Hospital, when: str) -> None:
    hospital.joined()
    (hospital.state / "ledger.key").unlink()
    if when == "joining":
        assert hospital.join(join_request()) == JoinReply(Status.LEDGER_FAILED, "anna")
    else:
        assert hospital.train(train_request()).status is Status.LEDGER_FAILED
    assert "ledger.key: the key of this site's ledger is missing" in hospital.reason(Status.LEDGER_FAILED)
    assert not (hospital.state / "ledger.key").exists() and hospital.spends() == []


def test_what_nobody_foresaw_is_a_code_too(hospital: Hospital) -> None:
    assert hospital.joined().train(train_request(1)).status is Status.OK
    path = hospital.state / "studies" / PROTOCOL.digest[:32] / "state.safetensors"
    state = load_state(path, PROTOCOL.digest)
    wrong = {name: torch.zeros(3, 5, 7) for name in state.trainer}  # a state whose shapes fit no network
    save_state(path, PROTOCOL.digest, replace(state, trainer=wrong))
    assert hospital.train(train_request(2)) == TrainReply(Status.INTERNAL_ERROR, "anna", PROTOCOL.digest, 2)
    assert hospital.reason(Status.INTERNAL_ERROR) == "RuntimeError"  # a library's text could quote a value


def test_a_log_that_cannot_be_written_changes_no_answer(hospital: Hospital) -> None:
    (hospital.state / "audit.jsonl").mkdir(parents=True)
    assert hospital.joined().train(train_request()).status is Status.OK
    assert hospital.join(RecordDict({})).status is Status.BAD_REQUEST


def test_a_seeded_simulation_repeats_itself_and_reality_does_not(tmp_path: Path) -> None:
    seeded = study(study={"seed": 5})
    digests = []
    for name in ("one", "two"):
        hospital = Hospital(tmp_path / name, "simulation = true").joined(seeded)
        digests.append(digest_of(hospital.train(train_request(protocol=seeded), seeded).update))
    assert digests[0] == digests[1]
    unseeded = [
        digest_of(Hospital(tmp_path / name).joined().train(train_request()).update) for name in ("three", "four")
    ]
    assert unseeded[0] != unseeded[1]


def test_the_non_private_mode_is_recorded_as_such(tmp_path: Path) -> None:
    free = study(training={"mode": "none", "learning_rate": 0.5})
    hospital = Hospital(tmp_path / "anna", 'simulation = true\nmodes = ["none"]').joined(free)
    reply = hospital.train(train_request(protocol=free), free)
    assert update_norm(reply.update or {}) > RADIUS
    with Ledger(hospital.state / "ledger.sqlite", "anna") as ledger:
        assert [entry.event.type for entry in ledger.entries()] == ["UnboundedInfluence"]
