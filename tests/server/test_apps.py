"""The two sides stay strangers: who imports whom, and how Flower and `simulate` find them."""

import ast
import hashlib
import json
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import ServerApp
from flwr.supercore.task_identity import TaskIdentity

from common.errors import FederationError
from common.messages import JoinReply, JoinRequest, Status
from common.privacy.ledger_keys import public_hex, sign_head
from common.schema import parse_schema
from common.study import Protocol, Study
from server.members import gather_sites
from server.run import RunFiles, RunSettings
from server.strategy import Member
from server.witness import Witness
from server.worker import load_app

ROOT = Path(__file__).parents[2]
COORDINATOR, SITE_KEY = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
MAY_IMPORT = {"common": {"common"}, "client": {"client", "common"}, "server": {"server", "common"}}


def imports(path: Path) -> Iterator[str]:
    """Top-level names of everything a module imports, at its head or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_no_room_imports_from_another_but_common(room: str) -> None:
    modules = sorted((ROOT / room).rglob("*.py"))
    assert len(modules) > 5
    for path in modules:
        foreign = set(imports(path)) & set(MAY_IMPORT) - MAY_IMPORT[room]
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_flower_and_simulate_use_the_same_two_apps() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    components = project["tool"]["flwr"]["app"]["components"]
    assert project["project"]["entry-points"]["cohortium.apps"] == components
    installed = {point.name: point.value for point in entry_points(group="cohortium.apps")}
    assert installed == components == {"serverapp": "server.app:app", "clientapp": "client.app:app"}


def test_the_references_lead_to_flower_apps() -> None:
    assert isinstance(load_app("serverapp"), ServerApp) and isinstance(load_app("clientapp"), ClientApp)
    with pytest.raises(FederationError, match="not registered"):
        load_app("thirdapp")


@pytest.mark.parametrize("module", ["server.cli", "client.cli"])
def test_a_command_line_starts_without_torch_and_flower(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'flwr', 'ray', 'numpy', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("module", "stranger"), [("server.app", "client"), ("server.simulation", "client"), ("client.app", "server")]
)
def test_running_one_side_never_loads_the_other(module: str, stranger: str) -> None:
    code = f"import sys, {module}; print([m for m in sys.modules if m.split('.')[0] == {stranger!r}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


# ---------------------------------------------------------------- who takes part


class Nodes:
    """Flower's grid with nodes that answer an invitation as told: a record, an error, or nothing."""

    def __init__(self, answers: Mapping[int, RecordDict | Error | None]) -> None:
        self.answers = answers

    def get_node_ids(self) -> list[int]:
        return list(self.answers)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = []
        for message in messages:
            JoinRequest.from_record(message.content)
            answer = self.answers[message.metadata.dst_node_id]
            if answer is not None:
                replies.append(Message(answer, reply_to=message))
        return replies


def invite(out: Path, answers: Mapping[int, RecordDict | Error | None]) -> tuple[Member, ...]:
    grid: Any = Nodes(answers)
    settings, files = RunSettings(make_protocol(), out, len(answers), simulation=True), RunFiles(out)
    return gather_sites(grid, settings, files, Witness(files.ledger_heads, COORDINATOR))


def make_protocol(**training: Any) -> Protocol:
    schema = {"fields": [{"name": "sex", "type": "string", "constraints": {"enum": ["f", "m"]}}]}
    study = {"study": {"name": "s", "schema": "x.json"}, "training": {"min_sites": 2, "join_timeout": 5.0} | training}
    return Protocol(Study.model_validate(study), parse_schema(schema))


def joining(
    site: str, patients: int, study: str | None = None, length: int = 0, signer: str | None = None
) -> RecordDict:
    """A site's answer with a ledger of `length` entries, signed as `signer` (default: as itself)."""
    head = hashlib.sha256(str(length).encode()).hexdigest()
    signature = sign_head("ledger head", SITE_KEY, signer or site, length, head)
    signed = (length, head, signature, public_hex(SITE_KEY))
    return JoinReply(Status.OK, site, study or make_protocol().digest, patients, *signed).to_record()


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def test_sites_that_join_get_weights_and_the_others_a_reason(identity: None, tmp_path: Path) -> None:
    members = invite(
        tmp_path,
        {
            1: joining("berta", 30),
            2: joining("anna", 10),
            3: JoinReply(Status.TOO_FEW_PATIENTS, "clara").to_record(),
            4: joining("dora", 10, study="f" * 64),
            5: Error(0, "ValueError: Zq7731"),
            6: RecordDict({"x": ConfigRecord({"y": "Zq7731"})}),
            7: None,
        },
    )
    assert members == (Member(2, "anna", 10), Member(1, "berta", 30))
    document = json.loads((tmp_path / "sites.json").read_text())
    assert document["joined"] == {"anna": {"patients": 10, "weight": 0.25}, "berta": {"patients": 30, "weight": 0.75}}
    assert document["not_joined"] == {
        "clara": "too-few-patients",
        "dora": "accepted another study",
        "node 5": "Flower reports error 0",
        "node 6": "no header",
        "node 7": "no reply before the deadline",
    }


class Deciding(Nodes):
    """Sites that need time: every node has a list of answers, the last of which it repeats."""

    def __init__(self, answers: Mapping[int, list[RecordDict | Error | None]]) -> None:
        super().__init__({})
        self.script, self.asked = {node: list(replies) for node, replies in answers.items()}, Counter[int]()

    def get_node_ids(self) -> list[int]:
        return list(self.script)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        listed = list(messages)
        for message in listed:
            node = message.metadata.dst_node_id
            self.asked[node] += 1
            script = self.script[node]
            self.answers = {**self.answers, node: script.pop(0) if len(script) > 1 else script[0]}
        return super().send_and_receive(listed, timeout=timeout)


def test_a_site_that_has_not_decided_is_asked_again_and_named_meanwhile(identity: None, tmp_path: Path) -> None:
    waiting = [JoinReply(status, "berta").to_record() for status in (Status.AWAITING_APPROVAL, Status.CLOSED_NOW)]
    away = Error(ErrorCode.NODE_UNAVAILABLE, "Zq7731")
    seen: list[dict[str, Any]] = []

    class Watching(Deciding):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
            path = tmp_path / "waiting.json"
            seen.extend([json.loads(path.read_text())] if path.exists() else [])
            return super().send_and_receive(messages, timeout=timeout)

    grid: Any = Watching(
        {1: [joining("anna", 10)], 2: [*waiting, joining("berta", 30)], 3: [away, joining("clara", 5)]}
    )
    settings, files = RunSettings(make_protocol(), tmp_path, 3, simulation=True), RunFiles(tmp_path)
    members = gather_sites(grid, settings, files, Witness(files.ledger_heads, COORDINATOR))
    assert [member.site for member in members] == ["anna", "berta", "clara"]
    assert dict(grid.asked) == {1: 1, 2: 3, 3: 2}, "who has decided is not asked again"
    assert seen == [
        {"expected": 3, "waiting": {"berta": "awaiting-approval", "node 3": "is not connected"}, "refused": {}},
        {"expected": 3, "waiting": {"berta": "closed-now"}, "refused": {}},
    ]
    assert not files.waiting.exists()


def test_waiting_for_a_decision_is_bounded(identity: None, tmp_path: Path) -> None:
    pending = JoinReply(Status.AWAITING_APPROVAL, "clara").to_record()
    grid: Any = Deciding({1: [joining("anna", 10)], 2: [joining("berta", 30)], 3: [pending], 4: [None]})
    protocol = make_protocol(join_timeout=1.0)
    settings, files = RunSettings(protocol, tmp_path, 4, simulation=True), RunFiles(tmp_path)
    for node in (1, 2):
        grid.script[node] = [joining(("anna", "berta")[node - 1], 10, study=protocol.digest)]
    members = gather_sites(grid, settings, files, Witness(files.ledger_heads, COORDINATOR))
    assert [member.site for member in members] == ["anna", "berta"]
    document = json.loads((tmp_path / "sites.json").read_text())
    assert document["not_joined"] == {"clara": "awaiting-approval", "node 4": "no reply before the deadline"}
    assert grid.asked[3] > 1 and grid.asked[4] > 1 and not files.waiting.exists()


def test_a_name_is_taken_once(identity: None, tmp_path: Path) -> None:
    members = invite(tmp_path, {1: joining("anna", 30), 2: joining("anna", 5), 3: joining("berta", 10)})
    assert members == (Member(1, "anna", 30), Member(3, "berta", 10))
    document = json.loads((tmp_path / "sites.json").read_text())
    assert "another node has joined under this name" in document["not_joined"]["anna"]


def test_too_few_sites_that_join_stop_the_study_by_name(identity: None, tmp_path: Path) -> None:
    refusal = JoinReply(Status.REFUSED_BY_POLICY, "berta").to_record()
    with pytest.raises(FederationError) as caught:
        invite(tmp_path, {1: joining("anna", 30), 2: refusal, 3: None})
    assert "1 of 3 sites joined, min_sites is 2" in str(caught.value)
    assert "berta: refused-by-policy" in str(caught.value) and "node 3: no reply" in str(caught.value)
    assert json.loads((tmp_path / "sites.json").read_text())["not_joined"]["berta"] == "refused-by-policy"


def test_the_coordinator_takes_down_every_ledger_that_joins(identity: None, tmp_path: Path) -> None:
    invite(
        tmp_path, {1: joining("anna", 30, length=7), 2: joining("berta", 10), 3: JoinReply(Status.OK, "x").to_record()}
    )
    document = json.loads((tmp_path / "ledger-heads.json").read_text())
    assert document["coordinator_key"] == public_hex(COORDINATOR)
    assert {site: seen["length"] for site, seen in document["sites"].items()} == {"anna": 7, "berta": 0}
    assert all(seen["key"] == public_hex(SITE_KEY) for seen in document["sites"].values())


def test_a_site_with_an_older_or_unsigned_ledger_is_refused_by_name(identity: None, tmp_path: Path) -> None:
    good = {1: joining("anna", 30, length=7), 2: joining("berta", 10, length=2)}
    invite(tmp_path, good)
    answers = good | {3: joining("clara", 5, signer="berta"), 4: joining("dora", 5)}
    assert len(invite(tmp_path, answers | {4: joining("dora", 5, length=3)})) == 3  # the same run, started again
    invite(tmp_path, answers | {4: joining("dora", 5, length=2)})
    refused = json.loads((tmp_path / "sites.json").read_text())["not_joined"]
    assert refused == {
        "clara": "the head of the site's ledger is not signed by the key it names",
        "dora": "the site's ledger was rolled back",
    }
