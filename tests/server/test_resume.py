"""A study that breaks off anywhere and is resumed: the same result, and no site pays twice.

The real ServerApp's steps and the real sites, without Flower's processes between them.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity
from safetensors.numpy import load_file

from client.handlers import Site
from client.site import load_site
from common.errors import FederationError, OutputError
from common.messages import JOIN, TRAIN
from common.privacy.ledger import Ledger
from common.schema import parse_schema
from common.study import Protocol, Study
from server.app import run_study
from server.run import RunFiles, RunSettings

SITES = {"anna": 60, "berta": 40, "clara": 50}
ROUNDS = 4
KEY = Ed25519PrivateKey.generate()
SCHEMA = {
    "fields": [
        {"name": "age", "type": "number", "constraints": {"minimum": 0, "maximum": 120}},
        {"name": "dead", "type": "boolean", "constraints": {"required": True}},
    ]
}


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class CutOffError(Exception):
    """The machine of the coordinator goes dark."""


class Hospitals:
    """Flower's grid with real sites behind it. `cut(kind, round, site)` true: it goes dark after that site's answer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cut: Callable[[str, int, str], bool] = lambda kind, number, site: False
        self.away: set[str] = set()
        self.nodes = {name: 100 + i for i, name in enumerate(SITES)}
        for name, rows in SITES.items():
            (folder / name).mkdir(parents=True)
            random = np.random.default_rng(rows)
            lines = [
                f"{random.uniform(20, 90):.1f},{'true' if random.random() < 0.4 else 'false'}" for _ in range(rows)
            ]
            (folder / name / "patients.csv").write_text("\n".join(["age,dead", *lines]) + "\n")
            (folder / name / "site.toml").write_text(
                f'[site]\nname = "{name}"\ndata = "patients.csv"\nstate = "state"\ndevice = "cpu"\n'
                "[policy]\nsimulation = true\nmax_release_rows = 1000\n"
            )

    def get_node_ids(self) -> list[int]:
        return [node for name, node in self.nodes.items() if name not in self.away]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        names = {node: name for name, node in self.nodes.items()}
        replies = []
        for message in messages:
            name = names.get(message.metadata.dst_node_id, "")
            if not name or name in self.away:
                continue
            site, kind = Site(load_site(self.folder / name / "site.toml")), message.metadata.message_type
            answer = {JOIN: site.join, TRAIN: site.train}.get(kind, site.release)(message.content)
            replies.append(Message(answer.to_record(), reply_to=message))
            if self.cut(kind, int(getattr(answer, "round", 0)), name):
                raise CutOffError
        return replies

    def ledger(self, name: str) -> list[int]:
        with Ledger(self.folder / name / "state" / "ledger.sqlite") as ledger:
            ledger.verify()
            return [entry.round for entry in ledger.entries()]


def make_protocol(min_sites: int = 2, **release: Any) -> Protocol:
    channel = {"channel": {"epsilon": 3.0}} if release else {}
    study: dict[str, Any] = {
        "study": {"name": "s", "schema": "schema.json", "seed": 5},
        "model": {"latent_dim": 2, "hidden": [8], "decoder_lipschitz": 12.0},
        "training": {
            "rounds": ROUNDS,
            "batch_size": 16,
            "local_epochs": 1,
            "min_sites": min_sites,
            "join_timeout": 0.5,
        },
        "privacy": {"delta": 1e-4},
        "release": {"rows": 60} | release,
    }
    return Protocol(Study.model_validate(study | channel), parse_schema(SCHEMA))


def run(hospitals: Hospitals, out: Path, protocol: Protocol, *, resume: bool = False) -> RunFiles:
    out.mkdir(exist_ok=True)
    grid: Any = hospitals
    files = RunFiles(out)
    run_study(grid, RunSettings(protocol, out, len(SITES), simulation=True, resume=resume), files, KEY)
    return files


def result(files: RunFiles) -> tuple[dict[str, np.ndarray], list[dict[str, Any]], str]:
    rounds = [json.loads(line) for line in files.rounds.read_text().splitlines()]
    kept = [{key: r[key] for key in ("round", "answered", "certificate", "step_norm")} for r in rounds]
    return load_file(files.decoder), kept, files.cohort_csv.read_text()


def same(one: tuple[Any, ...], two: tuple[Any, ...]) -> bool:
    arrays = all(np.array_equal(one[0][name], two[0][name]) for name in one[0])
    return arrays and one[1:] == two[1:]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """What an undisturbed study gives."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_run_id", "_node_id", "_task_id"):
            patch.setattr(TaskIdentity, name, 1)
        folder = tmp_path_factory.mktemp("whole")
        return result(run(Hospitals(folder / "sites"), folder / "out", make_protocol()))


@pytest.mark.parametrize(
    ("number", "site"), [(1, "anna"), (1, "clara"), (2, "berta"), (3, "clara"), (ROUNDS, "anna"), (ROUNDS, "clara")]
)
def test_a_study_cut_off_in_a_round_ends_as_if_nothing_had_been(
    tmp_path: Path, whole: tuple[Any, ...], number: int, site: str
) -> None:
    hospitals = Hospitals(tmp_path / "sites")
    hospitals.cut = lambda kind, at, name: kind == TRAIN and (at, name) == (number, site)
    with pytest.raises(CutOffError):
        run(hospitals, tmp_path / "out", make_protocol())
    hospitals.cut = lambda *where: False
    files = run(hospitals, tmp_path / "out", make_protocol(), resume=True)
    assert same(result(files), whole)
    assert all(hospitals.ledger(name) == list(range(1, ROUNDS + 1)) for name in SITES)


@pytest.mark.parametrize("torn", ["missing line", "torn line"])
def test_a_coordinator_that_died_between_checkpoint_and_report(
    tmp_path: Path, whole: tuple[Any, ...], torn: str
) -> None:
    hospitals = Hospitals(tmp_path / "sites")
    hospitals.cut = lambda kind, at, name: kind == TRAIN and (at, name) == (3, "anna")
    with pytest.raises(CutOffError):
        run(hospitals, tmp_path / "out", make_protocol())
    rounds = RunFiles(tmp_path / "out").rounds
    lines = rounds.read_text().splitlines(keepends=True)
    rounds.write_text(lines[0] + ("" if torn == "missing line" else lines[1][:20]))
    hospitals.cut = lambda *where: False
    assert same(result(run(hospitals, tmp_path / "out", make_protocol(), resume=True)), whole)


def test_a_study_cut_off_while_sites_join_begins_anew(tmp_path: Path, whole: tuple[Any, ...]) -> None:
    hospitals = Hospitals(tmp_path / "sites")
    hospitals.cut = lambda kind, at, name: kind == JOIN and name == "berta"
    with pytest.raises(CutOffError):
        run(hospitals, tmp_path / "out", make_protocol())
    hospitals.cut = lambda *where: False
    assert same(result(run(hospitals, tmp_path / "out", make_protocol(), resume=True)), whole)


def test_a_finished_study_cut_off_in_its_release_pays_for_the_rows_once(tmp_path: Path) -> None:
    protocol = make_protocol(method="channel")
    hospitals = Hospitals(tmp_path / "sites")
    hospitals.cut = lambda kind, at, name: kind not in (JOIN, TRAIN) and name == "berta"
    with pytest.raises(CutOffError):
        run(hospitals, tmp_path / "out", protocol)
    hospitals.cut = lambda *where: False
    files = run(hospitals, tmp_path / "out", protocol, resume=True)
    assert len(files.cohort_csv.read_text().splitlines()) == 61
    assert all(hospitals.ledger(name) == list(range(1, ROUNDS + 2)) for name in SITES)


def test_a_site_that_is_away_keeps_its_weight_and_may_return(tmp_path: Path) -> None:
    hospitals = Hospitals(tmp_path / "sites")
    hospitals.cut = lambda kind, at, name: kind == TRAIN and (at, name) == (2, "clara")
    with pytest.raises(CutOffError):
        run(hospitals, tmp_path / "out", make_protocol())
    hospitals.cut = lambda *where: False
    hospitals.away = {"berta"}

    def back(kind: str, at: int, name: str) -> bool:
        hospitals.away -= {"berta"} if (kind, at, name) == (TRAIN, 3, "clara") else set()
        return False

    hospitals.cut = back
    files = run(hospitals, tmp_path / "out", make_protocol(), resume=True)
    rounds = [json.loads(line) for line in files.rounds.read_text().splitlines()]
    assert [r["dropped"].get("berta", "") for r in rounds] == ["", *["no reply before the deadline"] * 2, ""]
    assert hospitals.ledger("berta") == [1, 2, 4]  # round 2 was spent before the cut and its reply lost
    weights = json.loads(files.sites.read_text())["joined"]
    assert {name: site["patients"] for name, site in weights.items()} == SITES


def test_nobody_joins_a_study_that_has_begun(tmp_path: Path) -> None:
    hospitals = Hospitals(tmp_path / "sites")
    hospitals.away = {"clara"}
    hospitals.cut = lambda kind, at, name: kind == TRAIN and (at, name) == (2, "berta")
    with pytest.raises(CutOffError):
        run(hospitals, tmp_path / "out", make_protocol())
    hospitals.cut, hospitals.away = lambda *where: False, set()
    files = run(hospitals, tmp_path / "out", make_protocol(), resume=True)
    assert hospitals.ledger("clara") == [] and set(json.loads(files.nodes.read_text())) == {"anna", "berta"}


def test_too_few_sites_that_came_back_are_named(tmp_path: Path) -> None:
    hospitals = Hospitals(tmp_path / "sites")
    hospitals.cut = lambda kind, at, name: kind == TRAIN and (at, name) == (2, "berta")
    with pytest.raises(CutOffError):
        run(hospitals, tmp_path / "out", make_protocol(min_sites=3))
    hospitals.cut, hospitals.away = lambda *where: False, {"anna"}
    with pytest.raises(FederationError, match=r"2 of 3 sites joined, min_sites is 3 \(anna: is away\)"):
        run(hospitals, tmp_path / "out", make_protocol(min_sites=3), resume=True)


@pytest.mark.parametrize("damage", ["sites.json", "nodes.json", "rounds.jsonl", "decoder.safetensors"])
def test_what_a_study_cannot_be_resumed_without(tmp_path: Path, damage: str) -> None:
    hospitals = Hospitals(tmp_path / "sites")
    hospitals.cut = lambda kind, at, name: kind == TRAIN and (at, name) == (3, "berta")
    with pytest.raises(CutOffError):
        run(hospitals, tmp_path / "out", make_protocol())
    hospitals.cut = lambda *where: False
    (tmp_path / "out" / damage).write_text("")
    with pytest.raises((FederationError, OutputError)) as caught:
        run(hospitals, tmp_path / "out", make_protocol(), resume=True)
    assert damage in str(caught.value) or "decoder" in str(caught.value)
    assert all(max(hospitals.ledger(name)) <= 3 for name in SITES)
