"""What a verifier can check of a release's gates without the run: that gates.json is whole and its override signed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.errors import CohortiumError
from common.gates import GatesDocument, override_summary, read_gates
from common.override import approval_problems, read_approval


def check_gates_document(
    document: Any,
    study: Any,
    predicate: Mapping[str, Any],
    subjects: Mapping[str, Mapping[str, str]],
) -> tuple[GatesDocument | None, list[str]]:
    """The gates of a signed gates.json, None if it has another form, and every problem with them.

    `study` is the content of study.json, `subjects` are the digests in the manifest. The second signature must hold,
    must be over these very files, and may be neither the coordinator's nor that of a key the study does not name.
    """
    try:
        gates = read_gates(document)
    except ValueError as error:
        return None, [f"signed, but it does not fit its form: {error}"]
    problems = []
    if gates.study_digest != predicate.get("study"):
        problems.append("it is of another study than the manifest")
    if gates.cohort_sha256 != subjects.get("cohort.csv", {}).get("sha256"):
        problems.append("the gates looked at another cohort.csv")
    if not gates.passed and gates.override is None:
        problems.append(f"{', '.join(gate.name for gate in gates.failed)} failed and nobody overrode it")
    if predicate.get("override") != override_summary(gates.override):
        problems.append("the manifest and it disagree about an override")
    if gates.override is not None:
        problems += _second_signature(gates, study, predicate, subjects)
    return gates, problems


def _second_signature(
    gates: GatesDocument, study: Any, predicate: Mapping[str, Any], subjects: Mapping[str, Mapping[str, str]]
) -> list[str]:
    override = gates.override
    assert override is not None
    try:
        approval = read_approval(override.second_signature, "its second signature")
    except CohortiumError as error:
        return [f"the second signature under the override: {error.message}"]
    content = approval.content
    said = (content.reason, content.by, content.at, approval.key_id)
    found = []
    if said != (override.reason, override.by, override.at, override.key_id):
        found.append("the second signature says another reason, person, time or key than the override")
    release_key = predicate.get("signers", {}).get("coordinator")
    files = {name: digest["sha256"] for name, digest in subjects.items()}
    about = approval_problems(approval, gates.study_digest, gates.failed, files, release_key, _allowed(study))
    return found + [f"the second signature: {problem}" for problem in about]


def _allowed(study: Any) -> list[str]:
    """gates.override_keys of study.json; none where there is no such file."""
    try:
        return [str(key) for key in study["study"]["gates"]["override_keys"]]
    except (KeyError, TypeError):
        return []
