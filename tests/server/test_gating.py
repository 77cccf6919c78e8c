"""A simulation's candidate before its gates: quarantine, another attempt, and an override with a second signature."""

import json
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.bundles import MANIFEST, in_words
from common.errors import CohortiumError, ExitCode, OutputError, UsageError, VerifyError
from common.gates import GATES, NOT_RELEASED, GatesDocument, read_gates
from common.keys import key_id
from common.override import approve
from common.study import Protocol, Study
from server.gating import Decision, GateError
from server.release import examine_release, release_simulation, verify_release
from server.release_bundle import bundle_release
from server.run import RunFiles
from server.simulation import SimulationResult
from tests.server.test_release import make_protocol, make_result, make_table

REASON = "The ethics board accepts fewer patients for this pilot"
SECOND = Ed25519PrivateKey.generate()
ALWAYS = ["certificate", "ledgers", "schema", "budget", "min_sites", "min_patients", "min_patients_per_site"]


def gated(**gates: Any) -> Protocol:
    base = make_protocol()
    document = base.study.document()
    document["gates"] = {**document["gates"], **gates}
    return Protocol(Study.model_validate(document), base.schema)


def run(folder: Path, **gates: Any) -> SimulationResult:
    return make_result(folder / "out", gated(**gates))


def refused(result: SimulationResult, decision: Decision | None = None, **options: Any) -> GatesDocument:
    """The gates of a release that fails; the candidate is then in quarantine and nowhere else."""
    with pytest.raises(GateError) as caught:
        release_simulation(result, None, decision=decision, thorough=False, **options)
    assert caught.value.exit_code is ExitCode.GATES
    in_quarantine(result.files)
    for gate in caught.value.document.failed:
        assert gate.name in caught.value.message and gate.fix in caught.value.message
    return caught.value.document


def in_quarantine(files: RunFiles) -> None:
    folder = files.quarantine
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    names = {path.name for path in folder.iterdir()}
    assert {"cohort.csv", "cohort.parquet", GATES, NOT_RELEASED, "study.json", "rounds.jsonl", "sites.json"} <= names
    assert MANIFEST not in names
    left = {path.name for path in files.out.iterdir()}
    assert not left & {"cohort.csv", "cohort.parquet", "report.html", "privacy.json", "metrics.json", GATES, MANIFEST,
                       "README.txt", "simulation-key.pub"}  # fmt: skip
    for place in (files.out, folder):
        with pytest.raises(VerifyError, match="not a release"):
            verify_release(place, None)
        with pytest.raises(VerifyError, match="not a release"):
            bundle_release(place, files.out.parent / "x.tar.zst")


def approval(result: SimulationResult, key: Ed25519PrivateKey = SECOND, reason: str = REASON) -> dict[str, Any]:
    return approve(result.files.quarantine, key, by="Dr. B. Second", reason=reason)


def overridden(result: SimulationResult, **options: Any) -> dict[str, Any]:
    decision = Decision(reason=REASON, approval=approval(result))
    return release_simulation(result, None, decision=decision, thorough=False, **options)


def test_a_study_without_a_section_has_the_gates_that_every_study_has(tmp_path: Path) -> None:
    result = make_result(tmp_path / "out", make_protocol())
    summary = release_simulation(result, None, thorough=False)
    document = read_gates(json.loads(result.files.gates.read_text()))
    assert document.passed and [gate.name for gate in document.gates] == ALWAYS
    assert summary["gates"] == document.to_json() and not result.files.quarantine.exists()
    found = examine_release(result.files.out)
    assert found.gates == document and any(line.startswith("gates: all 7 passed") for line in in_words(found))
    assert found.statement["predicate"]["override"] is None
    assert json.loads(result.files.privacy.read_text())["excludes"] is None


def test_a_failed_gate_names_itself_and_nothing_is_released(tmp_path: Path) -> None:
    result = run(tmp_path, min_patients=101)
    document = refused(result)
    (failed,) = document.failed
    assert (failed.name, failed.found, failed.limit) == ("min_patients", 100, 101) and failed.fix
    notice = (result.files.quarantine / NOT_RELEASED).read_text()
    assert "not a release" in notice and "min_patients: found 100, limit 101" in notice
    assert refused(result) == document  # again gives the same


@pytest.mark.parametrize(
    ("gates", "name"),
    [({"min_sites": 3}, "min_sites"), ({"min_patients_per_site": 41}, "min_patients_per_site"),
     ({"max_copies": 1.0}, "copies"), ({"max_singling_out": 1.0}, "singling_out"),
     ({"max_linkability": 1.0}, "linkability"), ({"max_inference": 1.0}, "inference"),
     ({"max_membership": 1.0}, "membership"), ({"audit": True}, "audit")],
)  # fmt: skip
def test_every_declared_gate_closes_without_its_evidence(tmp_path: Path, gates: dict[str, Any], name: str) -> None:
    document = refused(run(tmp_path, **gates))
    assert [gate.name for gate in document.failed] == [name] and document.failed[0].overridable


def test_evidence_that_is_given_later_opens_the_gates(tmp_path: Path) -> None:
    result = run(tmp_path, max_linkability=1.0, max_copies=0.2)
    assert {gate.name for gate in refused(result).failed} == {"linkability", "copies"}
    summary = release_simulation(result, make_table(result.protocol, 300, 2))
    assert summary["gates"]["passed"] and not result.files.quarantine.exists()
    verify_release(result.files.out, None)
    # These gates look at patients without noise: every ε says that it excludes the decision to release.
    statement = json.loads(result.files.privacy.read_text())
    assert "copies, linkability" in statement["excludes"] and "the decision to release" in statement["excludes"]
    assert "the decision to release" in summary["epsilon_in_words"]


def test_metrics_of_an_earlier_attempt_are_not_measured_again(tmp_path: Path) -> None:
    result = run(tmp_path, max_linkability=0.0)
    with pytest.raises(GateError):
        release_simulation(result, make_table(result.protocol, 300, 2))
    kept = (result.files.quarantine / "metrics.json").read_bytes()
    document = refused(result, metrics=json.loads(kept))
    assert "upper end" in document.failed[0].evidence  # the evidence is there still
    assert (result.files.quarantine / "metrics.json").read_bytes() == kept


def test_an_override_releases_and_is_told_everywhere(tmp_path: Path) -> None:
    result = run(tmp_path, min_patients=101)
    refused(result)
    summary = overridden(result)
    assert not summary["gates"]["passed"] and not result.files.quarantine.exists()
    document = read_gates(json.loads(result.files.gates.read_text()))
    override = document.override
    assert override is not None and override.gates == ("min_patients",)
    assert (override.reason, override.by, override.key_id) == (REASON, "Dr. B. Second", key_id(SECOND.public_key()))
    found = examine_release(result.files.out).require()
    assert found.statement["predicate"]["override"] == override.model_dump(mode="json", exclude={"second_signature"})
    shown, readme = "\n".join(in_words(found)), (result.files.out / "README.txt").read_text()
    for text in (shown, readme):
        assert "OVERRIDDEN" in text and REASON in text and "Dr. B. Second" in text and "found 100, limit 101" in text
    assert "not among yours" in shown
    # It holds for the same candidate as long as it fits, and is not asked for again.
    again = release_simulation(result, None, thorough=False)
    assert again["gates"] == summary["gates"]
    verify_release(result.files.out, None)


def test_a_changed_candidate_needs_another_approval(tmp_path: Path) -> None:
    result = run(tmp_path, min_patients=101)
    refused(result)
    decision = Decision(reason=REASON, approval=approval(result))
    rounds = result.files.rounds
    rounds.write_text(rounds.read_text().replace('"seconds": 0.5', '"seconds": 0.6'))
    with pytest.raises(VerifyError, match=r"rounds\.jsonl is not the file that was approved"):
        release_simulation(result, None, decision=decision, thorough=False)
    in_quarantine(result.files)


def test_an_override_does_not_outlive_what_it_was_for(tmp_path: Path) -> None:
    result = run(tmp_path, min_patients=101)
    refused(result)
    overridden(result)
    rounds = result.files.rounds
    rounds.write_text(rounds.read_text().replace('"seconds": 0.5', '"seconds": 0.6'))
    refused(result)  # the manifest of the release is withdrawn with the rest
    assert (result.files.quarantine / "former-manifest.json").is_file()


def test_who_may_sign_and_what(tmp_path: Path) -> None:
    result = run(tmp_path, min_patients=101, override_keys=[key_id(SECOND.public_key())])
    refused(result)
    stranger = Ed25519PrivateKey.generate()
    for given, words in (
        (Decision(reason=REASON, approval=approval(result, stranger)), "not among gates.override_keys"),
        (Decision(reason=f"{REASON}, or not", approval=approval(result)), "under another reason"),
    ):
        with pytest.raises(VerifyError, match=words):
            release_simulation(result, None, decision=given, thorough=False)
        in_quarantine(result.files)
    overridden(result)


def test_a_wrong_certificate_and_foreign_rows_cannot_be_overridden(tmp_path: Path) -> None:
    result = run(tmp_path, min_patients=101)
    refused(result)
    decision = Decision(reason=REASON, approval=approval(result))
    original = result.files.rounds.read_text()
    lines = [json.loads(line) for line in original.splitlines()]
    lines[1]["certificate"] = 12.5
    result.files.rounds.write_text("".join(json.dumps(line) + "\n" for line in lines))
    document = refused(result, decision)
    assert {gate.name for gate in document.failed} == {"certificate", "min_patients"}
    assert not (result.files.quarantine / "report.html").exists()  # it would say that the bound holds
    with pytest.raises(VerifyError, match="nobody can override"):
        approval(result)
    result.files.rounds.write_text(original)
    cohort = result.files.quarantine / "cohort.csv"
    cohort.write_text(cohort.read_text().replace("small", "smell", 1))
    document = refused(result, decision)
    assert "1 row(s) without the marker cohortium_study" in str(document.gates[2].found)
    assert {gate.name for gate in document.failed} >= {"schema", "min_patients"}


def test_a_ledger_that_does_not_show_an_update_closes(tmp_path: Path) -> None:
    result = run(tmp_path)
    lines = [json.loads(line) for line in result.files.rounds.read_text().splitlines()]
    for name in ("anna", "berta"):
        shutil.copy(result.files.ledgers / f"{name}.sqlite", tmp_path / f"{name}.sqlite")
    (result.files.ledgers / "berta.sqlite").unlink()
    lines[1]["round"] = 3
    result.files.rounds.write_text("".join(json.dumps(line) + "\n" for line in lines))
    document = refused(result)
    assert document.failed[0].name == "ledgers"
    words = str(document.failed[0].found)
    assert "berta: there is no ledger" in words and "anna: its ledger does not show the update of 1 round(s)" in words
    assert "no ε is stated" in str(document.gates[3].found)  # the budget is not known either


def test_a_failure_in_between_leaves_the_candidate_in_quarantine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(tmp_path, min_patients=101)
    refused(result)
    decision = Decision(reason=REASON, approval=approval(result))

    def full(*_: Any, **__: Any) -> str:
        raise OutputError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("server.release.render_report", full)
        with pytest.raises(OutputError):
            release_simulation(result, None, decision=decision, thorough=False)
    in_quarantine(result.files)
    overridden(result)


def test_what_is_forged_in_a_release_is_named(tmp_path: Path) -> None:
    """The coordinator signs anew what he changed: the second signature does not cover it."""
    from server.release import sign_release

    result = run(tmp_path, min_patients=101)
    refused(result)
    overridden(result)
    document = json.loads(result.files.gates.read_text())

    def forged(**changes: Any) -> str:
        changed = json.loads(json.dumps(document))
        changed["override"] |= changes
        result.files.gates.write_text(json.dumps(changed))
        sign_release(result.files, result.protocol, {})
        with pytest.raises(VerifyError) as caught:
            verify_release(result.files.out, None)
        return str(caught.value)

    assert "another reason" in forged(reason="Somebody said that this is quite all right")
    assert "another reason, person, time or key" in forged(key_id="0" * 64)
    assert "second signature" in forged(second_signature={"payload": ""})
    result.files.gates.write_text(json.dumps(document))
    text = result.files.sites.read_text()
    result.files.sites.write_text(text + " ")
    sign_release(result.files, result.protocol, {})
    with pytest.raises(VerifyError, match=r"sites\.json is not the file that was approved"):
        verify_release(result.files.out, None)
    result.files.sites.write_text(text)
    document["override"] = None
    result.files.gates.write_text(json.dumps(document))
    sign_release(result.files, result.protocol, {})
    with pytest.raises(VerifyError, match="min_patients failed and nobody overrode it"):
        verify_release(result.files.out, None)


@pytest.mark.parametrize(
    "reason", ["", "because", "ok ok ok ok ok ok ok ok ok", "x" * 3000, "four good words\x1b[2J here"]
)
def test_a_reason_has_to_say_something(tmp_path: Path, reason: str) -> None:
    result = run(tmp_path, min_patients=101)
    refused(result)
    with pytest.raises(UsageError, match="reason"):
        approval(result, reason=reason)


def test_only_a_candidate_in_quarantine_can_be_approved(tmp_path: Path) -> None:
    result = make_result(tmp_path / "out", make_protocol())
    release_simulation(result, None, thorough=False)
    for folder in (result.files.out, tmp_path):
        with pytest.raises(CohortiumError, match="no candidate in quarantine"):
            approve(folder, SECOND, by="B", reason=REASON)
