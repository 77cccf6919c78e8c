import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

import server.enrol
from common.audit import read_audit
from common.enrolment import enrolment_text, make_enrolment
from common.errors import CohortiumError, FederationError, OutputError, UsageError, VerifyError
from common.keys import new_p384, parse_openssh_public
from server.consortium import init_consortium
from server.enrol import enrol, load_registry, revoke
from server.enrol_commands import app
from server.nodes import Control, NodeInfo

NOW = datetime(2026, 11, 22, 10, 0, 0, tzinfo=UTC)
NODE, LEDGER = new_p384(), Ed25519PrivateKey.generate()
CONTROL = Control("127.0.0.1:1", Path("ca.pem"))


class SuperLink:
    """Flower's register as a real SuperLink keeps it (tests/federation/test_enrolment.py shows that it does)."""

    def __init__(self) -> None:
        self.nodes: list[NodeInfo] = []
        self.down = False

    def _answer(self) -> None:
        if self.down:
            raise FederationError("127.0.0.1:1: the SuperLink does not answer", fix="start it")

    def register_node(self, public_key: Path, control: Control, name: str) -> str:
        self._answer()
        line = public_key.read_text().strip()
        parse_openssh_public(line)
        if any(node.node_key == line for node in self.nodes):
            raise FederationError("[code: 23] Public key already in use.")
        self.nodes.append(NodeInfo(str(100 + len(self.nodes)), "registered", line, name, ""))
        return self.nodes[-1].node_id

    def unregister_node(self, node_id: str, control: Control) -> None:
        self._answer()
        self.nodes = [replace(n, status="unregistered") if n.node_id == node_id else n for n in self.nodes]

    def find_node(self, node_key: str, control: Control) -> NodeInfo | None:
        self._answer()
        return next((node for node in self.nodes if node.node_key == node_key), None)

    @property
    def states(self) -> list[tuple[str, str]]:
        return [(node.name, node.status) for node in self.nodes]


@pytest.fixture
def superlink(monkeypatch: pytest.MonkeyPatch) -> SuperLink:
    link = SuperLink()
    for name in ("register_node", "unregister_node", "find_node"):
        monkeypatch.setattr(server.enrol, name, getattr(link, name))
    return link


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    init_consortium(tmp_path / "con", "Trial", ["localhost"])
    return tmp_path / "con"


def request(folder: Path, site: str = "north", node=NODE, ledger=LEDGER, minutes: int = 0) -> Path:
    path = folder.parent / f"enrolment-{site}.json"
    path.write_text(enrolment_text(make_enrolment(site, node, ledger, "0.1.0", NOW + timedelta(minutes=minutes))))
    return path


def test_a_site_is_enrolled_and_registered(folder: Path, superlink: SuperLink) -> None:
    entry = enrol(request(folder), folder, CONTROL)
    assert superlink.states == [("north", "registered")] and entry.node_id == "100"
    found = load_registry(folder).sites["north"]
    assert found == entry and found.active and found.node_key == superlink.nodes[0].node_key
    assert enrol(request(folder), folder, CONTROL) == entry, "the same request twice is one"
    assert len(superlink.nodes) == 1


def test_without_a_superlink_only_the_register_changes_and_can_be_completed(folder: Path, superlink: SuperLink) -> None:
    assert enrol(request(folder), folder).node_id is None and superlink.nodes == []
    first = load_registry(folder).sites["north"]
    assert enrol(request(folder), folder, CONTROL) == first.model_copy(update={"node_id": "100"})


def test_a_superlink_that_is_down_leaves_nothing_and_one_that_knows_the_key_is_believed(
    folder: Path, superlink: SuperLink
) -> None:
    superlink.down = True
    with pytest.raises(FederationError, match="does not answer"):
        enrol(request(folder), folder, CONTROL)
    assert load_registry(folder).sites == {}
    superlink.down = False
    enrol(request(folder), folder, CONTROL)
    (folder / "sites.json").unlink()  # killed between the two registers
    assert enrol(request(folder), folder, CONTROL).node_id == "100" and len(superlink.nodes) == 1


def test_a_superlink_whose_database_was_made_anew_takes_the_same_request_again(
    folder: Path, superlink: SuperLink
) -> None:
    enrol(request(folder, "south", new_p384(), Ed25519PrivateKey.generate()), folder, CONTROL)
    assert enrol(request(folder), folder, CONTROL).node_id == "101"
    superlink.nodes.clear()
    assert enrol(request(folder), folder, CONTROL).node_id == "100" and superlink.states == [("north", "registered")]
    assert load_registry(folder).sites["north"].node_id == "100"


def test_other_keys_for_an_enrolled_name_need_the_coordinators_word(folder: Path, superlink: SuperLink) -> None:
    enrol(request(folder), folder, CONTROL)
    new = new_p384()
    with pytest.raises(UsageError, match=r"enrolled already, with another node key\n"):
        enrol(request(folder, node=new, minutes=5), folder, CONTROL)
    foreign = Ed25519PrivateKey.generate()
    with pytest.raises(UsageError, match="node key and ledger key: its ledger"):
        enrol(request(folder, node=new, ledger=foreign, minutes=5), folder, CONTROL)
    assert superlink.states == [("north", "registered")]
    entry = enrol(request(folder, node=new, minutes=5), folder, CONTROL, replace=True)
    assert superlink.states == [("north", "unregistered"), ("north", "registered")] and entry.node_id == "101"
    registry = load_registry(folder)
    assert registry.sites["north"] == entry and entry.active
    assert [(old.site, old.active, old.node_id) for old in registry.former] == [("north", False, None)]


def test_an_old_request_does_not_come_back(folder: Path, superlink: SuperLink) -> None:
    old, new = new_p384(), new_p384()
    enrol(request(folder, node=old), folder, CONTROL)
    enrol(request(folder, node=new, minutes=5), folder, CONTROL, replace=True)
    with pytest.raises(VerifyError, match="was revoked at"):
        enrol(request(folder, node=old, minutes=9), folder, CONTROL, replace=True)
    with pytest.raises(VerifyError, match="not after the enrolled one"):
        enrol(request(folder, node=new_p384(), minutes=5), folder, CONTROL, replace=True)
    assert [status for _, status in superlink.states] == ["unregistered", "registered"]


def test_a_key_belongs_to_one_site(folder: Path, superlink: SuperLink) -> None:
    enrol(request(folder), folder, CONTROL)
    for keys in ({"node": NODE, "ledger": Ed25519PrivateKey.generate()}, {"node": new_p384(), "ledger": LEDGER}):
        with pytest.raises(VerifyError, match="is enrolled for north"):
            enrol(request(folder, "south", **keys), folder, CONTROL, replace=True)
    assert list(load_registry(folder).sites) == ["north"]


def test_a_revoked_site_stays_out_until_it_has_a_new_key(folder: Path, superlink: SuperLink) -> None:
    enrol(request(folder), folder, CONTROL)
    with pytest.raises(UsageError, match="would go on accepting it"):
        revoke("north", folder)
    assert load_registry(folder).sites["north"].active
    entry = revoke("north", folder, CONTROL)
    assert not entry.active and entry.node_id is None and superlink.states == [("north", "unregistered")]
    assert revoke("north", folder, CONTROL) == entry
    with pytest.raises(VerifyError, match="was revoked"):
        enrol(request(folder, minutes=5), folder, CONTROL, replace=True)
    with pytest.raises(UsageError, match="enrolled already"):
        enrol(request(folder, node=new_p384(), minutes=5), folder, CONTROL)
    assert enrol(request(folder, node=new_p384(), minutes=5), folder, CONTROL, replace=True).active


def test_a_revocation_holds_even_if_the_superlink_is_down(folder: Path, superlink: SuperLink) -> None:
    enrol(request(folder), folder, CONTROL)
    superlink.down = True
    with pytest.raises(
        FederationError, match=r"marked as revoked, but the SuperLink may still accept its key: .*answer"
    ):
        revoke("north", folder, CONTROL)
    assert not load_registry(folder).sites["north"].active
    superlink.down = False
    revoke("north", folder, CONTROL)
    assert superlink.states == [("north", "unregistered")]


def test_a_key_that_the_superlink_alone_has_unregistered(folder: Path, superlink: SuperLink) -> None:
    enrol(request(folder), folder, CONTROL)
    superlink.unregister_node("100", CONTROL)
    (folder / "sites.json").unlink()
    with pytest.raises(VerifyError, match="does not take it again"):
        enrol(request(folder), folder, CONTROL)


def test_an_unknown_site_is_named_with_its_neighbour(folder: Path) -> None:
    with pytest.raises(UsageError, match="no site 'north'") as caught:
        revoke("north", folder)
    assert "none" in caught.value.fix
    enrol(request(folder, "northern"), folder)
    with pytest.raises(UsageError) as caught:
        revoke("northen", folder)
    assert "'northern'" in caught.value.fix


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "damaged"),
        ('{"format": 2}', "format 2"),
        ('{"format": 1, "sites": {"a": {}}}', "problem"),
        ("[]", "damaged"),
    ],
)
def test_a_damaged_register_is_not_taken_for_an_empty_one(folder: Path, text: str, expected: str) -> None:
    (folder / "sites.json").write_text(text)
    for command in (lambda: enrol(request(folder), folder), lambda: revoke("north", folder)):
        with pytest.raises(OutputError, match=expected):
            command()
    assert (folder / "sites.json").read_text() == text


@pytest.mark.parametrize("make", [lambda folder: folder.parent / "none", lambda folder: folder.parent])
def test_a_folder_that_is_none(folder: Path, make: Callable[[Path], Path]) -> None:
    with pytest.raises(CohortiumError, match="cannot be"):
        enrol(request(folder), make(folder))
    assert not (folder.parent / "sites.json").exists()


def test_an_edited_request_changes_nothing(folder: Path, superlink: SuperLink) -> None:
    path = request(folder)
    document = json.loads(path.read_text())
    document["content"]["site"] = "south"
    path.write_text(json.dumps(document))
    with pytest.raises(VerifyError, match="was edited"):
        enrol(path, folder, CONTROL)
    assert superlink.nodes == [] and not (folder / "sites.json").exists()


def test_the_command_names_the_ledgers_key_as_the_site_does(folder: Path) -> None:
    named = hashlib.sha256(LEDGER.public_key().public_bytes_raw()).hexdigest()
    arguments = ["enrol", str(request(folder)), "--consortium", str(folder)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and named in done.stdout
    shown = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert shown["ledger_key_id"] == named == hashlib.sha256(bytes.fromhex(shown["ledger_key"])).hexdigest()


# ---------------------------------------------------------------- the audit log


def told(folder: Path) -> list[tuple[str, str, str]]:
    """Action, site and outcome of every line after the making of the folder, in a log whose chain holds."""
    first, *lines = read_audit(folder / "audit.jsonl")
    assert first["action"] == "init-consortium"
    return [(line["action"], line["site"], line["outcome"]) for line in lines]


def test_every_change_of_the_register_is_in_the_audit_log(folder: Path, superlink: SuperLink) -> None:
    one = enrol(request(folder), folder, CONTROL)
    two = enrol(request(folder, node=new_p384(), minutes=5), folder, CONTROL, replace=True)
    revoke("north", folder, CONTROL)
    assert told(folder) == [("enrol", "north", "ok"), ("enrol", "north", "ok"), ("revoke", "north", "ok")]
    lines = read_audit(folder / "audit.jsonl")[1:]
    assert [line["fingerprint"] for line in lines] == [one.fingerprint, two.fingerprint, two.fingerprint]
    assert [line.get("replaces") for line in lines] == ["", one.fingerprint, None]


def test_a_refused_request_is_in_the_audit_log_and_nothing_of_it_elsewhere(folder: Path, superlink: SuperLink) -> None:
    enrol(request(folder), folder, CONTROL)
    before = (folder / "sites.json").read_bytes()
    for make, replace_, reason in (
        (
            lambda: request(folder, node=new_p384(), minutes=5),
            False,
            "north is enrolled already, with another node key",
        ),
        (lambda: request(folder, node=new_p384()), True, "not after the enrolled one"),
        (lambda: request(folder, "south", new_p384(), LEDGER), False, "one of the keys of south is enrolled for north"),
    ):
        with pytest.raises(CohortiumError):
            enrol(make(), folder, CONTROL, replace=replace_)
        action, site, outcome = told(folder)[-1]
        assert action == "enrol refused" and site in ("north", "south") and reason in outcome and "\n" not in outcome
    (folder.parent / "enrolment-north.json").write_text("{}")
    with pytest.raises(VerifyError):
        enrol(folder.parent / "enrolment-north.json", folder, CONTROL)
    assert told(folder)[-1][:2] == ("enrol refused", "") and "not an enrolment request" in told(folder)[-1][2]
    with pytest.raises(UsageError, match="--superlink"):
        enrol(request(folder, node=new_p384(), minutes=9), folder, replace=True)
    assert told(folder)[-1][0] == "enrol refused" and load_registry(folder).sites["north"].active
    assert (folder / "sites.json").read_bytes() == before and len(told(folder)) == 6


def test_what_failed_halfway_is_told_as_begun_and_failed(folder: Path, superlink: SuperLink) -> None:
    superlink.down = True
    with pytest.raises(FederationError):
        enrol(request(folder), folder, CONTROL)
    superlink.down = False
    enrol(request(folder), folder, CONTROL)
    superlink.down = True
    with pytest.raises(FederationError):
        revoke("north", folder, CONTROL)
    assert [(action, outcome == "ok") for action, _, outcome in told(folder)] == [
        ("enrol", True), ("enrol failed", False), ("enrol", True), ("revoke", True), ("revoke failed", False),
    ]  # fmt: skip
    assert "may still accept its key" in told(folder)[-1][2]


def test_what_cannot_be_logged_is_not_done(folder: Path, superlink: SuperLink) -> None:
    enrol(request(folder), folder, CONTROL)
    before = (folder / "sites.json").read_bytes()
    (folder / "audit.jsonl").unlink()
    (folder / "audit.jsonl").mkdir()
    for command in (
        lambda: revoke("north", folder, CONTROL),
        lambda: enrol(request(folder, "south", new_p384(), Ed25519PrivateKey.generate()), folder, CONTROL),
    ):
        with pytest.raises(OutputError, match="audit"):
            command()
    assert (folder / "sites.json").read_bytes() == before and superlink.states == [("north", "registered")]
