"""In a deployment those take part that were enrolled, from their own node and with their own ledger, and no others."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import RecordDict
from flwr.common.constant import NOOP_FLWR_AID
from flwr.proto.runtime_pb2 import GetNodesRequest
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.servicer.runtime.runtime_handlers import get_nodes

from common.errors import FederationError, OutputError
from common.keys import new_p384
from common.messages import JoinReply, Status
from common.study import Protocol
from server.enrol import load_registry, revoke
from server.members import gather_again, gather_sites
from server.roll import NOT_ENROLLED, OTHER_KEYS, OTHER_LEDGER, OTHER_NODE, REVOKED, Roll
from server.run import RunFiles, RunSettings
from server.strategy import Member
from server.witness import Witness
from tests.server.enrolled import Connected, Consortium, Hospital
from tests.server.federation import COORDINATOR, MEMBERS, NODES, Federation, by_hand, make_protocol

pytestmark = pytest.mark.usefixtures("identity")
Answer = Callable[[], RecordDict | None]


class Trial:
    """Three enrolled hospitals that join, and a study that waits for them."""

    def __init__(self, folder: Path) -> None:
        self.consortium = Consortium(folder / "con")
        self.protocol: Protocol = make_protocol(join_timeout=2.0)
        self.files = RunFiles(folder / "out")
        self.files.out.mkdir()
        self.hospitals = {name: Hospital(name, 11 + i, 10 * (i + 1)) for i, name in enumerate(NODES)}
        for hospital in self.hospitals.values():
            self.consortium.enrol(hospital)
        self.answers: dict[Hospital, Answer] = {h: self.joining(h) for h in self.hospitals.values()}
        self.grid = Connected(self.answers)

    def joining(self, hospital: Hospital, **otherwise: Any) -> Answer:
        return lambda: hospital.joins(self.protocol.digest, **otherwise)

    def gather(self, *, again: bool = False, sites: int = 3) -> dict[str, Member]:
        settings = RunSettings(
            self.protocol, self.files.out, sites, simulation=False, key=self.consortium.folder / "release.key"
        )
        grid: Any = self.grid
        witness = Witness(self.files.ledger_heads, COORDINATOR)
        return {m.site: m for m in (gather_again if again else gather_sites)(grid, settings, self.files, witness)}

    @property
    def not_joined(self) -> dict[str, str]:
        return json.loads(self.files.sites.read_text())["not_joined"]

    @property
    def entries(self) -> dict[str, str]:
        return {name: e.fingerprint for name, e in load_registry(self.consortium.folder).sites.items()}


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    return Trial(tmp_path)


def test_who_is_enrolled_joins_under_the_enrolment(trial: Trial) -> None:
    members = trial.gather()
    assert {name: (m.node_id, m.patients) for name, m in members.items()} == {
        "anna": (11, 10), "berta": (12, 20), "clara": (13, 30),
    }  # fmt: skip
    assert {name: m.enrolment for name, m in members.items()} == trial.entries and trial.not_joined == {}


def test_a_new_database_of_the_superlink_changes_ids_and_nothing_else(trial: Trial) -> None:
    trial.gather()
    for hospital in trial.hospitals.values():
        hospital.node_id += 1000
    assert {name: m.node_id for name, m in trial.gather(again=True).items()} == {
        "anna": 1011, "berta": 1012, "clara": 1013,
    }  # fmt: skip


def test_a_node_that_was_never_enrolled_is_neither_asked_nor_waited_for(trial: Trial) -> None:
    stranger = Hospital("dora", 99)
    trial.answers[stranger] = trial.joining(stranger)
    late = trial.hospitals["clara"]
    turns = iter([None])

    def after_a_while() -> RecordDict | None:
        return next(turns, late.joins(trial.protocol.digest))

    trial.answers[late] = after_a_while
    assert set(trial.gather()) == {"anna", "berta", "clara"}, "the stranger was not counted as one of three"
    assert 99 not in trial.grid.asked and trial.not_joined == {"node 99": NOT_ENROLLED}


def test_a_revoked_site_is_not_asked_and_is_named(trial: Trial) -> None:
    revoke("clara", trial.consortium.folder)
    assert set(trial.gather(sites=2)) == {"anna", "berta"}
    assert 13 not in trial.grid.asked and trial.not_joined == {"clara": NOT_ENROLLED}


@pytest.mark.parametrize(
    ("change", "label", "expected"),
    [
        (lambda t, clara: t.joining(clara, name="dora"), "dora", NOT_ENROLLED),
        (lambda t, clara: t.joining(clara, name="anna"), "anna", OTHER_NODE),
        (lambda t, clara: t.joining(clara, ledger=Ed25519PrivateKey.generate()), "clara", OTHER_LEDGER),
        (lambda t, clara: t.joining(clara, ledger=t.hospitals["anna"].ledger), "clara", OTHER_LEDGER),
        (lambda t, clara: lambda: JoinReply(Status.AWAITING_APPROVAL, "anna").to_record(), "anna", OTHER_NODE),
        (lambda t, clara: lambda: JoinReply(Status.SITE_MISCONFIGURED, "").to_record(), "clara", "site-misconfigured"),
        (lambda t, clara: lambda: None, "clara", "no reply before the deadline"),
    ],
    ids=["name", "node", "ledger", "another's ledger", "status in another's name", "without a name", "silent"],
)
def test_what_is_not_as_enrolled_is_refused_by_name(
    trial: Trial, change: Callable[[Trial, Hospital], Answer], label: str, expected: str
) -> None:
    trial.answers[trial.hospitals["clara"]] = change(trial, trial.hospitals["clara"])
    members = trial.gather()
    assert set(members) == {"anna", "berta"} and members["anna"].node_id == 11
    assert trial.not_joined == {label: expected}
    seen = json.loads(trial.files.ledger_heads.read_text())["sites"]
    assert set(seen) == {"anna", "berta"}, "the ledger of one that is refused is not taken for the known one"


def test_a_site_that_is_revoked_while_others_decide_does_not_take_part(trial: Trial) -> None:
    clara = trial.hospitals["clara"]

    turns = iter([None])

    def in_its_second_turn() -> RecordDict | None:
        answer = next(turns, clara.joins(trial.protocol.digest))
        if answer is not None:
            revoke("anna", trial.consortium.folder)
        return answer

    trial.answers[clara] = in_its_second_turn
    assert set(trial.gather()) == {"berta", "clara"} and trial.not_joined == {"anna": REVOKED}


def test_too_few_enrolled_sites_stop_the_study_with_reasons(trial: Trial) -> None:
    for name in ("anna", "clara"):
        revoke(name, trial.consortium.folder)
    with pytest.raises(FederationError, match=r"1 of 3 sites joined.*anna: is not enrolled; clara: is not enrolled"):
        trial.gather()


def test_a_resumed_study_takes_back_those_that_are_enrolled_still(trial: Trial) -> None:
    began = trial.gather()
    assert trial.gather(again=True) == began
    revoke("clara", trial.consortium.folder)
    members = trial.gather(again=True)
    assert members == began, "its weight stays"
    assert Roll(trial.consortium.folder).lapsed({name: m.enrolment for name, m in members.items()}) == {
        "clara": REVOKED
    }  # fmt: skip
    revoke("anna", trial.consortium.folder)
    with pytest.raises(FederationError, match=r"1 of 3 sites joined.*\(anna: .*; clara: is not enrolled\)"):
        trial.gather(again=True)


def test_a_resumed_study_takes_a_rotated_node_key_and_no_other_ledger(trial: Trial) -> None:
    trial.gather()
    clara = trial.hospitals["clara"]
    clara.node, clara.node_id = new_p384(), 77
    members = trial.gather(again=True)
    assert members["clara"].node_id == 13, "not enrolled anew: it counts as away"
    entry = trial.consortium.enrol(clara, replace=True)
    members = trial.gather(again=True)
    assert (members["clara"].node_id, members["clara"].enrolment) == (77, entry.fingerprint)
    clara.ledger = Ed25519PrivateKey.generate()
    clara.node, clara.node_id = new_p384(), 78
    trial.consortium.enrol(clara, replace=True)
    members = trial.gather(again=True)
    assert members["clara"].node_id == 77, "its ledger is not the one of this study"
    lapsed = Roll(trial.consortium.folder).lapsed({name: m.enrolment for name, m in members.items()})
    assert lapsed == {"clara": OTHER_KEYS}


def test_a_registry_that_cannot_be_read_lets_nobody_in(trial: Trial) -> None:
    (trial.consortium.folder / "sites.json").write_text("{")
    with pytest.raises(OutputError, match="damaged"):
        trial.gather()
    assert trial.grid.asked == []


def test_a_simulation_has_no_registry(tmp_path: Path) -> None:
    roll = Roll.of(RunSettings(make_protocol(), tmp_path, 3, simulation=True))
    assert roll == Roll() and roll.refusal("anybody", "", "f" * 64) is None
    assert roll.lapsed({"anybody": ""}) == {} and roll.strangers({1: ""}) == {} and roll.name("") == ""


# ---------------------------------------------------------------- rounds


@pytest.fixture
def enrolled(tmp_path: Path) -> tuple[Consortium, Federation]:
    """The three members of tests/server/federation.py, enrolled."""
    consortium = Consortium(tmp_path / "con")
    entries = [consortium.enrol(Hospital(member.site, member.node_id)) for member in MEMBERS]
    members = tuple(
        dataclasses.replace(member, enrolment=entry.fingerprint) for member, entry in zip(MEMBERS, entries, strict=True)
    )
    return consortium, Federation(members, Roll(consortium.folder))


def test_a_reply_of_a_site_that_was_revoked_on_its_way_is_not_taken_in(enrolled: tuple[Consortium, Federation]) -> None:
    consortium, federation = enrolled
    start = federation.decoder.arrays()
    updates = {site: federation.update(i) for i, site in enumerate(NODES)}
    answers = federation.answers(updates)
    revoke("clara", consortium.folder)
    federation.strategy.aggregate_train(1, answers)
    report, _ = federation.reports[-1]
    assert report.answered == ("anna", "berta") and report.dropped == {"clara": REVOKED}
    expected = by_hand(start, {site: updates[site] for site in ("anna", "berta")})
    for name, array in federation.decoder.arrays().items():
        assert abs(array.numpy() - expected[name]).max() < 1e-5
    assert federation.witness["clara"].length == 0, "it is not heard at all"


def test_a_revoked_site_is_not_asked_again(enrolled: tuple[Consortium, Federation]) -> None:
    consortium, federation = enrolled
    federation.play({site: federation.update(i) for i, site in enumerate(NODES)})
    revoke("clara", consortium.folder)
    assert set(federation.requests(2)) == {NODES["anna"], NODES["berta"]}
    federation.play({site: federation.update(i) for i, site in enumerate(("anna", "berta"))}, 2)
    assert federation.reports[-1][0].dropped == {"clara": REVOKED}


def test_a_site_with_new_keys_waits_until_the_study_is_resumed(enrolled: tuple[Consortium, Federation]) -> None:
    consortium, federation = enrolled
    consortium.enrol(Hospital("clara", 55), replace=True)
    assert set(federation.requests(1)) == {NODES["anna"], NODES["berta"]}
    federation.play({site: federation.update(i) for i, site in enumerate(("anna", "berta"))})
    assert federation.reports[-1][0].dropped == {"clara": OTHER_KEYS}


def test_with_too_few_enrolled_members_nobody_is_asked_to_spend(enrolled: tuple[Consortium, Federation]) -> None:
    consortium, federation = enrolled
    for site in ("anna", "clara"):
        revoke(site, consortium.folder)
    with pytest.raises(
        FederationError,
        match=r"round 1: 1 members that may be asked, min_sites is 2 \(anna: was revoked; clara: was revoked\)",
    ):
        federation.requests(1)


# ---------------------------------------------------------------- Flower


class SuperLink:
    """The state of a SuperLink of flwr, and the list of nodes that its Runtime API gives a ServerApp."""

    def __init__(self, database: Path) -> None:
        store = ObjectStoreFactory(str(database))
        self.state = LinkStateFactory(str(database), NoOpFederationManager(), store).state()
        run = self.state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP)
        self.task = Task(run_id=run)

    def register(self, hospital: Hospital) -> int:
        node: int = self.state.create_node(NOOP_FLWR_AID, "", hospital.info.public_key, 0, name=hospital.name)
        self.state.activate_node(node, 60.0)
        return node

    def get_nodes(self) -> Any:
        return get_nodes(GetNodesRequest(), self.state, self.task).nodes


def test_the_superlink_itself_says_which_node_has_which_key(trial: Trial, tmp_path: Path) -> None:
    link, roll = SuperLink(tmp_path / "superlink.db"), Roll(trial.consortium.folder)
    grid: Any = link
    nodes = {name: link.register(hospital) for name, hospital in trial.hospitals.items()}
    stranger = link.register(Hospital("dora", 0))
    keys = roll.nodes(grid)
    assert {roll.name(keys[node]) for node in nodes.values()} == set(NODES) and set(nodes.values()) < set(keys)
    assert all(roll.refusal(name, keys[node]) is None for name, node in nodes.items())
    assert roll.strangers(keys) == {stranger: ""}
    link.state.delete_node(NOOP_FLWR_AID, nodes["clara"])
    assert set(roll.nodes(grid)) == {nodes["anna"], nodes["berta"], stranger}
