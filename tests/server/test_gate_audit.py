import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import UsageError
from server.gate_audit import GivenAudit, audit_gate, load_audit

DIGEST, DELTA = "a" * 64, 1e-5
CLAIMS: dict[tuple[str, str], float | str] = {("north", "member"): 3.0, ("north", "public"): 3.0}


def line(epsilon: float, claim: float | str = 3.0, adversary: str = "member") -> dict[str, Any]:
    guesses = {"guesses": 40, "correct": 30, "level": 0.01, "epsilon": epsilon, "reachable": 3.2}
    return {
        "adversary": adversary, "score": "reconstruction", "strongest": guesses, "declared": [guesses],
        "claim": claim, "refuted": False,
    }  # fmt: skip


def document(*lines: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "schema_version": 1, "study": "s", "study_digest": DIGEST, "twin_digest": "b" * 64, "mode": "dpsgd",
        "delta": DELTA, "confidence": 0.95, "unit": "one patient (one row)", "neighbouring_relation": "replace",
        "canaries": {"number": 40, "site": "north", "patients": 200, "seeded": True}, "lines": list(lines),
        "cautions": ["no evidence of privacy"],
    } | changes  # fmt: skip


def given(folder: Path, *lines: dict[str, Any], **changes: Any) -> GivenAudit:
    path = folder / "audit.json"
    path.write_text(json.dumps(document(*lines, **changes)))
    return load_audit(path)


def test_a_bound_under_the_claim_passes_and_one_above_it_fails(tmp_path: Path) -> None:
    found = audit_gate(given(tmp_path, line(0.5), line(1.5, adversary="public")), DIGEST, DELTA, CLAIMS)
    assert found.passed and (found.found, found.limit) == (1.5, 3.0) and "no evidence of privacy" in found.evidence
    # `refuted` is not believed: the numbers decide.
    found = audit_gate(given(tmp_path, line(0.5), line(3.1)), DIGEST, DELTA, CLAIMS)
    assert not found.passed and (found.found, found.limit) == (3.1, 3.0) and found.fix


def test_the_smaller_of_the_two_claims_counts(tmp_path: Path) -> None:
    assert not audit_gate(given(tmp_path, line(2.0, claim=1.0)), DIGEST, DELTA, CLAIMS).passed
    assert not audit_gate(given(tmp_path, line(2.0)), DIGEST, DELTA, {("north", "member"): 1.0}).passed
    assert audit_gate(given(tmp_path, line(2.0)), DIGEST, DELTA, {}).passed  # a site that is not in this run


def test_nothing_exceeds_an_infinite_claim_and_the_result_says_so(tmp_path: Path) -> None:
    found = audit_gate(given(tmp_path, line(2.5, "infinity"), line(1.0, "infinity")), DIGEST, DELTA, {})
    assert found.passed and (found.found, found.limit) == (2.5, "infinity") and "nothing exceeds" in found.evidence


@pytest.mark.parametrize("change", [{"study_digest": "c" * 64}, {"delta": 1e-3}])
def test_an_audit_of_another_study_fails_by_name(tmp_path: Path, change: dict[str, Any]) -> None:
    found = audit_gate(given(tmp_path, line(0.1), **change), DIGEST, DELTA, CLAIMS)
    assert not found.passed and "another study" in str(found.found) and "cohortium audit" in found.fix


def test_without_evidence_it_fails_and_says_how_to_get_it(tmp_path: Path) -> None:
    for audit, claims in ((None, CLAIMS), (given(tmp_path), CLAIMS), (given(tmp_path, line(0.1)), None)):
        found = audit_gate(audit, DIGEST, DELTA, claims)
        assert not found.passed and "no evidence" in str(found.found) and "--audit" in found.fix


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema_version": 1}', json.dumps(document(line(-1.0)))])
def test_what_is_no_audit_is_refused_before_anything_runs(tmp_path: Path, text: str) -> None:
    (tmp_path / "audit.json").write_text(text)
    with pytest.raises(UsageError, match="--audit"):
        load_audit(tmp_path / "audit.json")
    with pytest.raises(UsageError, match="cannot be read"):
        load_audit(tmp_path / "none.json")
