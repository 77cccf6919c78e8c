"""From what a run left to open or closed gates: evaluate all of them, take an override, or put the candidate away."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.digest import sha256_of_file
from common.errors import CohortiumError, ExitCode, VerifyError
from common.files import write_atomic
from common.gates import GatesDocument, failed_in_words, min_patients_per_site, min_sites, read_gates
from common.override import NOT_SUBJECTS, check_reason, override_of
from common.signing import digests_of, load_json
from common.study import Protocol
from server.gate_audit import GivenAudit, audit_gate
from server.gate_evidence import HELD_OUT, attack_evidence, simulated_attacks
from server.gate_sites import sites_evidence
from server.gates import (
    GateResult,
    attack_gate,
    budget_gate,
    certificate_gate,
    copies_gate,
    guarded,
    ledgers_gate,
    minimum_gate,
    schema_gate,
)
from server.quarantine import copied, gates_text, moved, quarantine
from server.run import RunFiles

ATTACK_KEYS = {
    "copies": "max_copies",
    "singling_out": "max_singling_out",
    "linkability": "max_linkability",
    "inference": "max_inference",
    "membership": "max_membership",
}


class GateError(CohortiumError):
    """Gates failed: nothing was released. `document` is the gates.json that lies in quarantine."""

    exit_code = ExitCode.GATES

    def __init__(self, message: str, *, fix: str, document: GatesDocument) -> None:
        super().__init__(message, fix=fix)
        self.document = document


@dataclass(frozen=True)
class Decision:
    """What the person who releases gives besides the run: an audit, and an override with its second signature."""

    audit: GivenAudit | None = None
    reason: str | None = None
    approval: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Candidate:
    """What the gates look at. None: it is not there or cannot be made, and the gates that need it fail.

    `metrics` are those of a simulation, `evaluation` is what the sites sent in a deployment.
    """

    protocol: Protocol
    rounds: Sequence[Mapping[str, Any]]
    joined: Mapping[str, int]
    ledger_problems: Sequence[str]
    ledger_source: str
    cohort_problems: Sequence[str]
    rows: int
    cohort_sha256: str | None
    statement: Mapping[str, Any] | None
    simulation: bool
    metrics: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    audit: GivenAudit | None = field(default=None)


def unnoised_gates(protocol: Protocol, *, simulation: bool, audit: GivenAudit | None) -> tuple[str, ...]:
    """The gates of this release that decide on un-noised numbers of patients: no ε covers the decision to release."""
    noised = not simulation and protocol.study.evaluation.method == "accounted"
    names = dict.fromkeys(protocol.study.gates.declared)
    if audit is not None:
        names["audit"] = None
    return tuple(name for name in names if name == "audit" or not noised)


def judge(candidate: Candidate) -> GatesDocument:
    """Every gate of the study, evaluated; none stops another."""
    protocol = candidate.protocol
    study, gates, digest = protocol.study, protocol.study.gates, protocol.digest
    bound = study.model.decoder_lipschitz if study.training.mode != "none" else None
    limits = [limit for limit in (study.privacy.max_epsilon, gates.max_epsilon) if limit is not None]
    found = [
        guarded(
            "certificate",
            bound,
            lambda: certificate_gate(
                [line.get("certificate") for line in candidate.rounds], max(1, study.training.rounds), bound
            ),
        ),
        guarded(
            "ledgers",
            None,
            lambda: ledgers_gate(candidate.ledger_problems, len(candidate.joined), candidate.ledger_source),
        ),
        guarded("schema", candidate.rows, lambda: schema_gate(candidate.cohort_problems, candidate.rows)),
        guarded(
            "budget",
            min(limits, default=None),
            lambda: budget_gate(_largest(candidate.statement), min(limits, default=None)),
        ),
        *_minimums(candidate),
        *(_attacks(candidate, name) for name in gates.declared if name in ATTACK_KEYS),
    ]
    if gates.audit or candidate.audit is not None:
        claims = None if candidate.statement is None else _claims(candidate.statement)
        found.append(guarded("audit", None, lambda: audit_gate(candidate.audit, digest, study.privacy.delta, claims)))
    records = tuple(result.record() for result in found)
    passed = all(record.passed for record in records)
    return GatesDocument(
        schema_version=1,
        study_digest=digest,
        cohort_sha256=candidate.cohort_sha256,
        passed=passed,
        gates=records,
        override=None,
    )


def resolve(
    files: RunFiles, protocol: Protocol, document: GatesDocument, decision: Decision, release_key: str
) -> tuple[GatesDocument, CohortiumError | None]:
    """The document, with its override if there is a valid one, and why nothing may be released, None if it may.

    An override that this run was released with before holds as long as it fits. The error is a `GateError`, or a
    `VerifyError` for a second signature that was given and does not fit.
    """
    if document.passed:
        return document, None
    approval = decision.approval or _former_approval(files)
    if approval is not None and statements_hold(document):
        try:
            return _overridden(files, protocol, document, approval, decision.reason, release_key), None
        except CohortiumError as error:
            if decision.approval is not None:
                return document, error
    return document, failure(files, document)


def statements_hold(document: GatesDocument) -> bool:
    """Whether nothing failed that would make a report false: only then there is one, released or in quarantine."""
    return all(gate.overridable for gate in document.failed)


def require_open(files: RunFiles, document: GatesDocument, error: CohortiumError | None) -> None:
    """Write gates.json; with an error put the candidate into quarantine and raise it."""
    if error is not None:
        quarantine(files, document)
        raise error
    write_atomic(files.gates, gates_text(document))


def _overridden(
    files: RunFiles,
    protocol: Protocol,
    document: GatesDocument,
    approval: Mapping[str, Any],
    reason: str | None,
    release_key: str,
) -> GatesDocument:
    allowed = protocol.study.gates.override_keys
    override = override_of(approval, document, _digests(files), release_key=release_key, allowed=allowed)
    if reason is not None and check_reason(reason) != override.reason:
        raise VerifyError(
            "the second signature is under another reason than --override gives",
            fix=f"repeat the reason that was signed: {override.reason!r}",
        )
    return GatesDocument.model_validate({**document.to_json(), "override": override.model_dump()})


def failure(files: RunFiles, document: GatesDocument) -> GateError:
    """The error that names every failed gate and what can be done."""
    never = [gate.name for gate in document.failed if not gate.overridable]
    how = (
        f"{', '.join(never)} cannot be overridden"
        if never
        else "to release all the same, see `cohortium approve-override --help` and docs/release.md"
    )
    return GateError(
        f"{len(document.failed)} of {len(document.gates)} gates failed; nothing was released\n"
        f"{failed_in_words(document.gates)}",
        fix=f"the candidate is in {files.quarantine}; mend what failed, then `cohortium release {files.out}`; {how}",
        document=document,
    )


def _digests(files: RunFiles) -> dict[str, str]:
    """SHA-256 of the candidate's files, wherever they lie."""
    found = {}
    for path in [*moved(files), *copied(files)]:
        if path.exists() and path.name not in NOT_SUBJECTS:
            with path.open("rb") as file:
                found[path.name] = digests_of(file)["sha256"]
    return found


def _former_approval(files: RunFiles) -> Mapping[str, Any] | None:
    """The approval in the gates.json of an earlier release of this run."""
    try:
        override = read_gates(load_json(files.gates.read_bytes())).override
    except (OSError, ValueError):
        return None
    return None if override is None else override.second_signature


def _minimums(candidate: Candidate) -> Iterable[GateResult]:
    """Sites that answered a round, and their patients."""
    study = candidate.protocol.study
    answered = {site for line in candidate.rounds for site in line.get("answered", ())}
    patients = {site: number for site, number in candidate.joined.items() if site in answered}
    source = "rounds.jsonl and sites.json: sites that answered a round at least, and their patients"
    again = "a run with more of them; or another minimum in a study that all sites approve"
    total, least = sum(patients.values()), min(patients.values(), default=None)
    yield guarded("min_sites", None, lambda: minimum_gate("min_sites", len(patients), min_sites(study), source, again))
    yield guarded(
        "min_patients",
        None,
        lambda: minimum_gate("min_patients", total, study.gates.min_patients, source, again),
    )
    wanted = min_patients_per_site(study)
    yield guarded(
        "min_patients_per_site",
        None,
        lambda: minimum_gate("min_patients_per_site", least, wanted, source, again),
    )


def _attacks(candidate: Candidate, name: str) -> GateResult:
    protocol = candidate.protocol
    limit = getattr(protocol.study.gates, ATTACK_KEYS[name])

    def gate() -> GateResult:
        secrets = protocol.study.evaluation.secrets or ((protocol.target,) if protocol.target else ())
        if candidate.simulation:
            report, why = simulated_attacks(candidate.metrics)
            sampled = ((candidate.metrics or {}).get("sampled") or {}).get("attacks")
            source = "metrics.json: attacks"
            evidence = attack_evidence(
                name, report, why_missing=why, source=source, get=HELD_OUT, secrets=secrets, sampled=sampled
            )
        else:
            evidence = sites_evidence(name, candidate.evaluation, secrets)
        return copies_gate(evidence, limit) if name == "copies" else attack_gate(name, evidence, limit)

    return guarded(name, limit, gate)


def _largest(statement: Mapping[str, Any] | None) -> dict[str, float | str] | None:
    """The largest ε of every site; infinite beats every number."""
    if statement is None:
        return None
    found: dict[str, float | str] = {}
    for entry in statement["entries"]:
        both = (found.get(entry["site"], 0.0), entry["epsilon"])
        found[entry["site"]] = next((value for value in both if isinstance(value, str)), max(both, key=_order))
    return found


def _order(epsilon: float | str) -> float:
    return epsilon if isinstance(epsilon, float) else math.inf


def _claims(statement: Mapping[str, Any]) -> dict[tuple[str, str], float | str]:
    return {(entry["site"], entry["adversary"]): entry["epsilon"] for entry in statement["entries"]}


def cohort_digest(path: Path) -> str | None:
    """SHA-256 of a cohort.csv, None if it is not there."""
    return sha256_of_file(path) if path.is_file() else None


def read_evaluation(path: Path) -> Mapping[str, Any] | None:
    """evaluation.json, None if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
