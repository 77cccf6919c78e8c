"""The gate on an audit: no lower bound that canaries gave may exceed the ε that is claimed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import validate
from common.errors import UsageError
from common.signing import load_json
from server.audit_records import Audit
from server.gates import INFINITE, GateResult

NAME = "audit"
HOW = "`cohortium audit study.toml --sites DIR --out DIR`, then `cohortium release RUN --audit DIR/audit.json`"


@dataclass(frozen=True)
class GivenAudit:
    """An audit.json as it was given: its bytes, and what they say."""

    content: bytes
    audit: Audit

    @property
    def document(self) -> dict[str, Any]:
        """As plain JSON data."""
        return self.audit.model_dump(mode="json")


def load_audit(path: Path) -> GivenAudit:
    """Read an audit.json; `UsageError` if it cannot be read or is none. Of which study it is, the gate asks."""
    try:
        content = path.read_bytes()
        document = load_json(content)
    except OSError as error:
        raise UsageError(f"--audit {path}: cannot be read ({error.strerror})", fix="name an audit.json") from None
    except ValueError:
        raise UsageError(f"--audit {path}: not JSON", fix="name the audit.json of `cohortium audit`") from None
    return GivenAudit(content, validate(Audit, document, f"--audit {path}", UsageError))


def audit_gate(
    given: GivenAudit | None, digest: str, delta: float, claims: Mapping[tuple[str, str], float | str] | None
) -> GateResult:
    """Every lower bound of an audit of this very study is at most the ε claimed, by the audit and by this release.

    `claims` are the ε of privacy.json by site and adversary. An infinite ε is exceeded by nothing, and the result says
    so.
    """
    if given is None:
        return GateResult(NAME, False, "no evidence: no audit was given", "the claimed ε", HOW)
    audit, source = given.audit, f"audit.json, SHA-256 {hashlib.sha256(given.content).hexdigest()[:16]}…"
    if (audit.study_digest, audit.delta) != (digest, delta):
        what = f"an audit of another study ({audit.study}, digest {audit.study_digest[:16]}…, δ = {audit.delta:g})"
        return GateResult(NAME, False, what, f"an audit of {digest[:16]}… at δ = {delta:g}", HOW, source)
    if not audit.lines or claims is None:
        why = "the audit holds no attack" if not audit.lines else "no ε is stated"
        return GateResult(NAME, False, f"no evidence: {why}", "the claimed ε", HOW, source)
    margins: list[tuple[float, float, float, str]] = []
    for line in audit.lines:
        claim = min(_bound(line.claim), _bound(claims.get((audit.canaries.site, line.adversary), INFINITE)))
        bound = max(each.epsilon for each in [line.strongest, *line.declared])
        margins.append((claim - bound, bound, claim, f"{line.score}, {line.adversary}"))
    margin, bound, claim, what = min(margins, key=lambda each: (each[0], -each[1]))
    source += f"; {what}: lower bound at {audit.confidence:.0%} confidence, no evidence of privacy"
    if not math.isfinite(claim):
        bound = max(each[1] for each in margins)
        return GateResult(NAME, True, bound, INFINITE, "", f"{source}; the claim is infinite, which nothing exceeds")
    fix = "" if margin >= 0 else "release nothing of this study; repeat the audit, and report a defect if this stays"
    return GateResult(NAME, margin >= 0, bound, claim, fix, source)


def _bound(epsilon: float | str) -> float:
    return epsilon if isinstance(epsilon, float) else math.inf
