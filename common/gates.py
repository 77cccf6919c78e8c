"""gates.json: every gate of a release with what was found, its limit, and the override of those that failed, if any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from common.config import Section
from common.gates_section import KeyId
from common.study import Study

SCHEMA_VERSION: Literal[1] = 1
GATES, QUARANTINE, NOT_RELEASED = "gates.json", "quarantine", "NOT-RELEASED.txt"
# A wrong certificate, a broken ledger or rows outside the schema make statements of the release false; nobody can allow
# that. All other gates hold something against a limit that people chose, and people can answer for another one.
NEVER_OVERRIDDEN = frozenset({"certificate", "ledgers", "schema"})

Words = Annotated[str, Field(min_length=1, strict=True)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Value = Annotated[int, Field(strict=True)] | Number | str | None


class GateRecord(Section):
    """One gate."""

    name: Words
    passed: bool = Field(strict=True)
    found: Value = Field(description="the number, or in words what was found or is missing")
    limit: Value = Field(description="what it is held against; null: nothing is declared, and the gate passes")
    fix: str = Field(description='what to do; "" for a gate that passed')
    evidence: str = Field(description="where the number comes from, and what has to be known about it")

    @property
    def overridable(self) -> bool:
        """Whether people can answer for a release in spite of it."""
        return self.name not in NEVER_OVERRIDDEN

    def in_words(self) -> str:
        """One line."""
        limit = "" if self.limit is None else f", limit {shown(self.limit)}"
        return f"{self.name}: found {shown(self.found)}{limit}"


class OverrideRecord(Section):
    """Why failed gates did not stop the release, and who signed for that beside the coordinator."""

    reason: Words
    by: Words = Field(description="who gave the second signature, in his own words")
    key_id: KeyId = Field(description="SHA-256 of his raw Ed25519 key, which is not the release key")
    at: Words = Field(description="when he signed (RFC 3339, UTC)")
    gates: tuple[Words, ...] = Field(min_length=1, description="the failed gates that are overridden")
    second_signature: dict[str, Any] = Field(description="his approval: a DSSE envelope, see docs/release.md")


class GatesDocument(Section):
    """The content of gates.json."""

    schema_version: Literal[1]
    study_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    cohort_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = Field(
        description="of the cohort.csv that the gates looked at; null: there was none"
    )
    passed: bool = Field(strict=True, description="every gate passed; an override does not make this true")
    gates: tuple[GateRecord, ...] = Field(min_length=1)
    override: OverrideRecord | None

    @model_validator(mode="after")
    def _consistent(self) -> GatesDocument:
        names = [gate.name for gate in self.gates]
        if len(set(names)) != len(names):
            raise ValueError("a gate occurs twice")
        if not set(names) >= NEVER_OVERRIDDEN:
            raise ValueError(f"a gate that every release has is missing: {', '.join(NEVER_OVERRIDDEN - set(names))}")
        if self.passed != all(gate.passed for gate in self.gates):
            raise ValueError("`passed` is not what the gates say")
        if self.override is not None:
            if set(self.override.gates) != {gate.name for gate in self.failed}:
                raise ValueError("the override names other gates than those that failed")
            if set(self.override.gates) & NEVER_OVERRIDDEN:
                raise ValueError("it overrides a gate that cannot be overridden")
        return self

    @property
    def failed(self) -> tuple[GateRecord, ...]:
        """The gates that did not pass."""
        return tuple(gate for gate in self.gates if not gate.passed)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        return self.model_dump(mode="json")

    def in_words(self) -> list[str]:
        """What the last screen and `verify` print."""
        if self.passed:
            return [f"gates: all {len(self.gates)} passed ({', '.join(gate.name for gate in self.gates)})"]
        lines = [f"gates: {len(self.failed)} of {len(self.gates)} failed"]
        lines += [f"  FAILED {gate.in_words()}" for gate in self.failed]
        if self.override is not None:
            who = f"{self.override.by} (key {self.override.key_id[:16]}…, {self.override.at})"
            lines += ["  OVERRIDDEN: it was released all the same", f"  reason: {self.override.reason}"]
            lines += [f"  second signature: {who}"]
        return lines


def read_gates(document: Any) -> GatesDocument:
    """The document if it fits its form, else `ValueError` saying in words what does not."""
    try:
        return GatesDocument.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None


def limits_in_words(study: Study) -> list[str]:
    """The gates of a study as a data steward reads them, before anything has run."""
    gates, found = study.gates, list[str]()
    limits = [limit for limit in (study.privacy.max_epsilon, gates.max_epsilon) if limit is not None]
    budget = f"no site's epsilon above {min(limits):g}" if limits else "no limit on epsilon is declared"
    found.append("certificate, ledgers and schema hold; these cannot be overridden")
    found.append(f"budget: {budget}")
    found.append(
        f"at least {min_sites(study)} site(s), {gates.min_patients} patient(s), {min_patients_per_site(study)} at each"
    )
    for key in ("max_copies", "max_singling_out", "max_linkability", "max_inference", "max_membership"):
        limit = getattr(gates, key)
        if limit is not None:
            found.append(f"{key.removeprefix('max_').replace('_', ' ')}: at most {limit:g} (upper end of its interval)")
    if gates.audit:
        found.append("audit: no lower bound above the study's epsilon")
    if gates.declared:
        found.append("gates that look at patients: no epsilon covers the decision to release, unless counts are noised")
    who = f"one of {len(gates.override_keys)} declared keys" if gates.override_keys else "any key but the release key"
    found.append(f"a failed gate can be overridden with a reason and a second signature, by {who}")
    return found


def min_sites(study: Study) -> int:
    """How many sites must have answered a round."""
    return study.gates.min_sites or study.training.min_sites


def min_patients_per_site(study: Study) -> int:
    """How many patients each of them must have."""
    return study.gates.min_patients_per_site or study.release.min_patients_per_site


def shown(value: float | str | None) -> str:
    """A number or words, as people read them."""
    if value is None:
        return "nothing"
    return value if isinstance(value, str) else f"{value:.6g}"


def failed_in_words(gates: Sequence[GateRecord]) -> str:
    """Every failed gate with its number, limit, source and what to do."""
    return "\n".join(
        f"  - {gate.in_words()}\n    from: {gate.evidence or 'nothing'}\n    what to do: {gate.fix}"
        for gate in gates
        if not gate.passed
    )


def override_summary(override: OverrideRecord | None) -> Mapping[str, Any] | None:
    """What the manifest says of an override, beside gates.json."""
    if override is None:
        return None
    return override.model_dump(mode="json", exclude={"second_signature"})
