"""The gates of a release: pure functions from values to results. No gate makes up for another, and none is open.

What is missing fails, what is not a number fails, and an exception fails the gate in which it occurs: `guarded`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import CohortiumError
from common.gates import GateRecord

INFINITE = "infinity"
# Three kinds of copies are looked for: together they are called copies by chance in one cohort of twenty at most.
COPIES_LEVEL = 0.05 / 3


@dataclass(frozen=True)
class GateResult:
    """What one gate found. `fix` is empty if it passed."""

    name: str
    passed: bool
    found: float | str | None
    limit: float | str | None
    fix: str
    evidence: str = ""

    def record(self) -> GateRecord:
        """As it stands in gates.json."""
        return GateRecord.model_validate(vars(self))


@dataclass(frozen=True)
class Measured:
    """One attack on patients: how much better it does on them than on the control, and the end of its 95 % interval.

    `p_value` is of "by chance"; None where it is not used. `beyond_chance` says, where no p-value can be had, that the
    interval lies above what chance gives.
    """

    what: str
    value: float
    high: float
    p_value: float | None = None
    beyond_chance: bool = False


@dataclass(frozen=True)
class AttackEvidence:
    """What was measured for one gate, and what is `missing` with the way to get it."""

    measured: tuple[Measured, ...]
    missing: tuple[str, ...]
    source: str
    get: str


def guarded(name: str, limit: float | str | None, gate: Callable[[], GateResult]) -> GateResult:
    """The result of a gate; an exception fails it, and its text, which may quote a cell, is not told."""
    try:
        return gate()
    except CohortiumError as error:
        return GateResult(
            name, False, f"could not be evaluated: {error.message}", limit, error.fix or "see the message"
        )
    except Exception as error:
        return GateResult(
            name,
            False,
            f"could not be evaluated: an unforeseen {type(error).__name__}",
            limit,
            "look at the evidence named in docs/release.md; if it is whole, report a defect of Cohortium",
        )


def certificate_gate(certificates: Sequence[Any], rounds: int, bound: float | None) -> GateResult:
    """Every round's Lipschitz certificate is at most the declared bound; `bound` None: none is declared (mode none)."""
    source = "rounds.jsonl: the certificate of every round, of an anchored study that of its decoder"
    if len(certificates) != rounds:
        return GateResult(
            "certificate", False, f"{len(certificates)} of {rounds} rounds have a certificate", bound,
            "finish the study (`cohortium resume`), or restore rounds.jsonl from the same run", source,
        )  # fmt: skip
    wrong = [c for c in certificates if not _is_number(c) or c < 0]
    if wrong:
        return GateResult(
            "certificate", False, f"{len(wrong)} rounds have no number as their certificate", bound,
            "restore rounds.jsonl from the same run", source,
        )  # fmt: skip
    largest = max(certificates)
    if bound is None:
        return GateResult("certificate", True, largest, None, "", f"{source}; no bound is declared in this mode")
    fix = "" if largest <= bound else "a defect or a tampered file: release nothing of this run"
    return GateResult("certificate", largest <= bound, largest, bound, fix, source)


def ledgers_gate(problems: Sequence[str], sites: int, source: str) -> GateResult:
    """The ledger of every site holds and shows every update that was taken from it; `problems` say what does not."""
    limit = f"the ledgers of {sites} sites hold"
    if not problems:
        return GateResult("ledgers", sites > 0, f"{sites} hold", limit, "" if sites else "no site took part", source)
    fix = "restore ledgers, rounds and heads from the same moment; nothing that a broken ledger says can be relied on"
    return GateResult("ledgers", False, "; ".join(problems), limit, fix, source)


def budget_gate(epsilons: Mapping[str, float | str] | None, limit: float | None) -> GateResult:
    """No site's unconditional ε is above the limit; None: none is declared. `epsilons` None: there is no statement."""
    source = "privacy.json: the largest unconditional ε of any site and adversary, in nats at the study's δ"
    if not epsilons:
        return GateResult(
            "budget", False, "no ε is stated", limit, "mend what keeps the statement from being made", source
        )
    worst = max(epsilons, key=lambda site: _number(epsilons[site]))
    value = _number(epsilons[worst])
    found = value if math.isfinite(value) else INFINITE
    source += f" ({worst})"
    if limit is None:
        return GateResult("budget", not math.isnan(value), found, None, "", f"{source}; the study declares no limit")
    if value <= limit:
        return GateResult("budget", True, found, limit, "", source)
    fix = "a study that spends less: fewer rounds, more noise, a smaller epsilon; or another limit that sites approve"
    return GateResult("budget", False, found, limit, fix, source)


def schema_gate(problems: Sequence[str], rows: int) -> GateResult:
    """Both files of the cohort hold the rows, columns and markers that were declared, every value within the schema."""
    limit = f"{rows} valid rows in both files"
    source = "cohort.csv and cohort.parquet, read anew"
    if problems:
        fix = "a defect or a changed file: release nothing of this run; another one makes a cohort anew"
        return GateResult("schema", False, "; ".join(problems), limit, fix, source)
    return GateResult("schema", True, f"{rows} valid rows in both files", limit, "", source)


def minimum_gate(name: str, found: int | None, least: int, source: str, fix: str) -> GateResult:
    """A number of sites or patients is large enough; None: it is not known."""
    if found is None:
        return GateResult(name, False, "not known", least, fix, source)
    return GateResult(name, found >= least, found, least, "" if found >= least else fix, source)


def attack_gate(name: str, evidence: AttackEvidence, limit: float) -> GateResult:
    """Every attack of this kind was carried out, and the upper end of its interval is at most the limit.

    The upper end: what the patients at hand do not rule out counts, so that too few of them do not open the gate.
    """
    bad = _no_evidence(name, evidence, limit)
    if bad is not None:
        return bad
    worst = max(evidence.measured, key=lambda each: each.high)
    source = f"{evidence.source}; {worst.what}: {worst.value:.4g}, upper end of its 95 % interval"
    if worst.high <= limit:
        return GateResult(name, True, _up(worst.high), limit, "", source)
    if worst.value <= limit:
        fix = "more held-out patients may narrow the interval; otherwise a study that learns less: fewer rounds, noise"
    else:
        fix = "the value itself is above the limit: a study that learns less, with fewer rounds, or noise"
    return GateResult(name, False, _up(worst.high), limit, fix, source)


def copies_gate(evidence: AttackEvidence, limit: float) -> GateResult:
    """As `attack_gate`, and none of the kinds of copies occurs more often than chance allows."""
    found = attack_gate("copies", evidence, limit)
    beyond = [each for each in evidence.measured if each.beyond_chance or _unlikely(each.p_value)]
    if not beyond or evidence.missing:
        return found
    worst = min(beyond, key=lambda each: each.p_value or 0.0)
    how = "the 95 % interval lies above chance" if worst.p_value is None else f"p = {worst.p_value:.2g}"
    source = f"{evidence.source}; {worst.what}: {worst.value:.4g} more of the patients than of the control have one"
    words = f"copies that are not by chance ({how})"
    fix = "patients are in the cohort: release nothing of it, and train shorter or with noise"
    return GateResult("copies", False, words, limit, fix, source)


def _unlikely(p_value: float | None) -> bool:
    return p_value is not None and p_value < COPIES_LEVEL


def _no_evidence(name: str, evidence: AttackEvidence, limit: float) -> GateResult | None:
    if evidence.missing or not evidence.measured:
        missing = "; ".join(evidence.missing) or "nothing was measured"
        return GateResult(name, False, f"no evidence: {missing}", limit, evidence.get, evidence.source)
    if not all(math.isfinite(each.high) and math.isfinite(each.value) for each in evidence.measured):
        return GateResult(name, False, "no evidence: a result is not a number", limit, evidence.get, evidence.source)
    return None


def _number(value: Any) -> float:
    """Infinite for "infinity" and for everything that is not a number: in doubt the larger ε."""
    return float(value) if _is_number(value) else math.inf


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _up(value: float) -> float:
    """Six digits, rounded up: what is shown is a bound as well."""
    return math.ceil(value * 1e6) / 1e6
