"""The channel at a hospital: who may ask for rows, what is spent on them, and that nothing else goes out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict

import client.handlers
import client.trainers.constrained
from client.trainers import RoundInputs
from common.audit import AUDIT_LOG, FIELDS, read_audit
from common.encoding import TableEncoding
from common.errors import LedgerError
from common.generation import check_rows
from common.messages import ReleaseReply, Status
from common.model.training import train_locally
from common.privacy.accountant import account_lines
from common.privacy.channel_release import role_slots
from common.privacy.events import ChannelRelease
from common.privacy.ledger import Ledger
from common.records import ARRAYS, HEADER, PROTOCOL_VERSION, values_digest
from common.study import Protocol
from common.table import Table, read_table
from tests.client.hospital import (
    PROTOCOL,
    ROUNDS,
    ROWS,
    SECRET,
    Hospital,
    join_request,
    release_request,
    study,
    train_request,
)

ASKED = 30
OPEN = "max_release_rows = 100"


def channel_study(**sections: dict[str, Any]) -> Protocol:
    channel = {"epsilon": 2.0} | sections.pop("channel", {})
    return study(release={"method": "channel", "rows": 80}, channel=channel, privacy={"delta": 1e-4}, **sections)


CHANNEL = channel_study()
ROLES = channel_study(channel={"release_share": 0.25})


def trained(folder: Path, protocol: Protocol = CHANNEL, policy: str = OPEN) -> Hospital:
    folder.mkdir(exist_ok=True)
    hospital = Hospital(folder / "anna", policy).joined(protocol)
    for number in range(1, ROUNDS + 1):
        assert hospital.train(train_request(number, protocol), protocol).status is Status.OK
    return hospital


def ask(hospital: Hospital, rows: int = ASKED, protocol: Protocol = CHANNEL, seed: int = 0) -> ReleaseReply:
    return hospital.release(release_request(protocol, rows, seed), protocol, rows)


def events(hospital: Hospital) -> list[Any]:
    with Ledger(hospital.state / "ledger.sqlite") as ledger:
        return [entry.event for entry in ledger.entries()]


def test_a_site_makes_rows_and_spends_them(tmp_path: Path) -> None:
    hospital = trained(tmp_path)
    reply = ask(hospital)
    assert reply.status is Status.OK and reply.rows is not None
    check_rows(Table(CHANNEL.schema, reply.rows))
    assert hospital.spends()[-1] == (ROUNDS + 1, values_digest(reply.rows))
    event = events(hospital)[-1]
    assert isinstance(event, ChannelRelease) and (event.rows, event.patients, event.role) == (ASKED, ROWS, "all")
    lines = account_lines(events(hospital), 1e-4)
    assert [line.unconditional for line in lines] == [True, False] and 1.9 < lines[1].epsilon <= 2.0
    assert reply.ledger_length == ROUNDS + 1


def test_a_repeated_request_gets_the_same_rows_and_spends_nothing(tmp_path: Path) -> None:
    hospital = trained(tmp_path)
    first, second = ask(hospital), ask(hospital)
    assert first.rows is not None and second.rows is not None
    assert first.rows.tobytes() == second.rows.tobytes() and len(hospital.spends()) == ROUNDS + 1
    assert ask(hospital, rows=ASKED - 1).status is Status.WRONG_ROUND
    assert ask(hospital, seed=1).status is Status.WRONG_ROUND
    assert len(hospital.spends()) == ROUNDS + 1


def test_fresh_rows_after_the_first_were_lost_are_no_resend(tmp_path: Path) -> None:
    """Fresh noise would be a new spend: the ledger holds the first one and refuses another."""
    hospital = trained(tmp_path)
    ask(hospital)
    (released,) = hospital.state.glob("studies/*/released.safetensors")
    content = released.read_bytes()
    released.unlink()
    assert ask(hospital).status is Status.LEDGER_FAILED
    released.write_bytes(content[:-9])
    assert ask(hospital).status is Status.STORAGE_FAILED


def test_nothing_goes_out_before_it_is_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hospital = trained(tmp_path)

    def fail(*arguments: Any) -> None:
        raise LedgerError("the disk is full")

    monkeypatch.setattr(Ledger, "record", fail)
    assert ask(hospital).status is Status.LEDGER_FAILED
    monkeypatch.undo()
    reply = ask(hospital)
    assert reply.rows is not None and hospital.spends()[-1] == (ROUNDS + 1, values_digest(reply.rows))


@pytest.mark.parametrize(
    ("policy", "status"),
    [("", Status.REFUSED_BY_POLICY), ("max_release_rows = 0", Status.REFUSED_BY_POLICY), (OPEN, Status.OK)],
)
def test_a_site_joins_such_a_study_only_if_its_policy_allows_rows(tmp_path: Path, policy: str, status: Status) -> None:
    assert Hospital(tmp_path / "anna", policy).join(join_request(CHANNEL)).status is status


def test_a_policy_limits_the_rows(tmp_path: Path) -> None:
    hospital = trained(tmp_path, policy=f"max_release_rows = {ASKED - 1}")
    assert ask(hospital).status is Status.REFUSED_BY_POLICY
    assert "max_release_rows is 29" in hospital.reason(Status.REFUSED_BY_POLICY)
    assert ask(hospital, rows=ASKED - 1).status is Status.OK


def test_what_the_study_does_not_plan_is_refused(tmp_path: Path) -> None:
    hospital = trained(tmp_path)
    assert ask(hospital, rows=81).status is Status.BAD_REQUEST
    other = Hospital(tmp_path / "berta").joined(PROTOCOL)
    assert other.release(release_request(PROTOCOL, 5), PROTOCOL, 5).status is Status.BAD_REQUEST
    unknown = channel_study(channel={"epsilon": 1.0})
    assert hospital.release(release_request(unknown, 5), unknown, 5).status is Status.UNKNOWN_STUDY
    assert len(hospital.spends()) == ROUNDS


def test_a_site_that_never_trained_has_no_encoder_but_can_fit_a_synthetic_one(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path / "anna", OPEN).joined(CHANNEL)
    assert ask(hospital).status is Status.WRONG_ROUND
    assert "no encoder" in hospital.reason(Status.WRONG_ROUND)
    protocol = channel_study(channel={"encoder": "synthetic"})
    hospital.joined(protocol)
    assert ask(hospital, protocol=protocol).status is Status.OK


def changed(change: Callable[[ConfigRecord, RecordDict], object]) -> RecordDict:
    record = release_request(CHANNEL, ASKED)
    change(record.config_records[HEADER], record)
    return record


@pytest.mark.parametrize(
    "change",
    [
        lambda header, record: header.update(version=PROTOCOL_VERSION + 1),
        lambda header, record: header.update(rows=0),
        lambda header, record: header.update(rows=True),
        lambda header, record: header.update(rows="30"),
        lambda header, record: header.update(epsilon=100.0),
        lambda header, record: header.pop("study"),
        lambda header, record: record.pop(ARRAYS),
        lambda header, record: record.pop(HEADER),
        lambda header, record: record.update({SECRET: ConfigRecord({})}),
    ],
)
def test_garbage(tmp_path: Path, change: Callable[[ConfigRecord, RecordDict], object]) -> None:
    hospital = Hospital(tmp_path / "anna", OPEN).joined(CHANNEL)
    reply = hospital.release(changed(change), CHANNEL, ASKED)
    assert reply.status is Status.BAD_REQUEST and reply.rows is None and not hospital.spends()


def test_patients_who_release_never_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def spy(inputs: RoundInputs, *, constrained: bool) -> Any:
        seen.append(inputs.data.inputs)
        return train_locally(inputs, constrained=constrained)

    monkeypatch.setattr(client.trainers.constrained, "train_locally", spy)
    hospital = trained(tmp_path, ROLES)
    everyone = TableEncoding(ROLES.schema).encode(read_table(hospital.data, ROLES.schema)[0]).inputs
    fit, release = role_slots(ROLES.digest, ROWS, 0.25)
    assert len(release) == ROWS // 4 and len(seen) == ROUNDS
    assert all(torch.equal(rows, everyone[torch.from_numpy(fit)]) for rows in seen)
    monkeypatch.undo()

    drawn: list[torch.Tensor] = []
    make = client.handlers.channel_rows
    monkeypatch.setattr(client.handlers, "channel_rows", lambda i: (drawn.append(i.data.inputs), make(i))[1])
    assert ask(hospital, protocol=ROLES).status is Status.OK
    assert torch.equal(drawn[0], everyone[torch.from_numpy(release)])
    event = events(hospital)[-1]
    assert (event.role, event.patients) == ("release", ROWS // 4)
    lines = {line.applies_to: line.epsilon for line in account_lines(events(hospital), 1e-4)}
    assert lines["fit patients"] == float("inf") and 1.9 < lines["release patients"] <= 2.0


def reorder(path: Path) -> None:
    header, first, second, *rest = path.read_text().splitlines()
    path.write_text("\n".join([header, second, first, *rest]) + "\n")


def shorten(path: Path) -> None:
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")


@pytest.mark.parametrize(
    ("protocol", "change", "status"),
    [
        (ROLES, reorder, Status.DATA_UNUSABLE),
        (ROLES, shorten, Status.DATA_UNUSABLE),
        (CHANNEL, shorten, Status.DATA_UNUSABLE),
        (CHANNEL, reorder, Status.OK),
    ],
)
def test_a_table_that_changes_during_the_study(
    tmp_path: Path, protocol: Protocol, change: Callable[[Path], None], status: Status
) -> None:
    hospital = trained(tmp_path, protocol)
    change(hospital.data)
    assert hospital.join(join_request(protocol)).status is status  # nor may it join again with another table
    assert ask(hospital, protocol=protocol).status is status
    hospital = Hospital(tmp_path / "berta", OPEN).joined(protocol)
    change(hospital.data)
    assert hospital.train(train_request(1, protocol), protocol).status is status


def test_a_share_that_leaves_a_role_empty_is_too_few_patients(tmp_path: Path) -> None:
    protocol = channel_study(channel={"release_share": 0.01})
    assert Hospital(tmp_path / "anna", OPEN).join(join_request(protocol)).status is Status.TOO_FEW_PATIENTS


def test_the_release_counts_against_the_limit_from_the_start(tmp_path: Path) -> None:
    """DP-SGD at ε = 3 and rows at ε = 2 compose to less than 5 and more than 3."""
    dpsgd = {"mode": "dpsgd", "rounds": 2}
    protocol = study(
        training=dpsgd,
        privacy={"epsilon": 3.0, "delta": 1e-4},
        release={"method": "channel", "rows": 80},
        channel={"epsilon": 2.0},
    )
    policy = f'modes = ["dpsgd"]\n{OPEN}\nmax_epsilon = '
    assert Hospital(tmp_path / "berta", policy + "3.0").join(join_request(protocol)).status is Status.REFUSED_BY_POLICY
    hospital = Hospital(tmp_path / "anna", policy + "5.0").joined(protocol)
    for number in (1, 2):
        assert hospital.train(train_request(number, protocol), protocol).status is Status.OK
    assert ask(hospital, protocol=protocol).status is Status.OK
    (line,) = account_lines(events(hospital), 1e-4)
    assert line.unconditional and 3.0 < line.epsilon <= 5.0
    stricter = Hospital.__new__(Hospital)
    stricter.__dict__ |= hospital.__dict__
    policy_now = hospital.config.policy.model_copy(update={"max_epsilon": 3.0})
    stricter.config = hospital.config.model_copy(update={"policy": policy_now})
    assert ask(stricter, protocol=protocol).status is Status.REFUSED_BY_POLICY


def test_a_seeded_simulation_repeats_itself(tmp_path: Path) -> None:
    protocol = replace_seed(CHANNEL)
    one, two = (
        ask(trained(tmp_path / name, protocol, f"{OPEN}\nsimulation = true"), protocol=protocol) for name in ("a", "b")
    )
    assert one.rows is not None and two.rows is not None and np.array_equal(one.rows, two.rows, equal_nan=True)


def replace_seed(protocol: Protocol) -> Protocol:
    section = protocol.study.study.model_copy(update={"seed": 3})
    return Protocol(protocol.study.model_copy(update={"study": section}), protocol.schema)


def test_the_log_counts_rows_and_shows_none(tmp_path: Path) -> None:
    hospital = trained(tmp_path)
    reply = ask(hospital)
    last = read_audit(hospital.state / AUDIT_LOG)[-1]
    assert last["action"] == "released" and last["rows"] == ASKED and set(last) == {*FIELDS, "rows", "seconds"}
    assert reply.rows is not None
    assert (last["study"], last["digest"]) == (CHANNEL.digest, values_digest(reply.rows))
