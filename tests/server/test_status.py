"""`cohortium status`: how sites stand, from the files of a study, and what is said about the spend."""

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.proto.control_pb2 import ListNodesResponse
from flwr.proto.node_pb2 import NodeInfo as FlowerNode
from rich.console import Console

from common.privacy.statement import privacy_statement
from server import nodes, status
from server.consortium import init_consortium
from server.enrol import Registry, SiteEntry
from server.nodes import Control, NodeInfo, list_nodes
from server.processes import StateFolder
from server.run import RunFiles, RunSettings
from server.runs import RunState
from server.spending import planned_events
from server.standing import Standing
from server.status import coordinator_status
from server.status_view import status_view
from tests.server.test_launch import make_protocol

NODES = {"anna": "11", "berta": "12", "clara": "13"}
PATIENTS = {"anna": 30, "berta": 10}
HEARTBEAT = datetime(2026, 5, 4, 12, 0, 0, tzinfo=UTC)


class Study:
    """The files of a study, written as the ServerApp writes them."""

    def __init__(self, out: Path, **sections: Any) -> None:
        out.mkdir(parents=True)
        self.files, self.protocol = RunFiles(out), make_protocol(**sections)

    def wait(self, **waiting: str) -> None:
        waiting = {label.replace("_", " "): why for label, why in waiting.items()}
        self.files.waiting.write_text(json.dumps({"expected": 3, "waiting": waiting}))

    def gather(self, **not_joined: str) -> None:
        joined = {name: {"patients": count, "weight": count / 40} for name, count in PATIENTS.items()}
        refused = {label.replace("_", " "): why for label, why in not_joined.items()}
        self.files.sites.write_text(json.dumps({"joined": joined, "not_joined": refused}))
        self.files.waiting.unlink(missing_ok=True)
        self.files.decoder.write_bytes(b"")

    def finish_round(self, number: int, **dropped: str) -> None:
        answered = [name for name in PATIENTS if name not in dropped]
        line = {"round": number, "answered": answered, "dropped": dropped, "certificate": 1.0, "seconds": 1.0}
        with self.files.rounds.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def standing(self, *, going: bool = True, begun: bool = True) -> Standing:
        return Standing(self.protocol, self.files, going, begun)


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path / "out")


def test_a_site_before_its_study_begins(study: Study) -> None:
    assert study.standing().participation(["anna"])["state"] == "not asked"
    study.wait(anna="awaiting-approval", node_12="no reply before the deadline")
    found = study.standing()
    assert found.participation(["anna", "node 11"]) == {"state": "waiting", "reason": "awaiting-approval"}
    assert found.participation(["berta", "node 12"])["reason"] == "no reply before the deadline"
    assert found.participation(["clara"])["state"] == "asked"
    assert found.training("anna") is found.spent("anna") is None and found.current is None and found.asked == 0
    over = study.standing(going=False)
    assert over.participation(["anna"])["state"] == "unknown", "the file is a remainder of a run that is over"


def test_a_site_once_everybody_was_asked(study: Study) -> None:
    study.gather(clara="denied", node_14="is not connected")
    found = study.standing()
    assert found.participation(["anna", "node 11"]) == {"state": "joined", "reason": ""}
    assert found.participation(["clara", "node 13"]) == {"state": "not joined", "reason": "denied"}
    assert found.participation(["dora", "node 14"]) == {"state": "not joined", "reason": "is not connected"}
    assert found.participation(["emma"])["state"] == "not asked"


def test_a_study_that_is_resumed_waits_for_its_members_again(study: Study) -> None:
    study.gather(clara="awaiting-approval")
    study.finish_round(1)
    study.wait(anna="closed-now")
    found = study.standing()
    assert found.participation(["anna"])["reason"] == "closed-now"
    assert found.participation(["berta"])["state"] == "joined"
    assert found.participation(["clara"])["state"] == "asked", "what it said the first time no longer counts"
    assert found.current is None and found.asked == 2


def test_rounds_that_a_site_answered_and_was_asked_for(study: Study) -> None:
    study.gather()
    first = {"round": None, "state": "none yet", "reason": "", "asked_for": 1}
    assert study.standing().training("anna") == first and study.standing().spent("anna") == {"asked": 1, "answered": 0}
    study.finish_round(1)
    study.finish_round(2, berta="no reply before the deadline")
    found = study.standing()
    assert found.training("anna") == {"round": 2, "state": "answered", "reason": "", "asked_for": 3}
    late = {"round": 2, "state": "dropped", "reason": "no reply before the deadline", "asked_for": 3}
    assert found.training("berta") == late
    assert found.spent("anna") == {"asked": 3, "answered": 2} and found.spent("berta") == {"asked": 3, "answered": 1}
    stopped = study.standing(going=False)
    assert stopped.current is None and stopped.asked == 3, "the third may have been sent before the run ended"
    study.finish_round(3)
    assert study.standing().current is None and study.standing().asked == 3, "there is no fourth"


def test_a_run_in_the_queue_has_asked_for_nothing_new(study: Study) -> None:
    study.gather()
    study.finish_round(1)
    assert study.standing(begun=False).current is None


def test_the_spend_is_stated_as_a_release_would(study: Study) -> None:
    study.gather()
    study.finish_round(1)
    found = study.standing().privacy(slow=False)
    expected = privacy_statement(study.protocol, planned_events(study.protocol, PATIENTS, 2), PATIENTS)
    assert found["source"] == "protocol" and found["rounds"] == 2 and found["statement"] == expected
    assert "infinite" in found["in_words"]


def test_a_released_study_shows_what_was_released(study: Study) -> None:
    study.gather()
    for number in (1, 2, 3):
        study.finish_round(number)
    released = privacy_statement(study.protocol, planned_events(study.protocol, PATIENTS, 3), PATIENTS)
    study.files.privacy.write_text(json.dumps(released | {"study_digest": "another"}))
    assert study.standing(going=False).privacy(slow=False)["source"] == "protocol"
    study.files.privacy.write_text(json.dumps(released | {"mode": "as released"}))
    found = study.standing(going=False).privacy(slow=False)
    assert found["source"] == "privacy.json" and found["statement"]["mode"] == "as released"


CHANNEL = {"release": {"method": "channel", "rows": 9}, "channel": {"epsilon": 3.0}}
DPSGD = {"training": {"mode": "dpsgd", "batch_size": 8}, "privacy": {"epsilon": 3.0}}


@pytest.mark.parametrize("sections", [DPSGD, CHANNEL], ids=["dpsgd", "channel"])
def test_accounting_that_takes_seconds_has_to_be_asked_for(tmp_path: Path, sections: Any) -> None:
    study = Study(tmp_path / "out", **sections)
    study.gather()
    study.finish_round(1)
    quick = study.standing().privacy(slow=False)
    assert quick["statement"] is None and quick["in_words"] == "" and "--spend" in quick["why"] and quick["rounds"] == 2
    full = study.standing().privacy(slow=True)["statement"]
    assert {entry["site"] for entry in full["entries"]} == set(PATIENTS)
    assert all(entry["exposure"]["rounds"] == 2 for entry in full["entries"])


def test_rows_that_nobody_was_asked_for_yet_are_not_spent(tmp_path: Path) -> None:
    study = Study(tmp_path / "out", **CHANNEL)
    study.gather()
    study.finish_round(1)
    study.finish_round(2)
    rows = [
        entry["exposure"].get("released_rows", 0)
        for entry in study.standing().privacy(slow=True)["statement"]["entries"]
    ]
    assert set(rows) == {0}
    study.finish_round(3)
    rows = [
        entry["exposure"].get("released_rows", 0)
        for entry in study.standing().privacy(slow=True)["statement"]["entries"]
    ]
    assert sum(rows) == 3 * 9, "nine rows, against each of three adversaries"


class Home:
    """A consortium's folder with a launch, and a SuperLink's answers."""

    def __init__(self, folder: Path) -> None:
        init_consortium(folder, "Trial", ["127.0.0.1"])
        self.folder, self.state = folder, StateFolder(folder)
        self.state.prepare()
        self.state.write_addresses("0.0.0.0:9443", "127.0.0.1:8000", "127.0.0.1:1")
        entry = {"ledger_key": "a" * 64, "fingerprint": "f", "requested_at": "t", "enrolled_at": "t"}
        sites = {name: SiteEntry(node_key=name, node_id=node, **entry) for name, node in NODES.items()}
        (folder / "sites.json").write_text(json.dumps(Registry(sites=sites).model_dump(mode="json")))

    def launch(self, study: Study) -> None:
        settings = RunSettings(study.protocol, study.files.out, 3, simulation=False, key=self.folder / "release.key")
        settings.save(self.state.runs / "a.json")
        (study.files.out / "launch.json").write_text(json.dumps({"run": "7"}))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "consortium")


@pytest.fixture
def up(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A SuperLink that answers with these nodes."""

    def answer(*listed: NodeInfo, run: str = "running") -> None:
        runs = SimpleNamespace(state=lambda number: RunState(number, run, "" if run == "running" else "completed"))
        monkeypatch.setattr(status, "healthy", lambda private, ca: True)
        monkeypatch.setattr(status, "list_nodes", lambda control: list(listed))
        monkeypatch.setattr(status, "Runs", lambda private, ca: runs)

    return answer


def shown(found: dict[str, Any], width: int = 80) -> str:
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    with console.capture() as capture:
        console.print(status_view(found))
    return capture.get()


def test_everything_on_one_screen(home: Home, study: Study, up: Callable[..., None]) -> None:
    home.launch(study)
    study.gather(clara="awaiting-approval")
    study.finish_round(1, berta="no reply before the deadline")
    now = datetime.now(UTC)
    up(
        NodeInfo("11", "online", "anna", "anna", "2026-01-01T00:00:00+00:00", (now - timedelta(seconds=9)).isoformat()),
        NodeInfo(
            *("12", "offline", "berta", "berta", "2026-01-01T00:00:00+00:00"),
            deactivated_at=(now - timedelta(hours=3, minutes=5)).isoformat(),
            patience=60.0,
        ),
        NodeInfo("13", "registered", "clara", "clara", ""),
    )
    found = coordinator_status(home.folder)
    assert {name: site["status"] for name, site in found["sites"].items()} == {
        "anna": "online",
        "berta": "offline",
        "clara": "registered",
    }
    assert found["sites"]["anna"]["connected_since"] and not found["sites"]["berta"]["connected_since"]
    assert "60 s before" in found["sites"]["berta"]["last_seen_means"] and found["sites"]["clara"]["last_seen"] == ""
    assert found["study"]["missing"] == {"clara": "awaiting-approval", "berta": "no reply before the deadline"}
    assert found["study"]["current_round"] == 2 and found["health"]["services"] is None
    text = shown(found)
    assert max(map(len, text.splitlines())) <= 80
    for words in ("1 of 3 rounds over, now 2", "> 3 h ago", "awaiting-approval", "1/2", "0/2", "never"):
        assert words in text, words
    flat = " ".join(text.split())
    assert "at most 2 of 3 rounds, update norm C = 1. ε is infinite, for one patient, against every adversary" in flat
    json.dumps(found, allow_nan=False)


def test_a_node_that_is_no_site_is_named(home: Home, study: Study, up: Callable[..., None]) -> None:
    home.launch(study)
    study.wait(node_11="awaiting-approval", node_99="no reply before the deadline")
    up(NodeInfo("11", "online", "anna", "anna", ""))
    found = coordinator_status(home.folder)
    assert found["sites"]["anna"]["participation"] == {"state": "waiting", "reason": "awaiting-approval"}
    assert found["study"]["unknown_nodes"] == {"node 99": "no reply before the deadline"}
    assert "node 99" in shown(found) and "node 11" not in shown(found)


def test_no_epsilon_is_shown_that_was_not_accounted(home: Home, tmp_path: Path, up: Callable[..., None]) -> None:
    study = Study(tmp_path / "dpsgd", **DPSGD)
    home.launch(study)
    study.gather()
    up()
    text = " ".join(shown(coordinator_status(home.folder)).split())
    assert "No ε is stated here" in text and "ε =" not in text and "--spend" in text
    text = " ".join(shown(coordinator_status(home.folder, spend=True)).split())
    # Unit, δ, neighbouring relation and adversary, each time.
    assert "ε = " in text and "at δ = 0.0001: for one patient of any one site, replace-one, against public" in text


def test_a_server_that_is_down_still_shows_the_study(home: Home, study: Study) -> None:
    home.launch(study)
    study.gather()
    study.finish_round(1)
    found = coordinator_status(home.folder)
    assert found["superlink"]["up"] is False and status.status_code(found) == 8
    assert found["sites"]["anna"]["spent"] == {"asked": 2, "answered": 1}
    assert found["sites"]["anna"]["training"]["asked_for"] is None, "nobody knows whether the run goes on"
    assert "down" in shown(found)


def test_why_a_study_ended_early(home: Home, study: Study, up: Callable[..., None]) -> None:
    home.launch(study)
    study.gather()
    study.files.failure.write_text(json.dumps({"exit_code": 8, "message": "round 1: 1 valid replies", "fix": "mend"}))
    up(run="finished")
    found = coordinator_status(home.folder)
    assert found["study"]["failure"] == "round 1: 1 valid replies" and "round 1: 1 valid replies" in shown(found)
    up()
    assert coordinator_status(home.folder)["study"]["failure"] is None, "a remainder of the run before"


def test_names_are_no_markup(home: Home, study: Study, up: Callable[..., None]) -> None:
    home.launch(study)
    study.gather(clara="[bold]denied[/bold] :skull:")
    up()
    assert "[bold]denied[/bold] :skull:" in shown(coordinator_status(home.folder), 160)


@pytest.mark.parametrize(
    ("state", "beat", "gone"),
    [("online", HEARTBEAT.isoformat(), ""), ("offline", "", "2026-05-04T12:01:00+00:00"), ("registered", "", "")],
)
def test_times_of_a_node(home: Home, monkeypatch: pytest.MonkeyPatch, state: str, beat: str, gone: str) -> None:
    """Flower notes until when it waits for a heartbeat: two intervals after the last one."""
    import flwr.supercore.control

    node = FlowerNode(node_id=5, status=state, heartbeat_interval=30.0, last_deactivated_at=gone)
    node.online_until = HEARTBEAT.timestamp() + 60.0
    client = SimpleNamespace(ListNodes=lambda request: ListNodesResponse(nodes_info=[node]), close=lambda: None)
    factory = SimpleNamespace(from_server_address=lambda *args, **options: client)
    monkeypatch.setattr(flwr.supercore.control, "ControlHttpClient", factory)
    (found,) = list_nodes(Control("127.0.0.1:1", home.folder / "ca.pem"))
    assert (found.last_heartbeat, found.deactivated_at, found.patience) == (beat, gone, 60.0)
    assert nodes.NodeInfo is type(found)


def test_flowers_patience_is_what_its_register_adds(tmp_path: Path) -> None:
    """The contract with flwr 1.41 behind the last heartbeat."""
    from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.superlink.federation import NoOpFederationManager

    state = InMemoryLinkState(NoOpFederationManager(), ObjectStoreFactory().store())
    node = state.create_node("a", "b", b"key", 30.0)
    before = datetime.now(UTC).timestamp()
    state.activate_node(node, 30.0)
    (info,) = state.get_node_info(node_ids=[node])
    assert before <= info.online_until - 60.0 <= datetime.now(UTC).timestamp()


def test_status_does_without_pytorch(home: Home) -> None:
    """It is asked every minute on some servers; PyTorch takes seconds to load."""
    code = (
        "import sys; from pathlib import Path; from server.status import coordinator_status;"
        "from server.status_view import status_view; coordinator_status(Path(sys.argv[1]));"
        "raise SystemExit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(home.folder)], check=True, timeout=120)


def test_the_probe_loads_little(home: Home) -> None:
    code = (
        "import sys; from pathlib import Path; from server.probe import ask_health, health_code;"
        "assert health_code(ask_health(Path(sys.argv[1]))) == 8; raise SystemExit('numpy' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(home.folder)], check=True, timeout=120)
