"""The gates of a study between hospitals: what the coordinator has, quarantine, resume, and an override on record."""
# ruff: noqa: F811 - fixtures of another module are arguments here

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.audit import read_audit
from common.errors import VerifyError
from common.keys import create_key, load_ed25519
from common.override import approve
from server.consortium import RELEASE_KEY
from server.deployed import release_deployment
from server.gating import Decision, GateError
from server.launch import Launch, launch, resume
from server.release import verify_release
from server.status import coordinator_status
from tests.server.test_gate_commands import command
from tests.server.test_launch import FakeRuns, home, make_protocol, outcome, runs  # noqa: F401

REASON = "The board of the consortium accepts this for the pilot"


@pytest.fixture
def failed(home: Path, runs: FakeRuns, tmp_path: Path) -> Launch:
    """800 patients, where 900 are wanted."""
    started = launch(make_protocol(gates={"min_patients": 900}), home, tmp_path / "out")
    outcome(started.files)
    runs.finish(started.run, "completed")
    with pytest.raises(GateError, match="min_patients: found 800, limit 900"):
        release_deployment(started)
    return started


def actions(folder: Path) -> list[str]:
    return [entry["action"] for entry in read_audit(folder / "audit.jsonl")]


def test_a_failed_gate_is_logged_and_resume_asks_no_site_again(failed: Launch, home: Path, runs: FakeRuns) -> None:
    assert actions(home)[-1] == "gates failed" and "release" not in actions(home)
    line = read_audit(home / "audit.jsonl")[-1]
    assert line["outcome"] == "not released" and line["gates"] == ["min_patients: found 800, limit 900"]
    with pytest.raises(VerifyError, match="not a release"):
        verify_release(failed.files.out, home / "release.pub")
    told = coordinator_status(home)["study"]["failure"]
    assert "not released, gates failed: min_patients: found 800, limit 900" in told
    before = len(runs.configs)
    again = resume(failed.files.out, home)  # the cohort is there, in quarantine: nobody is asked for another
    assert len(runs.configs) == before and again.run == failed.run
    with pytest.raises(GateError):
        release_deployment(again)
    assert (failed.files.quarantine / "cohort.csv").exists() and failed.files.rounds.exists()


def test_an_override_is_signed_logged_and_stays(failed: Launch, home: Path, tmp_path: Path) -> None:
    release_key = load_ed25519(home / "release.key", RELEASE_KEY)
    mine = Decision(reason=REASON, approval=approve(failed.files.quarantine, release_key, by="Me", reason=REASON))
    with pytest.raises(VerifyError, match="signed with the release key: it has to be another person's"):
        release_deployment(failed, mine)
    key = tmp_path / "second.pem"
    create_key(key, Ed25519PrivateKey.generate())
    approval, out = tmp_path / "approval.json", failed.files.out
    command("approve-override", failed.files.quarantine, "--key", key, "--by", "Dr. B", "--reason", REASON,
            "--out", approval)  # fmt: skip
    shown, _ = command("release", out, "--override", REASON, "--second", approval)
    assert "OVERRIDDEN" in shown and REASON in shown
    statement = verify_release(out, home / "release.pub")
    assert statement["predicate"]["override"]["reason"] == REASON
    assert actions(home)[-2:] == ["override gates", "release"]
    line = read_audit(home / "audit.jsonl")[-2]
    assert (line["reason"], line["by"]) == (REASON, "Dr. B") and line["gates"] == ["min_patients: found 800, limit 900"]
    manifest = failed.files.manifest.read_bytes()
    release_deployment(failed)  # as `resume` does: the same release, with whatever countersignatures it has
    assert failed.files.manifest.read_bytes() == manifest


@pytest.mark.parametrize("key", ["max_copies", "max_linkability", "max_membership", "audit"])
def test_no_patient_is_here_and_a_gate_that_needs_one_says_what_is_missing(
    home: Path,
    runs: FakeRuns,
    tmp_path: Path,
    key: str,
) -> None:
    started = launch(make_protocol(gates={key: True if key == "audit" else 0.09}), home, tmp_path / "out")
    outcome(started.files)
    with pytest.raises(GateError, match="no evidence") as caught:
        release_deployment(started)
    (gate,) = caught.value.document.failed
    assert ("cohortium audit" if key == "audit" else "[evaluation]") in gate.fix
    statement = json.loads((started.files.quarantine / "privacy.json").read_text())
    assert "the decision to release" in statement["excludes"]


def spoil_ledger(started: Launch) -> None:
    document = json.loads(started.files.ledger_heads.read_text())
    document["sites"]["anna"]["length"] = 2
    started.files.ledger_heads.write_text(json.dumps(document))


def spoil_certificate(started: Launch) -> None:
    text = started.files.rounds.read_text()
    started.files.rounds.write_text(text.replace('"certificate": 11.0', '"certificate": 12.1', 1))


def lose_round(started: Launch) -> None:
    started.files.rounds.write_text("".join(started.files.rounds.read_text().splitlines(keepends=True)[:-1]))


def empty_rounds(started: Launch) -> None:
    started.files.rounds.write_text("")


def cut_cohort(started: Launch) -> None:
    started.files.cohort_parquet.write_bytes(started.files.cohort_parquet.read_bytes()[:200])


def break_heads(started: Launch) -> None:
    started.files.ledger_heads.write_text("{")


@pytest.mark.parametrize(
    ("spoil", "gate", "words"),
    [
        (spoil_ledger, "ledgers", "anna: 3 updates, a ledger of 2"),
        (break_heads, "ledgers", "not the heads of the sites' ledgers"),
        (spoil_certificate, "certificate", "12.1, limit 12"),
        (lose_round, "certificate", "2 of 3 rounds have a certificate"),
        (empty_rounds, "certificate", "0 of 3 rounds have a certificate"),
        (cut_cohort, "schema", "not a well-formed Parquet file"),
    ],
)
def test_what_nobody_can_override(
    home: Path,
    runs: FakeRuns,
    tmp_path: Path,
    spoil: Any,
    gate: str,
    words: str,
) -> None:
    started = launch(make_protocol(), home, tmp_path / "out")
    outcome(started.files)
    spoil(started)
    with pytest.raises(GateError) as caught:
        release_deployment(started)
    assert gate in [g.name for g in caught.value.document.failed] and words in caught.value.message
    assert "cannot be overridden" in str(caught.value)
    assert not started.files.manifest.exists() and not (started.files.quarantine / "report.html").exists()
    with pytest.raises(VerifyError, match="nobody can override"):
        approve(started.files.quarantine, Ed25519PrivateKey.generate(), by="B", reason=REASON)
