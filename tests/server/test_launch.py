"""Launching, following, resuming and releasing, with a SuperLink that is a fake."""

import json
import shutil
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.audit import read_audit
from common.errors import ExitCode, FederationError, OutputError, UsageError
from common.schema import parse_schema
from common.signing import add_signature
from common.study import Protocol, Study
from common.table import Table
from server import launch as launching
from server.bundle import RUN_KEY, build_bundle
from server.cohort import write_cohort
from server.consortium import init_consortium
from server.deployed import release_deployment
from server.enrol import Registry, SiteEntry
from server.launch import DetachedError, Launch, follow, launch, read_waiting, resume, stop
from server.processes import StateFolder
from server.release import verify_release
from server.run import RunFiles, RunSettings
from server.runs import RunState
from server.status import coordinator_status
from server.witness import Seen
from tests.server.federation import MEMBERS
from tests.tls import certify

SCHEMA = {
    "fields": [
        {"name": "age", "type": "number", "constraints": {"required": True, "minimum": 0, "maximum": 100}},
        {"name": "sex", "type": "string", "constraints": {"required": True, "enum": ["f", "m"]}},
    ]
}
PATIENTS = {member.site: member.patients for member in MEMBERS}


def make_protocol(**sections: Any) -> Protocol:
    study: dict[str, Any] = {
        "study": {"name": "s", "schema": "schema.json"},
        "model": {"latent_dim": 2, "hidden": [8], "decoder_lipschitz": 12.0},
        "training": {"rounds": 3, "min_sites": 2},
        "privacy": {"delta": 1e-4},
        "release": {"rows": 50},
    }
    for name, values in sections.items():
        study[name] = study.get(name, {}) | values
    return Protocol(Study.model_validate(study), parse_schema(SCHEMA))


class FakeRuns:
    """The SuperLink's runs."""

    def __init__(self) -> None:
        self.states: dict[str, RunState] = {}
        self.configs: list[dict[str, str]] = []
        self.down = False

    def require_up(self) -> None:
        self._reach()

    def start(self, bundle: bytes, config: dict[str, str]) -> str:
        self._reach()
        self.configs.append(config)
        run = str(100 + len(self.configs))
        self.states[run] = RunState(run, "running", "")
        return run

    def state(self, run: str) -> RunState | None:
        self._reach()
        return self.states.get(run)

    def stop(self, run: str) -> None:
        self.finish(run, "stopped")

    def finish(self, run: str, outcome: str) -> None:
        self.states[run] = RunState(run, "finished", outcome)

    def _reach(self) -> None:
        if self.down:
            raise FederationError("127.0.0.1:1: the SuperLink is away")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> FakeRuns:
    fake = FakeRuns()
    monkeypatch.setattr(launching, "runs_of", lambda consortium: fake)
    monkeypatch.setattr(launching, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(launching, "STATE_SECONDS", 0.02)
    return fake


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "consortium"
    init_consortium(folder, "Test", ["127.0.0.1"])
    StateFolder(folder).prepare()
    entry = {"ledger_key": "a" * 64, "fingerprint": "f", "requested_at": "t", "enrolled_at": "t"}
    sites = {name: SiteEntry(node_key=name, **entry) for name in PATIENTS}
    (folder / "sites.json").write_text(json.dumps(Registry(sites=sites).model_dump(mode="json")))
    return folder


def outcome(files: RunFiles, rounds: int = 3, *, cohort: bool = True, rows: int = 50) -> None:
    """What a ServerApp leaves."""
    total = sum(PATIENTS.values())
    joined = {name: {"patients": n, "weight": n / total} for name, n in PATIENTS.items()}
    files.sites.write_text(json.dumps({"joined": joined, "not_joined": {"dora": "denied"}}))
    line = {"answered": list(PATIENTS), "dropped": {}, "certificate": 11.0, "step_norm": 0.1, "seconds": 1.0}
    files.rounds.write_text("".join(json.dumps({"round": n} | line) + "\n" for n in range(1, rounds + 1)))
    heads = {name: vars(Seen("b" * 64, rounds, "c" * 64)) for name in PATIENTS}
    files.ledger_heads.write_text(json.dumps({"coordinator_key": "d" * 64, "sites": heads}))
    files.decoder.write_bytes(b"decoder")
    if cohort:
        protocol = Protocol.from_json(json.loads(files.study.read_text()))
        values = np.column_stack([np.linspace(0, 100, rows).round(), np.arange(rows) % 2])
        table = Table(protocol.schema, values)
        write_cohort([table], protocol.schema, files.cohort_csv, files.cohort_parquet, protocol.markers)


def nothing(*_: Any) -> None:
    return None


def test_a_launch_leaves_settings_that_only_the_coordinator_can_read(
    home: Path, runs: FakeRuns, tmp_path: Path
) -> None:
    started = launch(make_protocol(), home, tmp_path / "out")
    settings = started.load_settings()
    assert (settings.sites, settings.resume, settings.simulation) == (3, False, False)
    assert settings.key == home / "release.key" and settings.protocol == make_protocol()
    assert runs.configs == [{RUN_KEY: started.settings}]  # no path and no word of the coordinator's machine
    assert (home / "state" / "runs").stat().st_mode & 0o077 == 0
    assert read_audit(home / "audit.jsonl")[-1]["action"] == "launch"
    assert Launch.load(tmp_path / "out", home) == started


@pytest.mark.parametrize(
    ("sections", "sites", "message"),
    [
        ({"study": {"seed": 1}}, None, "refuse a study that fixes their randomness"),
        ({"training": {"mode": "none"}}, None, "hospitals refuse it"),
        ({"sites": {"emil": 5}}, None, "emil, not enrolled"),
        ({"training": {"min_sites": 4}}, None, r"3 site\(s\) are enrolled"),
        ({}, 4, "would wait for 4"),
        ({}, 1, "would wait for 1"),
    ],
)
def test_a_study_that_cannot_run_is_refused_before_anything_is_written(
    home: Path, runs: FakeRuns, tmp_path: Path, sections: Any, sites: int | None, message: str
) -> None:
    with pytest.raises((UsageError, FederationError), match=message):
        launch(make_protocol(**sections), home, tmp_path / "out", sites)
    assert runs.configs == [] and not (tmp_path / "out").exists()


def test_a_revoked_site_does_not_count(home: Path, runs: FakeRuns, tmp_path: Path) -> None:
    document = json.loads((home / "sites.json").read_text())
    document["sites"]["anna"]["revoked_at"] = "t"
    (home / "sites.json").write_text(json.dumps(document))
    assert launch(make_protocol(), home, tmp_path / "out").load_settings().sites == 2


def test_a_superlink_that_is_down_leaves_no_out(home: Path, runs: FakeRuns, tmp_path: Path) -> None:
    runs.down = True
    with pytest.raises(FederationError, match="away"):
        launch(make_protocol(), home, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list((home / "state" / "runs").iterdir())


def test_an_out_that_is_not_empty_is_kept(home: Path, runs: FakeRuns, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(OutputError, match="not empty"):
        launch(make_protocol(), home, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_following_reports_rounds_and_whom_the_study_waits_for(home: Path, runs: FakeRuns, tmp_path: Path) -> None:
    started = launch(make_protocol(), home, tmp_path / "out")
    heard: list[Any] = []

    def coordinator() -> None:
        started.files.waiting.write_text(json.dumps({"expected": 3, "waiting": {"anna": "awaiting-approval"}}))
        time.sleep(0.2)
        started.files.waiting.unlink()
        time.sleep(0.2)
        outcome(started.files)
        runs.finish(started.run, "completed")

    thread = threading.Thread(target=coordinator)
    thread.start()
    follow(started, lambda line: heard.append(line["round"]), heard.append, nothing)
    thread.join()
    assert heard == [{"anna": "awaiting-approval"}, {}, 1, 2, 3]


def test_following_says_why_the_study_failed(home: Path, runs: FakeRuns, tmp_path: Path) -> None:
    started = launch(make_protocol(), home, tmp_path / "out")
    failure = {"exit_code": 9, "message": "the certificate", "fix": "mend"}
    started.files.failure.write_text(json.dumps(failure))
    runs.finish(started.run, "failed")
    with pytest.raises(FederationError, match="the certificate") as caught:
        follow(started, nothing, nothing, nothing)
    assert caught.value.exit_code is ExitCode.CERTIFICATE


def test_a_run_that_ended_without_a_word_can_be_resumed(home: Path, runs: FakeRuns, tmp_path: Path) -> None:
    started = launch(make_protocol(), home, tmp_path / "out")
    runs.finish(started.run, "stopped")
    with pytest.raises(FederationError, match=r"ended early \(stopped\)") as caught:
        follow(started, nothing, nothing, nothing)
    assert "cohortium resume" in caught.value.fix


def test_a_short_outage_is_waited_for_and_a_long_one_is_said(
    home: Path, runs: FakeRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = launch(make_protocol(), home, tmp_path / "out")
    said: list[str] = []

    def away(text: str) -> None:
        said.append(text)
        if len(said) == 3:
            runs.down = False
            outcome(started.files)
            runs.finish(started.run, "completed")

    runs.down = True
    follow(started, nothing, nothing, away)
    assert len(said) == 3
    runs.down = True
    monkeypatch.setattr(launching, "UNREACHABLE_SECONDS", 0.1)
    with pytest.raises(FederationError, match="away"):
        follow(started, nothing, nothing, nothing)


def test_ctrl_c_detaches(home: Path, runs: FakeRuns, tmp_path: Path) -> None:
    started = launch(make_protocol(), home, tmp_path / "out")
    outcome(started.files, 1, cohort=False)

    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(DetachedError, match="goes on") as caught:
        follow(started, interrupt, nothing, nothing)
    assert caught.value.exit_code is ExitCode.INTERRUPTED
    assert runs.states[started.run].status == "running"


def test_resume_follows_a_run_that_goes_on(home: Path, runs: FakeRuns, tmp_path: Path) -> None:
    started = launch(make_protocol(), home, tmp_path / "out")
    StateFolder(home).serving.write_text(json.dumps({"run": started.run}))
    assert resume(tmp_path / "out", home) == started and len(runs.configs) == 1


def test_resume_ends_a_run_that_the_executor_gave_up_and_starts_anew(
    home: Path, runs: FakeRuns, tmp_path: Path
) -> None:
    started = launch(make_protocol(), home, tmp_path / "out")
    StateFolder(home).serving.write_text(json.dumps({"run": "another"}))
    again = resume(tmp_path / "out", home)
    assert again.run != started.run and runs.states[started.run].outcome == "stopped"


def test_a_run_that_nobody_has_in_hand_is_not_followed_for_ever(
    home: Path, runs: FakeRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "ABANDONED_SECONDS", 0.1)
    started = launch(make_protocol(), home, tmp_path / "out")
    with pytest.raises(FederationError, match="ended early") as caught:
        follow(started, nothing, nothing, nothing)
    assert started.continuation in caught.value.fix


def test_a_full_disk_is_named_whatever_the_run_stumbled_over(
    home: Path, runs: FakeRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = launch(make_protocol(), home, tmp_path / "out")
    outcome(started.files, 1, cohort=False)
    runs.finish(started.run, "failed")
    started.files.failure.write_text(json.dumps({"exit_code": 8, "message": "no replies", "fix": "look"}))
    monkeypatch.setattr(launching, "LEAST_FREE_BYTES", 1 << 62)
    with pytest.raises(OutputError, match="the disk is full"):
        follow(started, nothing, nothing, nothing)
    with pytest.raises(OutputError, match="the disk is full"):
        resume(tmp_path / "out", home)
    with pytest.raises(OutputError, match="the disk is full"):
        launch(make_protocol(), home, tmp_path / "other")
    assert not (tmp_path / "other").exists() and len(runs.configs) == 1
    outcome(started.files)
    assert resume(tmp_path / "out", home) == started, "a finished study can still be looked at"


def test_a_certificate_that_has_expired_is_named(home: Path, runs: FakeRuns, tmp_path: Path) -> None:
    started = launch(make_protocol(), home, tmp_path / "out")
    certify(home, "127.0.0.1", datetime.now(UTC) - timedelta(minutes=1))
    runs.down = True
    with pytest.raises(OutputError, match="expired at") as caught:
        follow(started, nothing, nothing, nothing)
    assert "renew-certificate" in caught.value.fix


def test_resume_starts_anew_from_the_checkpoint(home: Path, runs: FakeRuns, tmp_path: Path) -> None:
    started = launch(make_protocol(), home, tmp_path / "out")
    runs.finish(started.run, "failed")
    started.files.failure.write_text("{}")
    again = resume(tmp_path / "out", home)
    assert again.run != started.run and not started.files.failure.exists()
    settings = again.load_settings()
    assert settings.resume and settings.key == home / "release.key" and settings.protocol == make_protocol()
    assert Launch.load(tmp_path / "out", home) == again
    assert [entry["action"] for entry in read_audit(home / "audit.jsonl")][-2:] == ["launch", "resume"]


def test_resume_after_the_superlink_lost_its_database(home: Path, runs: FakeRuns, tmp_path: Path) -> None:
    launch(make_protocol(), home, tmp_path / "out")
    runs.states.clear()
    assert resume(tmp_path / "out", home).load_settings().resume


def test_resume_of_a_finished_study_only_releases(home: Path, runs: FakeRuns, tmp_path: Path) -> None:
    started = launch(make_protocol(), home, tmp_path / "out")
    outcome(started.files)
    runs.finish(started.run, "completed")
    assert resume(tmp_path / "out", home) == started and len(runs.configs) == 1


def test_what_cannot_be_resumed(home: Path, runs: FakeRuns, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no readable record of a launch"):
        resume(tmp_path, home)
    launch(make_protocol(), home, tmp_path / "out")
    shutil.copytree(home, tmp_path / "other")
    with pytest.raises(UsageError, match="was launched with --consortium"):
        resume(tmp_path / "out", tmp_path / "other")


def test_stop(home: Path, runs: FakeRuns, tmp_path: Path) -> None:
    started = launch(make_protocol(), home, tmp_path / "out")
    stop(tmp_path / "out", home)
    assert runs.states[started.run].outcome == "stopped"


@pytest.mark.parametrize("text", ["", "[]", '{"waiting": 1}', '{"waiting"'])
def test_a_damaged_waiting_file_is_nobody(tmp_path: Path, text: str) -> None:
    RunFiles(tmp_path).waiting.write_text(text)
    assert read_waiting(RunFiles(tmp_path)) == {}


def test_a_release_is_signed_with_the_consortium_s_key(home: Path, runs: FakeRuns, tmp_path: Path) -> None:
    started = launch(make_protocol(), home, tmp_path / "out")
    outcome(started.files)
    summary = release_deployment(started)
    assert summary["rounds"] == 3 and summary["epsilon"] == "infinity" and summary["not_joined"] == {"dora": "denied"}
    statement = verify_release(tmp_path / "out", home / "release.pub")
    assert statement["predicate"]["bundle_sha256"] == build_bundle().digest
    assert statement["predicate"]["simulation"] is False
    names = {subject["name"] for subject in statement["subject"]}
    assert names >= {"cohort.csv", "privacy.json", "report.html", "study.json"} and "metrics.json" not in names
    assert names >= {"croissant.json", "ro-crate-metadata.json", "schema.json"}
    card = json.loads(started.files.croissant.read_text())
    assert card["creator"]["name"] == "Test" and "A simulation" not in card["description"]
    page = started.files.report.read_text()
    assert "dora" in page and "<script" not in page and "<link" not in page and "src=" not in page
    assert read_audit(home / "audit.jsonl")[-1]["action"] == "release"
    # What `resume` signs again is the same to the byte, so a hospital's signature stays.
    both = add_signature(json.loads(started.files.manifest.read_text()), Ed25519PrivateKey.generate())
    started.files.manifest.write_text(json.dumps(both))
    release_deployment(started)
    assert json.loads(started.files.manifest.read_text()) == both


def test_the_page_of_a_channel_says_what_was_drawn_and_whose_rows_are_missing(
    home: Path, runs: FakeRuns, tmp_path: Path
) -> None:
    channel: dict[str, Any] = {"release": {"method": "channel", "rows": 60}, "channel": {"epsilon": 3.0}}
    noise = {"update_noise": 2.0, "accept_useless_noise": True}
    started = launch(make_protocol(privacy=noise, **channel), home, tmp_path / "out")
    outcome(started.files, rows=20 * (len(PATIENTS) - 1))
    silent, *sites = sorted(PATIENTS)
    document = {"method": "channel", "rows": dict.fromkeys(sites, 20), "dropped": {silent: "no reply"}}
    started.files.release.write_text(json.dumps(document))
    release_deployment(started)
    page = started.files.report.read_text()
    assert "with Gaussian noise of 2 times that norm" in page and "no noise" not in page
    assert "every patient, conditional" in page and "added to no other number" in page
    assert page.count("rows, each of one patient drawn") == len(PATIENTS)
    assert page.count("None of them is in the cohort (no reply); they are stated as spent.") == 1


def test_the_executor_runs_launches_of_its_own_code_only(home: Path, runs: FakeRuns, tmp_path: Path) -> None:
    from server.executor import Executor

    started = launch(make_protocol(), home, tmp_path / "out")
    executor = Executor.__new__(Executor)
    executor.state, executor.bundle = StateFolder(home), started.bundle
    assert executor._settings(started.settings, started.bundle).stem == started.settings
    for name in ("", "../../etc/passwd", "0" * 32, f"{started.settings}.json", "../runs/" + started.settings):
        with pytest.raises(FederationError, match="no launch of this consortium"):
            executor._settings(name, started.bundle)
    with pytest.raises(FederationError, match="not of the code loaded here"):
        executor._settings(started.settings, "0" * 64)
    runs.finish(started.run, "failed")
    with pytest.raises(FederationError, match="not of the code loaded here"):
        follow(started, nothing, nothing, nothing)


def test_a_launch_that_cannot_be_logged_does_not_happen(home: Path, runs: FakeRuns, tmp_path: Path) -> None:
    (home / "audit.jsonl").unlink()
    (home / "audit.jsonl").mkdir()
    with pytest.raises(OutputError, match="audit"):
        launch(make_protocol(), home, tmp_path / "out")
    assert runs.configs == [] and not (tmp_path / "out").exists()


def test_a_launch_whose_record_cannot_be_kept_is_stopped(
    home: Path, runs: FakeRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Launch) -> None:
        raise OutputError("the disk is full")

    monkeypatch.setattr(Launch, "save", full)
    with pytest.raises(OutputError, match="full"):
        launch(make_protocol(), home, tmp_path / "out")
    assert [state.outcome for state in runs.states.values()] == ["stopped"]
    assert [entry["action"] for entry in read_audit(home / "audit.jsonl")][-2:] == ["launch", "launch failed"]


def test_status_without_a_superlink(home: Path) -> None:
    found = coordinator_status(home)
    assert found["superlink"] == {"up": False} and found["study"] is None
    assert {name: site["status"] for name, site in found["sites"].items()} == dict.fromkeys(PATIENTS, "unknown")


def test_settings_that_lack_a_key_are_not_of_a_deployment(home: Path, runs: FakeRuns, tmp_path: Path) -> None:
    started = launch(make_protocol(), home, tmp_path / "out")
    path = home / "state" / "runs" / f"{started.settings}.json"
    assert RunSettings.load(path).key == home / "release.key"
