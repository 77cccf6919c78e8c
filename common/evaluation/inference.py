"""Would an analyst of the cohort conclude what an analyst of the patients concludes? Agreement of effect estimates.

Every number is an un-noised aggregate of patients (privacy.md, section 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from common.evaluation.attacks.risk import Estimate
from common.evaluation.effects import Term, fit_effects
from common.evaluation.fidelity import check_comparable
from common.table import Table


@dataclass(frozen=True)
class EffectPair:
    """One term in patients and in synthetic rows, as log odds ratios with nominal intervals.

    `overlap`: mean share of each interval that lies in the other (Karr et al. 2006, The American Statistician 60:224);
    1 is equal, below 0 the intervals are apart. `standardised_difference`: (synthetic − real) in standard errors of
    the patients' estimate.
    """

    term: Term
    real: Estimate
    synthetic: Estimate
    overlap: float
    standardised_difference: float


@dataclass(frozen=True)
class Agreement:
    """Agreement over all terms of the regression on one level of the target; None if `reason` says why.

    Shares are of terms. `same_sign_where_clear`: of those whose interval in patients excludes 0, `clear` in number.
    `found_again`: of the same, those whose synthetic interval excludes 0 on the same side. `found_only_synthetic`: of
    the other terms, those whose synthetic interval excludes 0 (None without such terms). `overlap` is the mean with
    negative ones counted as 0.
    """

    level: str
    effects: tuple[EffectPair, ...]
    synthetic_rows: int
    real_rows: int
    same_sign: float | None
    clear: int
    same_sign_where_clear: float | None
    found_again: float | None
    found_only_synthetic: float | None
    overlap: float | None
    median_difference: float | None
    ridge: bool
    left_out: tuple[str, ...]
    reason: str = ""


def compare_effects(
    synthetic: Table,
    real: Table,
    target: str,
    level: int,
    *,
    columns: Sequence[str] | None = None,
    confidence: float = 0.95,
) -> Agreement:
    """Fit the same logistic regression to both tables and compare every coefficient.

    Raises `DataError` if the schemas differ, a table has no rows, or `columns` names what is no predictor.
    """
    check_comparable(synthetic, real)
    models = fit_effects({"synthetic": synthetic, "real": real}, "real", target, level, columns)
    if models.reason:
        return Agreement(
            models.level, (), 0, 0, None, 0, None, None, None, None, None, False, models.left_out, models.reason
        )
    ours, theirs = models.effects["synthetic"], models.effects["real"]
    z = float(norm.ppf((1 + confidence) / 2))
    pairs = []
    for j, term in enumerate(models.terms):
        a, b = (
            Estimate(float(e.values[j]), float(e.values[j] - z * e.errors[j]), float(e.values[j] + z * e.errors[j]))
            for e in (theirs, ours)
        )
        difference = float((ours.values[j] - theirs.values[j]) / theirs.errors[j])
        pairs.append(EffectPair(term, a, b, interval_overlap(a, b), difference))
    same = np.sign(ours.values) == np.sign(theirs.values)
    clear = np.array([excludes_zero(pair.real) for pair in pairs])
    seen = np.array([excludes_zero(pair.synthetic) for pair in pairs])
    return Agreement(
        level=models.level,
        effects=tuple(pairs),
        synthetic_rows=ours.rows,
        real_rows=theirs.rows,
        same_sign=float(same.mean()),
        clear=int(clear.sum()),
        same_sign_where_clear=_share(same[clear]),
        found_again=_share((seen & same)[clear]),
        found_only_synthetic=_share(seen[~clear]),
        overlap=float(np.mean([max(pair.overlap, 0.0) for pair in pairs])),
        median_difference=float(np.median([abs(pair.standardised_difference) for pair in pairs])),
        ridge=models.ridge,
        left_out=models.left_out,
    )


def interval_overlap(a: Estimate, b: Estimate) -> float:
    """½ (c/|a| + c/|b|) with c the length of the intersection of two intervals, negative if they are apart."""
    common = min(a.high, b.high) - max(a.low, b.low)
    return (common / (a.high - a.low) + common / (b.high - b.low)) / 2


def excludes_zero(estimate: Estimate) -> bool:
    """Whether the interval lies on one side of 0."""
    return estimate.low > 0 or estimate.high < 0


def _share(which: np.ndarray) -> float | None:
    return float(which.mean()) if which.size else None
