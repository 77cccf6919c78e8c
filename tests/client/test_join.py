"""Joining: every status code from a real cause, and nothing else in any reply."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from common.messages import (
    JoinReply,
    JoinRequest,
    Status,
    TrainReply,
)
from common.privacy.ledger import GENESIS, Ledger
from common.records import HEADER, PROTOCOL_VERSION
from common.study import Protocol
from tests.client.hospital import (
    PROTOCOL,
    ROWS,
    SECRET,
    Hospital,
    join_request,
    study,
    table,
    train_request,
)


def test_joining_declares_the_patients_and_keeps_the_protocol(hospital: Hospital) -> None:
    reply = hospital.join(join_request())
    with Ledger(hospital.state / "ledger.sqlite") as ledger:
        head = ledger.head()
    signed = (0, GENESIS, head.signature, head.key)
    assert reply == JoinReply(Status.OK, "anna", PROTOCOL.digest, ROWS, *signed) and head.holds
    kept = json.loads((hospital.state / "studies" / PROTOCOL.digest[:32] / "protocol.json").read_text())
    assert Protocol.from_json(kept).digest == PROTOCOL.digest
    assert hospital.log()[-1]["action"] == "joined" and hospital.spends() == []


@pytest.mark.parametrize(
    ("protocol", "policy", "expected"),
    [
        (study(training={"mode": "none"}), "", "mode 'none'"),
        (study(study={"seed": 1}), "", "fixes a seed"),
        (study(training={"update_norm": 11.0}), "", "update_norm 11"),
        (PROTOCOL, "max_update_norm = 0.1", "update_norm 0.5 exceeds"),
        (study(sites={"berta": 10}), "", "'anna' is not among them"),
    ],
)
def test_the_policy_refuses(tmp_path: Path, protocol: Protocol, policy: str, expected: str) -> None:
    hospital = Hospital(tmp_path / "anna", policy)
    assert hospital.join(join_request(protocol)) == JoinReply(Status.REFUSED_BY_POLICY, "anna")
    assert expected in hospital.reason(Status.REFUSED_BY_POLICY)
    assert hospital.train(train_request(protocol=protocol), protocol).status is Status.UNKNOWN_STUDY


def spoil_cell(column: int, text: str) -> Callable[[Path], None]:
    def spoil(data: Path) -> None:
        lines = data.read_text().splitlines()
        cells = lines[7].split(",")
        cells[column] = text
        lines[7] = ",".join(cells)
        data.write_text("\n".join(lines) + "\n")

    return spoil


UNUSABLE = [
    pytest.param(lambda data: data.unlink(), "patients.csv: cannot be read", id="missing file"),
    pytest.param(lambda data: (data.unlink(), data.mkdir()), "cannot be read", id="a folder"),
    pytest.param(lambda data: data.write_text("age,sex\n61,f\n"), "column 'dead' is missing", id="missing column"),
    pytest.param(lambda data: data.write_text("age,sex,dead\n"), "no data rows", id="no rows"),
    pytest.param(lambda data: data.write_text(f"{SECRET}\n{SECRET}\n"), "no column of the schema", id="no header"),
    pytest.param(spoil_cell(1, SECRET), "column 'sex': 1 value(s) are not one of the declared", id="unknown category"),
    pytest.param(spoil_cell(0, SECRET), "column 'age': 1 value(s) are not finite numbers", id="text in a number"),
    pytest.param(spoil_cell(2, ""), "column 'dead': 1 missing value(s) in a required", id="missing required"),
    pytest.param(spoil_cell(0, f"1,{SECRET}"), "1 row(s) have more or fewer fields", id="ragged"),
    pytest.param(spoil_cell(0, f'"{SECRET}'), "not a well-formed CSV", id="broken quotes"),
    pytest.param(lambda data: data.write_bytes(b"age,sex,dead\n61,\xff,true\n"), "not UTF-8", id="not UTF-8"),
]


@pytest.mark.parametrize(("spoil", "expected"), UNUSABLE)
def test_unusable_data(hospital: Hospital, spoil: Callable[[Path], None], expected: str) -> None:
    spoil(hospital.data)
    assert hospital.join(join_request()) == JoinReply(Status.DATA_UNUSABLE, "anna")
    assert expected in hospital.reason(Status.DATA_UNUSABLE)


@pytest.mark.parametrize(("spoil", "expected"), UNUSABLE[:7])
def test_data_that_become_unusable_between_rounds(
    hospital: Hospital, spoil: Callable[[Path], None], expected: str
) -> None:
    assert hospital.joined().train(train_request(1)).status is Status.OK
    spoil(hospital.data)
    reply = hospital.train(train_request(2))
    assert reply == TrainReply(Status.DATA_UNUSABLE, "anna", PROTOCOL.digest, 2)
    assert expected in hospital.reason(Status.DATA_UNUSABLE) and hospital.log()[-1]["round"] == 2
    assert [number for number, _ in hospital.spends()] == [1]
    hospital.data.unlink() if hospital.data.is_file() else shutil.rmtree(hospital.data, ignore_errors=True)
    hospital.data.write_text(table())
    assert hospital.train(train_request(2)).status is Status.OK


def test_out_of_bounds_values_under_the_policy_refuse(tmp_path: Path) -> None:
    strict = Hospital(tmp_path / "strict", 'out_of_bounds = "refuse"')
    spoil_cell(0, "777")(strict.data)
    assert strict.join(join_request()).status is Status.DATA_UNUSABLE
    assert "1 above the maximum (data rows 7)" in strict.reason(Status.DATA_UNUSABLE)
    mild = Hospital(tmp_path / "mild")
    spoil_cell(0, "777")(mild.data)
    assert mild.join(join_request()).status is Status.OK


def test_too_few_patients(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path / "anna", f"min_patients = {ROWS + 1}")
    assert hospital.join(join_request()) == JoinReply(Status.TOO_FEW_PATIENTS, "anna")
    assert f"at least {ROWS + 1}" in hospital.reason(Status.TOO_FEW_PATIENTS)
    lenient = Hospital(tmp_path / "berta")
    asked = study(release={"min_patients_per_site": ROWS + 1})
    assert lenient.join(join_request(asked)).status is Status.TOO_FEW_PATIENTS
    assert lenient.join(join_request(study(release={"min_patients_per_site": ROWS}))).status is Status.OK


def test_another_number_of_patients_than_declared(hospital: Hospital) -> None:
    assert hospital.join(join_request(study(sites={"anna": ROWS + 1}))).status is Status.DATA_UNUSABLE
    assert f"declares {ROWS + 1} patients" in hospital.reason(Status.DATA_UNUSABLE)
    assert hospital.join(join_request(study(sites={"anna": ROWS}))).status is Status.OK


def changed_protocol(**values: Any) -> RecordDict:
    document = PROTOCOL.to_json()
    return JoinRequest(document | values).to_record()


@pytest.mark.parametrize(
    "record",
    [
        RecordDict({}),
        RecordDict({HEADER: MetricRecord({"version": 1})}),
        RecordDict({HEADER: ConfigRecord({"version": PROTOCOL_VERSION})}),
        RecordDict({HEADER: ConfigRecord({"version": PROTOCOL_VERSION + 1, "protocol": "{}"})}),
        RecordDict({HEADER: ConfigRecord({"version": PROTOCOL_VERSION, "protocol": 5})}),
        RecordDict({HEADER: ConfigRecord({"version": PROTOCOL_VERSION, "protocol": f"{{{SECRET}"})}),
        RecordDict({HEADER: ConfigRecord({"version": PROTOCOL_VERSION, "protocol": "[]"})}),
        RecordDict({HEADER: ConfigRecord({"version": PROTOCOL_VERSION, "protocol": "{}", "path": "/etc/passwd"})}),
        changed_protocol(study=None),
        changed_protocol(study={"study": {"name": "s"}}),
        changed_protocol(schema={"fields": []}),
        changed_protocol(schema=None),
        train_request(),
    ],
)
def test_a_garbage_invitation(hospital: Hospital, record: RecordDict) -> None:
    assert hospital.join(record) == JoinReply(Status.BAD_REQUEST, "anna")
    assert hospital.reason(Status.BAD_REQUEST)
    assert not (hospital.state / "studies").exists()


def test_joining_where_nothing_can_be_written(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path / "anna", state="file/state")
    (tmp_path / "anna" / "file").write_text("")
    assert hospital.join(join_request()) == JoinReply(Status.LEDGER_FAILED, "anna")
    ready = Hospital(tmp_path / "berta").joined(study(study={"name": "other"}))
    shutil.rmtree(ready.state / "studies")
    (ready.state / "studies").write_text("")
    assert ready.join(join_request()) == JoinReply(Status.STORAGE_FAILED, "anna")
