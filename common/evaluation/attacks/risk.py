"""Rates, intervals and the excess risk of an attack: pure functions of its counts.

After Giomi, Boenisch, Wehmeyer and Tasnádi 2022 (arXiv 2211.10459), with an interval and an exact test of the plain
difference added. All intervals treat guesses as independent given the cohort. For predicates, of which several may
speak of one patient, they are therefore too narrow.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from scipy.stats import hypergeom, norm

from common.evaluation.attacks.counts import AttackCounts


@dataclass(frozen=True)
class Estimate:
    """A number with its two-sided confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Risk:
    """What the counts of one attack say.

    `main`, `control` and `baseline` are success rates with Wilson intervals. `excess` is (main − control)/(1 − control)
    as in the paper, None if the control rate is 1; it is not cut off at 0. `difference` is main − control, and
    `p_value` Fisher's exact one-sided one for "the training patients are attacked more successfully than the control",
    None for predicates.
    """

    main: Estimate
    control: Estimate
    baseline: Estimate
    excess: Estimate | None
    difference: Estimate
    p_value: float | None
    weaker_than_baseline: bool
    reading: str


def risk(counts: AttackCounts, confidence: float = 0.95) -> Risk:
    """Rates, excess risk and how to read them; two-sided intervals at `confidence`, strictly between 0 and 1."""
    main = wilson(counts.successes, counts.guesses, confidence)
    control = wilson(counts.control_successes, counts.control_guesses, confidence)
    baseline = wilson(counts.baseline_successes, counts.baseline_guesses, confidence)
    gap = difference(counts, confidence)
    weaker = main.value <= baseline.value
    return Risk(
        main=main,
        control=control,
        baseline=baseline,
        excess=excess(counts, confidence),
        difference=gap,
        # Predicates are not independent of each other, and the test would call leaks where there are none.
        p_value=fisher(counts) if counts.unit == "patient" else None,
        weaker_than_baseline=weaker,
        reading=_reading(counts, gap, weaker),
    )


def wilson(successes: int, guesses: int, confidence: float = 0.95) -> Estimate:
    """Observed rate with the score interval of Wilson (1927)."""
    centre, half = _wilson(successes, guesses, confidence)
    value = successes / guesses
    # Exact at 0 and 1, where rounding would leave the observed rate outside by 1e-17.
    return Estimate(value, max(0.0, min(value, centre - half)), min(1.0, max(value, centre + half)))


def _wilson(successes: int, guesses: int, confidence: float) -> tuple[float, float]:
    """Centre and half-width of Wilson's interval."""
    z = _normal_quantile(confidence)
    centre = (successes + z * z / 2) / (guesses + z * z)
    half = z / (guesses + z * z) * sqrt(successes * (guesses - successes) / guesses + z * z / 4)
    return centre, half


def _normal_quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1, not {confidence}")
    return float(norm.ppf((1 + confidence) / 2))


def excess(counts: AttackCounts, confidence: float = 0.95) -> Estimate | None:
    """(main − control)/(1 − control), None if every control guess succeeded.

    As in the paper: rates are the centres of their Wilson intervals, whose half-widths are propagated to first order.
    """
    if counts.control_successes == counts.control_guesses:
        return None
    main, main_half = _wilson(counts.successes, counts.guesses, confidence)
    control, control_half = _wilson(counts.control_successes, counts.control_guesses, confidence)
    value = (main - control) / (1 - control)
    half = sqrt((main_half / (1 - control)) ** 2 + ((main - 1) / (1 - control) ** 2 * control_half) ** 2)
    return Estimate(value, value - half, min(1.0, value + half))


def difference(counts: AttackCounts, confidence: float = 0.95) -> Estimate:
    """main − control, with the hybrid score interval (Newcombe 1998, Statistics in Medicine 17:873, method 10)."""
    main = wilson(counts.successes, counts.guesses, confidence)
    control = wilson(counts.control_successes, counts.control_guesses, confidence)
    value = main.value - control.value
    below = sqrt((main.value - main.low) ** 2 + (control.high - control.value) ** 2)
    above = sqrt((main.high - main.value) ** 2 + (control.value - control.low) ** 2)
    return Estimate(value, max(-1.0, value - below), min(1.0, value + above))


def fisher(counts: AttackCounts) -> float:
    """Probability, were train and control exchangeable, of at least this many of all successes falling on train."""
    total = counts.guesses + counts.control_guesses
    hits = counts.successes + counts.control_successes
    return min(1.0, float(hypergeom.sf(counts.successes - 1, total, hits, counts.guesses)))


def _reading(counts: AttackCounts, gap: Estimate, weaker: bool) -> str:
    if gap.low > 0 and counts.unit == "predicate":
        return (
            "Training patients were singled out more often than control patients, which speaks for a leak; the interval"
            " treats predicates as independent and is too narrow."
        )
    if gap.low > 0:  # a leak is a leak, however weak the attack
        return (
            "Patients the cohort was learned from were attacked more successfully than control patients: the cohort"
            " tells something about them in particular."
        )
    if counts.attack.startswith("copies"):
        found = "No copy was found." if counts.successes == 0 else "Copies were found no more often than by chance."
        return f"{found} This is a check for copies and no measure of privacy."
    if weaker:
        return "The attack did no better than guessing without the cohort: it says nothing about privacy."
    return (
        "No difference between training and control patients was found; with this many patients one of up to"
        f" {gap.high:.2%} may have gone unnoticed, and other attacks may do better."
    )
