"""A hospital's answers to real Flower records: every status code from a real cause, and nothing else in any reply."""

import functools
import json
import resource
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import client.handlers
from client.app import app
from client.handlers import Site, pick_device
from client.site import SiteConfig, load_site
from client.state import load_state, save_state
from common.errors import SiteError
from common.messages import (
    ARRAYS,
    HEADER,
    JOIN,
    REPLY_FIELDS,
    TRAIN,
    JoinReply,
    JoinRequest,
    Status,
    TrainReply,
    TrainRequest,
    arrays_digest,
)
from common.privacy.accountant import account
from common.privacy.events import BoundedInfluence, GaussianUpdate
from common.privacy.ledger import GENESIS, Ledger
from common.privacy.ledger_keys import public_hex, sign_head
from common.privacy.update import update_norm
from common.schema import parse_schema
from common.study import Protocol, Study
from server.checkpoint import build_decoder

SECRET = "Zq7731"
MARKED = "61.7731"  # a number that stands for a patient: no reply and no log may hold it
ROWS, RADIUS, ROUNDS = 40, 0.5, 3
SCHEMA = {
    "fields": [
        {"name": "age", "type": "number", "constraints": {"minimum": 0, "maximum": 120}},
        {"name": "sex", "type": "string", "constraints": {"enum": ["f", "m"]}},
        {"name": "dead", "type": "boolean", "constraints": {"required": True}},
    ]
}


def table(rows: int = ROWS) -> str:
    random = np.random.default_rng(0)
    lines = [f"{MARKED},f,true"]
    for _ in range(rows - 1):
        age = random.uniform(20, 90)
        lines.append(f"{age:.1f},{'fm'[random.integers(2)]},{'true' if random.random() < age / 100 else 'false'}")
    return "\n".join(["age,sex,dead", *lines]) + "\n"


def study(**sections: dict[str, Any]) -> Protocol:
    document: dict[str, Any] = {
        "study": {"name": "s", "schema": "schema.json"},
        "model": {"latent_dim": 2, "hidden": [8], "decoder_lipschitz": 12.0},
        "training": {"rounds": ROUNDS, "batch_size": 16, "update_norm": RADIUS, "learning_rate": 0.05},
    }
    for name, values in sections.items():
        document[name] = document.get(name, {}) | values
    return Protocol(Study.model_validate(document), parse_schema(SCHEMA))


PROTOCOL = study()
COORDINATOR = Ed25519PrivateKey.generate()


def decoder_of(protocol: Protocol, seed: int = 0) -> dict[str, torch.Tensor]:
    return build_decoder(protocol, seed).arrays()


def join_request(protocol: Protocol = PROTOCOL) -> RecordDict:
    return JoinRequest(protocol.to_json()).to_record()


def train_request(number: int = 1, protocol: Protocol = PROTOCOL, seed: int = 0, weight: float = 0.25) -> RecordDict:
    return TrainRequest(protocol.digest, number, weight, decoder_of(protocol, seed)).to_record()


class Hospital:
    """A site on disk, every reply of which is checked on its way out, as the coordinator will receive it."""

    def __init__(self, folder: Path, policy: str = "", state: str = "state") -> None:
        folder.mkdir(exist_ok=True)
        (folder / "patients.csv").write_text(table())
        (folder / "site.toml").write_text(
            f'[site]\nname = "anna"\ndata = "patients.csv"\nstate = "{state}"\ndevice = "cpu"\nthreads = 1\n'
            f"[policy]\n{policy}\n"
        )
        self.folder = folder
        self.config: SiteConfig = load_site(folder / "site.toml")
        self.data, self.state = self.config.site.data, self.config.site.state

    @property
    def site(self) -> Site:
        return Site(self.config)  # a new one each time: a SuperNode may have been started anew

    def join(self, record: RecordDict) -> JoinReply:
        sent = self.site.join(record).to_record()
        self.inspect(JOIN, sent)
        return JoinReply.from_record(sent)

    def train(self, record: RecordDict, protocol: Protocol = PROTOCOL) -> TrainReply:
        sent = self.site.train(record).to_record()
        self.inspect(TRAIN, sent)
        return TrainReply.from_record(sent, {n: tuple(a.shape) for n, a in decoder_of(protocol).items()})

    def joined(self, protocol: Protocol = PROTOCOL) -> "Hospital":
        assert self.join(join_request(protocol)).status is Status.OK
        return self

    def inspect(self, kind: str, record: RecordDict) -> None:
        """Nothing but classified fields, known codes, and what the coordinator knows already."""
        allowed = REPLY_FIELDS[kind]
        assert set(record) <= {HEADER, ARRAYS}
        header = record.config_records[HEADER]
        assert set(header) <= set(allowed) - {"update"}
        status = Status(str(header["status"]))
        assert (ARRAYS in record) == (status is Status.OK and kind == TRAIN)
        if ARRAYS in record:
            assert "update" in allowed and set(record.array_records[ARRAYS]) == set(decoder_of(PROTOCOL))
        text = repr(dict(header))
        for forbidden in (SECRET, MARKED, "Error", "Traceback", str(self.folder), "patients.csv", "column"):
            assert forbidden not in text

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.state / "site.jsonl").read_text().splitlines()]

    def reason(self, status: Status) -> str:
        """What the site's own log says about its last answer, which was `status`."""
        last = self.log()[-1]
        assert (last["action"], last["status"]) == ("refused", status.value)
        text = (self.state / "site.jsonl").read_text()
        assert SECRET not in text and MARKED not in text
        return last["reason"]

    def spends(self) -> list[tuple[int, str]]:
        path = self.state / "ledger.sqlite"
        if not path.exists():
            return []
        with Ledger(path, "anna") as ledger:
            ledger.verify()
            return [(entry.round, entry.payload_digest) for entry in ledger.entries()]


@pytest.fixture
def hospital(tmp_path: Path) -> Hospital:
    return Hospital(tmp_path / "anna")


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def digest_of(update: Mapping[str, torch.Tensor] | None) -> str:
    assert update is not None
    return arrays_digest(update)


# ---------------------------------------------------------------- joining


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
        RecordDict({HEADER: ConfigRecord({"version": 1})}),
        RecordDict({HEADER: ConfigRecord({"version": 2, "protocol": "{}"})}),
        RecordDict({HEADER: ConfigRecord({"version": 1, "protocol": 5})}),
        RecordDict({HEADER: ConfigRecord({"version": 1, "protocol": f"{{{SECRET}"})}),
        RecordDict({HEADER: ConfigRecord({"version": 1, "protocol": "[]"})}),
        RecordDict({HEADER: ConfigRecord({"version": 1, "protocol": "{}", "path": "/etc/passwd"})}),
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


# ---------------------------------------------------------------- training


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
    for name, array in first.array_records[ARRAYS].items():
        other = again.array_records[ARRAYS][name]
        assert (array.data, array.dtype, array.shape, array.stype) == (
            other.data,
            other.dtype,
            other.shape,
            other.stype,
        )
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


def changed_request(change: Callable[[ConfigRecord, dict[str, Array]], None]) -> RecordDict:
    record = train_request()
    header, arrays = record.config_records[HEADER], dict(record.array_records[ARRAYS])
    change(header, arrays)
    return RecordDict({HEADER: header, ARRAYS: ArrayRecord(array_dict=arrays)})


def non_finite(value: float) -> Callable[[ConfigRecord, dict[str, Array]], None]:
    def change(header: ConfigRecord, arrays: dict[str, Array]) -> None:
        bias = arrays["network.layers.0.bias"].numpy().copy()
        bias[0] = value
        arrays["network.layers.0.bias"] = Array(bias)

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda header, arrays: header.update(version=2),
        lambda header, arrays: header.update(round=0),
        lambda header, arrays: header.update(round=True),
        lambda header, arrays: header.update(round="1"),
        lambda header, arrays: header.update(weight=0.0),
        lambda header, arrays: header.update(weight=1.5),
        lambda header, arrays: header.update(weight=float("nan")),
        lambda header, arrays: header.update(note=SECRET),
        lambda header, arrays: header.pop("study"),
        lambda header, arrays: arrays.pop("head.base"),
        lambda header, arrays: arrays.update(extra=Array(np.zeros(3, np.float32))),
        lambda header, arrays: arrays.update({"head.base": Array(np.zeros(3, np.float32))}),
        lambda header, arrays: arrays.update({"head.base": Array(arrays["head.base"].numpy().astype(np.float64))}),
        non_finite(np.nan),
        non_finite(np.inf),
    ],
)
def test_a_garbage_request(hospital: Hospital, change: Callable[[ConfigRecord, dict[str, Array]], None]) -> None:
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
    signed = (length, head, signature, public_hex(COORDINATOR))
    return TrainRequest(PROTOCOL.digest, number, 0.25, decoder_of(PROTOCOL), *signed).to_record()


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
    (hospital.state / "site.jsonl").mkdir(parents=True)
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


# ---------------------------------------------------------------- the budget


def noisy(name: str = "s", max_epsilon: float | None = None, **training: Any) -> Protocol:
    """A study whose three rounds cost ε = ONE."""
    privacy: dict[str, Any] = {"update_noise": NOISE, "accept_useless_noise": True}
    if max_epsilon is not None:
        privacy["max_epsilon"] = max_epsilon
    return study(study={"name": name}, privacy=privacy, training=training)


NOISE = 4.0
ONE, TWO = (  # one such study, and two
    account([GaussianUpdate(n, RADIUS, NOISE, 1.0) for n in range(ROUNDS * k)], 1e-5).epsilon for k in (1, 2)
)


def test_without_a_limit_an_infinite_epsilon_is_accepted_and_logged(hospital: Hospital) -> None:
    hospital.joined()
    assert hospital.log()[-1]["epsilon"] == "infinity"
    hospital.joined(noisy())
    assert hospital.log()[-1]["epsilon"] == pytest.approx(ONE) and hospital.log()[-1]["delta"] == 1e-5


@pytest.mark.parametrize(
    ("protocol", "policy"),
    [
        (study(privacy={"max_epsilon": 1e6}), ""),
        (PROTOCOL, "max_epsilon = 1e6"),
        (noisy(max_epsilon=ONE * 0.999), ""),
        (noisy(), f"max_epsilon = {ONE * 0.999}"),
        (noisy(max_epsilon=ONE * 0.999), "max_epsilon = 1e6"),  # the stricter of the two
        (noisy(max_epsilon=1e6), f"max_epsilon = {ONE * 0.999}"),
    ],
)
def test_a_schedule_that_would_overspend_is_refused_before_it_starts(
    tmp_path: Path, protocol: Protocol, policy: str
) -> None:
    hospital = Hospital(tmp_path / "anna", policy)
    assert hospital.join(join_request(protocol)) == JoinReply(Status.REFUSED_BY_POLICY, "anna")
    reason = hospital.reason(Status.REFUSED_BY_POLICY)
    assert "the whole schedule would reach epsilon = " in reason and "more than the budget of" in reason
    assert ("infinity" if protocol.study.privacy.update_noise == 0 else f"{ONE:.4g}") in reason
    assert hospital.train(train_request(protocol=protocol), protocol).status is Status.UNKNOWN_STUDY
    assert hospital.spends() == []


def test_a_schedule_within_the_limit_runs_to_its_end_and_no_further(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path / "anna", f"max_epsilon = {ONE * 1.001}")
    protocol = noisy()
    hospital.joined(protocol)
    for number in range(1, ROUNDS + 1):
        assert hospital.train(train_request(number, protocol), protocol).status is Status.OK
        hospital.joined(protocol)  # joining again in the middle counts nothing twice
    assert len(hospital.spends()) == ROUNDS
    longer = noisy("longer", rounds=1)
    assert hospital.join(join_request(longer)).status is Status.REFUSED_BY_POLICY
    assert f"spent so far: {ONE:.4g}" in hospital.reason(Status.REFUSED_BY_POLICY)


def test_all_studies_of_a_site_share_its_limit(tmp_path: Path) -> None:
    limit = (ONE + TWO) / 2  # room for one study, not for two
    hospital = Hospital(tmp_path / "anna", f"max_epsilon = {limit}")
    first, second = noisy("first"), noisy("second")
    hospital.joined(first).joined(second)  # nothing is spent yet, so each fits
    answers: list[Status] = []
    for number in range(1, ROUNDS + 1):
        for protocol in (first, second):
            answers.append(hospital.train(train_request(number, protocol), protocol).status)
    # The first spend of one leaves too little room for the whole of the other.
    assert set(answers) == {Status.OK, Status.REFUSED_BY_POLICY} and answers.count(Status.OK) == len(hospital.spends())
    with Ledger(hospital.state / "ledger.sqlite") as ledger:
        assert account([entry.event for entry in ledger.entries()], 1e-5).epsilon <= limit
        assert ledger.verify()[0] == answers.count(Status.OK)


def test_a_limit_that_became_stricter_holds_for_the_next_round(hospital: Hospital) -> None:
    protocol = noisy()
    assert hospital.joined(protocol).train(train_request(1, protocol), protocol).status is Status.OK
    policy = hospital.config.policy.model_copy(update={"max_epsilon": ONE * 0.999})
    hospital.config = hospital.config.model_copy(update={"policy": policy})
    assert hospital.train(train_request(2, protocol), protocol).status is Status.REFUSED_BY_POLICY
    assert len(hospital.spends()) == 1 and [e["action"] for e in hospital.log()].count("trained") == 1


def test_a_delta_that_would_expose_patients_is_refused(hospital: Hospital) -> None:
    too_large = study(privacy={"delta": 1.01 / (10 * ROWS)})
    assert hospital.join(join_request(too_large)) == JoinReply(Status.REFUSED_BY_POLICY, "anna")
    reason = hospital.reason(Status.REFUSED_BY_POLICY)
    assert "is too large" in reason and f"{ROWS} patients of site 'anna'" in reason
    # n^-1.5 lies above 1/(10 n) below a hundred patients, so a warning needs more of them.
    hospital.joined(study(privacy={"delta": 0.99 / (10 * ROWS)}))
    assert not [entry for entry in hospital.log() if entry["action"] == "warning"]
    hospital.data.write_text(table(150))
    hospital.joined(study(privacy={"delta": 1.01 * 150**-1.5}))
    (warning,) = [entry for entry in hospital.log() if entry["action"] == "warning"]
    assert "is large: delta * n = " in warning["reason"] and "150 patients" in warning["reason"]


# ---------------------------------------------------------------- the device, and the ClientApp around it


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(SiteError, match="finds no such device"):
        pick_device(f"cuda:{torch.cuda.device_count()}")


def test_a_device_that_is_not_there(hospital: Hospital) -> None:
    hospital.joined()
    site = hospital.config.site.model_copy(update={"device": f"cuda:{torch.cuda.device_count()}"})
    hospital.config = hospital.config.model_copy(update={"site": site})
    assert hospital.train(train_request()).status is Status.SITE_MISCONFIGURED
    assert "finds no such device" in hospital.reason(Status.SITE_MISCONFIGURED)


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower stamps every message with the task it was made in."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def deliver(kind: str, record: RecordDict, **node_config: str | int) -> RecordDict:
    context = Context(run_id=1, node_id=2, node_config=dict(node_config), state=RecordDict({}), run_config={})
    return app(Message(content=record, dst_node_id=2, message_type=kind), context).content


def test_the_client_app_answers_for_the_site_of_its_node(hospital: Hospital) -> None:
    configured = {"site-config": str(hospital.folder / "site.toml")}
    joined = deliver(JOIN, join_request(), **configured)
    hospital.inspect(JOIN, joined)
    assert JoinReply.from_record(joined).patients == ROWS
    trained = deliver(TRAIN, train_request(), **configured)
    hospital.inspect(TRAIN, trained)
    assert len(hospital.spends()) == 1


@pytest.mark.parametrize("text", [None, "[site\n", f'[site]\nname = "{SECRET}"\n'])
def test_a_node_without_a_usable_site_says_so_and_no_more(
    hospital: Hospital, text: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COHORTIUM_SIMULATION", raising=False)
    path = hospital.folder / "site.toml"
    path.unlink() if text is None else path.write_text(text)
    for kind, request in ((JOIN, join_request()), (TRAIN, train_request())):
        reply = deliver(kind, request, **{"site-config": str(path)})
        hospital.inspect(kind, reply)
        assert reply.config_records[HEADER]["status"] == "site-misconfigured"
        assert "site.toml" in capsys.readouterr().err
    reply = deliver(JOIN, join_request())
    assert reply.config_records[HEADER]["status"] == "site-misconfigured"
    assert "no site configuration" in capsys.readouterr().err


def test_a_simulated_node_finds_its_site_by_its_number(
    hospital: Hospital, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = tmp_path / "sites.json"
    listing.write_text(json.dumps(["/nowhere/site.toml", str(hospital.folder / "site.toml")]))
    monkeypatch.setenv("COHORTIUM_SIMULATION", str(listing))
    partition = {"partition-id": 1, "num-partitions": 2}
    assert JoinReply.from_record(deliver(JOIN, join_request(), **partition)).site == "anna"
    elsewhere = deliver(JOIN, join_request(), **{"partition-id": 0})
    assert JoinReply.from_record(elsewhere).status is Status.SITE_MISCONFIGURED
