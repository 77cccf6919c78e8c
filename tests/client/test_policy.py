"""What a site withholds, the floor of its counts, and the memory it gives: whatever the coordinator asks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import client.memory
from client.admission import RefusedError
from client.memory import memory_limit, needed_mb
from client.patients import load_patients
from client.policy import PolicySection
from client.trainers.constrained import ConstrainedTrainer
from common.messages import JoinReply, Status
from common.study import Protocol
from tests.client.hospital import (
    MARKED,
    PROTOCOL,
    ROWS,
    SCHEMA,
    SECRET,
    Hospital,
    digest_of,
    join_request,
    study,
    table,
    train_request,
)


def refused(hospital: Hospital, status: Status = Status.REFUSED_BY_POLICY, protocol: Protocol = PROTOCOL) -> str:
    assert hospital.join(join_request(protocol)) == JoinReply(status, "anna")
    return hospital.reason(status)


@pytest.mark.parametrize("name", ["age", "AGE", " age "])
def test_nothing_of_a_withheld_column_enters_training(tmp_path: Path, name: str) -> None:
    seeded = study(study={"seed": 5})
    policy = f'simulation = true\nwithheld_columns = ["{name}"]'
    withholding = Hospital(tmp_path / "withholding", policy).joined(seeded)
    first = withholding.train(train_request(1, seeded), seeded)
    # The same updates as of a hospital whose file has no age at all, and whose policy withholds nothing.
    empty = Hospital(tmp_path / "empty", "simulation = true")
    lines = empty.data.read_text().splitlines()
    empty.data.write_text("\n".join([lines[0], *("," + line.split(",", 1)[1] for line in lines[1:])]) + "\n")
    assert digest_of(first.update) == digest_of(empty.joined(seeded).train(train_request(1, seeded), seeded).update)
    full = Hospital(tmp_path / "full", "simulation = true").joined(seeded)
    assert digest_of(first.update) != digest_of(full.train(train_request(1, seeded), seeded).update)


def test_a_withheld_column_need_not_be_there_and_is_not_even_read(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path / "anna", 'withheld_columns = ["age"]\nout_of_bounds = "refuse"')
    hospital.data.write_text(hospital.data.read_text().replace(MARKED, SECRET))  # unusable, were it read
    hospital.joined()
    lines = [line.split(",", 1)[1] for line in hospital.data.read_text().splitlines()]
    hospital.data.write_text("\n".join(lines) + "\n")
    hospital.joined()


def test_what_is_withheld_later_is_withheld_from_the_next_round(hospital: Hospital) -> None:
    seen = load_patients(hospital.joined().config, PROTOCOL)
    policy = hospital.config.policy.model_copy(update={"withheld_columns": ("age",)})
    hospital.config = hospital.config.model_copy(update={"policy": policy})
    kept = load_patients(hospital.config, PROTOCOL)
    assert not np.array_equal(seen.inputs.numpy(), kept.inputs.numpy())
    assert hospital.train(train_request(1)).status is Status.OK


def test_a_required_column_cannot_be_withheld(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path / "anna", 'withheld_columns = ["age", "dead"]')
    reason = refused(hospital)
    assert "column 'dead' is required by the study" in reason and "'age'" not in reason


def test_a_study_without_any_column_left_is_refused(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path / "anna", 'withheld_columns = ["age", "sex", "dead"]')
    fields = [dict(field) for field in SCHEMA["fields"]]
    fields[2].pop("constraints")
    document = PROTOCOL.to_json() | {"schema": {"fields": fields}}
    assert "every column of the study" in refused(
        hospital, protocol=Protocol.from_json(json.loads(json.dumps(document)))
    )


def test_a_withheld_name_that_no_study_column_has_is_logged(tmp_path: Path) -> None:
    Hospital(tmp_path / "anna", 'withheld_columns = ["Age", "agee"]').joined()
    log = Hospital(tmp_path / "anna").log()
    (warning,) = [entry["reason"] for entry in log if entry["action"] == "warning"]
    assert warning == "withheld_columns names no column of this study: 'agee'"


@pytest.mark.parametrize(
    ("policy", "rows", "least"),
    [
        ("min_patients = 1", 10, 11),
        ("min_patients = 1\nmin_count = 13", 12, 13),
        ("min_patients = 15\nmin_count = 11", 14, 15),
        ("", 19, 20),
    ],
)
def test_no_count_below_the_floor_leaves(tmp_path: Path, policy: str, rows: int, least: int) -> None:
    hospital = Hospital(tmp_path / "anna", policy)
    hospital.data.write_text(table(rows))
    reply = hospital.join(join_request(study(privacy={"delta": 1e-9})))
    assert reply == JoinReply(Status.TOO_FEW_PATIENTS, "anna") and reply.patients == 0
    assert f"at least {least} are needed" in hospital.reason(Status.TOO_FEW_PATIENTS)
    hospital.data.write_text(table(least))
    assert hospital.join(join_request(study(privacy={"delta": 1e-9}))).patients == least


WIDE = study(model={"hidden": [4096, 4096]})


def test_a_study_that_needs_too_much_memory_is_refused_with_the_numbers(tmp_path: Path) -> None:
    needed = needed_mb(WIDE, ROWS)
    assert needed > 1000 > needed_mb(PROTOCOL, ROWS)
    hospital = Hospital(tmp_path / "anna", f"max_memory_mb = {needed - 1}")
    reason = refused(hospital, protocol=WIDE)
    assert f"need about {needed} MiB, max_memory_mb is {needed - 1}" in reason and f"{ROWS} patients" in reason
    hospital.joined().train(train_request(1))
    assert Hospital(tmp_path / "berta", f"max_memory_mb = {needed}").join(join_request(WIDE)).status is Status.OK


def test_a_limit_that_became_smaller_holds_for_the_next_round(
    hospital: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hospital.joined().train(train_request(1)).status is Status.OK
    monkeypatch.setattr(client.memory, "needed_mb", lambda *_: 501)
    policy = hospital.config.policy.model_copy(update={"max_memory_mb": 500})
    hospital.config = hospital.config.model_copy(update={"policy": policy})
    assert hospital.train(train_request(2)).status is Status.REFUSED_BY_POLICY
    assert "need about 501 MiB" in hospital.reason(Status.REFUSED_BY_POLICY) and len(hospital.spends()) == 1


def test_training_that_takes_more_than_the_limit_ends_without_a_spend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital = Hospital(tmp_path / "anna", "max_memory_mb = 300").joined()
    train = ConstrainedTrainer.train

    def greedy(self: ConstrainedTrainer, inputs: object) -> object:
        torch.zeros(200 * 2**20)  # 800 MiB
        return train(self, inputs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(ConstrainedTrainer, "train", greedy)
    assert hospital.train(train_request(1)).status is Status.REFUSED_BY_POLICY
    assert "more than max_memory_mb = 300" in hospital.reason(Status.REFUSED_BY_POLICY) and hospital.spends() == []
    monkeypatch.undo()
    assert hospital.train(train_request(1)).status is Status.OK


def test_the_limit_holds_for_python_too_and_is_lifted_afterwards() -> None:
    policy = PolicySection(max_memory_mb=100)
    with pytest.raises(RefusedError, match="max_memory_mb = 100"), memory_limit(policy):
        bytearray(400 * 2**20)
    assert len(bytearray(400 * 2**20)) > 0
    with pytest.raises(RuntimeError, match="another"), memory_limit(policy):
        raise RuntimeError("another error")
    with memory_limit(PolicySection()):
        assert len(bytearray(400 * 2**20)) > 0


def test_the_estimate_grows_with_patients_weights_and_batch() -> None:
    assert needed_mb(PROTOCOL, 10_000_000) > 100 + needed_mb(PROTOCOL, 10_000)
    assert needed_mb(WIDE, ROWS) > needed_mb(PROTOCOL, ROWS)
    large = study(training={"batch_size": 100_000})
    assert needed_mb(large, 100_000) > needed_mb(PROTOCOL, 100_000)
