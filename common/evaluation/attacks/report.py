"""The result of the attack suite: counts that can be added over hospitals, and what they say as plain JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from common.errors import DataError
from common.evaluation.attacks.counts import AttackCounts, NotPossible, add_counts
from common.evaluation.attacks.risk import Risk, risk
from common.evaluation.attacks.scores import LEVELS, ScoreCounts, auroc, mann_whitney, true_positives

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class AttackReport:
    """Counts of every attack, histograms of every membership score, and what was not possible.

    `synthetic_rows` is of the cohort. `train_rows` and `control_rows` count patients, `reference_rows` too (None: no
    reference patients were given). `control_in_train` and `reference_in_train` count the rows of the control and of the
    reference that equal a training row in every column: few by chance in wide tables, and where many, the patients were
    not held out and the attacks look weaker than they are. `sites` counts hospitals.
    """

    synthetic_rows: int
    train_rows: int
    control_rows: int
    reference_rows: int | None
    control_in_train: int
    reference_in_train: int | None
    counts: tuple[AttackCounts, ...]
    scores: tuple[ScoreCounts, ...]
    not_possible: tuple[NotPossible, ...]
    sites: int = 1

    def to_json(self, confidence: float = 0.95) -> dict[str, Any]:
        """Counts, rates, intervals at `confidence` and readings; None for undefined."""
        risks = [risk(each, confidence) for each in self.counts]
        memberships = [_membership(each, confidence) for each in self.scores]
        p_values = [each.p_value for each in risks if each.p_value is not None]
        for each in memberships:
            p_values += [each["p_value"], *(t["p_value"] for t in each["true_positives"] if t["possible"])]
        return {
            "schema_version": SCHEMA_VERSION,
            "caution": self.caution(),
            "confidence": confidence,
            "sites": self.sites,
            "rows": {
                "synthetic": self.synthetic_rows,
                "train": self.train_rows,
                "control": self.control_rows,
                "reference": self.reference_rows,
            },
            "control_rows_in_train": self.control_in_train,
            "reference_rows_in_train": self.reference_in_train,
            "overall": _overall(p_values, confidence),
            "attacks": [_attack(c, r) for c, r in zip(self.counts, risks, strict=True)],
            "membership": memberships,
            "not_possible": [asdict(each) for each in self.not_possible],
        }

    def caution(self) -> str:
        """The sentence that must stand beside these numbers (privacy.md, sections 0 and 6)."""
        reference = "" if self.reference_rows is None else f", and n = {self.reference_rows} reference patients"
        return (
            f"Un-noised empirical measurements, computed on the data of n = {self.train_rows} training patients and"
            f" n = {self.control_rows} control patients{reference}; no ε covers them. Any ε reported beside them is of"
            " the model and cohort alone, excluding this evaluation and the decision to release. A successful attack"
            " shows a leak; no failed attack is evidence of privacy."
        )


def add_reports(reports: Sequence[AttackReport]) -> AttackReport:
    """One report of several hospitals attacked with the same cohort; attacks are matched by name, secret and setting.

    What was not possible at one hospital is added up over the others and stays listed. Train and control are comparable
    in the sum only if the control is the same share of the patients everywhere; otherwise a difference between
    hospitals looks like one between train and control.

    Raises `DataError` if there is no report, if cohorts differ in size, if only some have a reference, or if histograms
    do not match.
    """
    if not reports:
        raise DataError("there is no attack report to add", fix="give the report of at least one hospital")
    first = reports[0]
    if any(each.synthetic_rows != first.synthetic_rows for each in reports):
        raise DataError(
            "attack reports of cohorts of different size cannot be added",
            fix="attack the same pooled cohort at every hospital",
        )
    if any((each.reference_rows is None) != (first.reference_rows is None) for each in reports):
        raise DataError(
            "some attack reports have reference patients and others have none",
            fix="give a reference at every hospital or at none",
        )
    scores: dict[str, ScoreCounts] = {}
    for each in (counts for report in reports for counts in report.scores):
        scores[each.attack] = scores[each.attack] + each if each.attack in scores else each
    with_reference = first.reference_rows is not None
    return AttackReport(
        synthetic_rows=first.synthetic_rows,
        train_rows=sum(each.train_rows for each in reports),
        control_rows=sum(each.control_rows for each in reports),
        reference_rows=sum(each.reference_rows or 0 for each in reports) if with_reference else None,
        control_in_train=sum(each.control_in_train for each in reports),
        reference_in_train=sum(each.reference_in_train or 0 for each in reports) if with_reference else None,
        counts=add_counts(counts for report in reports for counts in report.counts),
        scores=tuple(scores.values()),
        not_possible=tuple(each for report in reports for each in report.not_possible),
        sites=sum(each.sites for each in reports),
    )


def _overall(p_values: Sequence[float], confidence: float) -> dict[str, Any]:
    """All comparisons by patient together: of many intervals at 95 % one in twenty misses by chance, this does not."""
    if not p_values:
        return {
            "comparisons": 0,
            "p_value_bonferroni": None,
            "reading": "No attack was possible; nothing was measured.",
        }
    together = min(1.0, min(p_values) * len(p_values))
    found = together < 1 - confidence
    return {
        "comparisons": len(p_values),
        "p_value_bonferroni": together,
        "reading": "The cohort leaks: at least one attack succeeds more often on training patients than chance allows."
        if found
        else "No attack found a difference between training and control patients. This is no evidence of privacy.",
    }


def _attack(counts: AttackCounts, found: Risk) -> dict[str, Any]:
    return {"counts": counts.to_json()} | asdict(found)


def _membership(counts: ScoreCounts, confidence: float) -> dict[str, Any]:
    return {
        "histogram": counts.to_json(),
        "auroc": asdict(auroc(counts, confidence)),
        "p_value": mann_whitney(counts),
        "true_positives": [asdict(true_positives(counts, level, confidence)) for level in LEVELS],
    }
