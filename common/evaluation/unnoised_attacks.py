"""What un-noised attack scores of the sites say, in the form of `attack_results`: intervals from numbers of patients.

A rate of 0 stands for fewer successes than the floor, a rate of 1 for fewer failures; intervals hold both ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np
from scipy.stats import norm

from common.evaluation.attack_results import COPIES, about, document, why_not
from common.evaluation.attacks.risk import wilson
from common.evaluation.attacks.scores import auroc_interval
from common.evaluation.contrast import FALSE_POSITIVES, Finding
from common.evaluation.plan import MEMBERSHIP_SCORES, guesses_of
from common.evaluation.pooled import CONFIDENCE
from common.study import Protocol

Z = float(norm.ppf((1 + CONFIDENCE) / 2))
HIDDEN = "not possible because no site gave a value: too few patients"


@dataclass(frozen=True)
class _Site:
    scores: Mapping[str, float]
    patients: int
    control: int


@dataclass(frozen=True)
class _Rate:
    """Successes of all guesses, as given, and the fewest and most that the floor leaves possible."""

    given: int
    fewest: int
    most: int
    guesses: int


def unnoised_attacks(
    protocol: Protocol,
    cohort_rows: int,
    scores: Mapping[str, Mapping[str, float]],
    people: Mapping[str, Mapping[str, int]],
) -> dict[str, Any]:
    """The findings from the scores of some sites, NaN where hidden; a site that hides one is left out of it."""
    sites = [_Site(scores[name], people[name]["fit"], people[name]["holdout"]) for name in sorted(scores)]
    membership = {}
    for score in MEMBERSHIP_SCORES:
        shown, found = _shown(sites, f"membership/{score}/auroc", cohort_rows)
        membership[score] = found | (
            {
                "auroc": asdict(_area(shown, f"membership/{score}/auroc")),
                "true_positive_rate": {
                    "false_positive_rate": FALSE_POSITIVES,
                    **asdict(_true_positives(shown, f"membership/{score}/true_positive_rate")),
                },
            }
            if shown
            else {"auroc": None, "true_positive_rate": None}
        )
    floor = protocol.study.evaluation.min_count
    copies = {kind: _contrast(sites, f"copies/{kind}", cohort_rows, floor) for kind in COPIES}
    guessed = {key: _contrast(sites, "/".join(key), cohort_rows, floor) for key in guesses_of(protocol)}
    return document(protocol, membership, copies, guessed)


def _shown(sites: Sequence[_Site], name: str, cohort_rows: int) -> tuple[list[_Site], dict[str, Any]]:
    shown = [site for site in sites if not np.isnan(site.scores[name])]
    numbers = sum(site.patients for site in shown), sum(site.control for site in shown)
    reason = why_not(cohort_rows, *numbers) if shown else why_not(cohort_rows, 10**9, 10**9) or HIDDEN
    return ([] if reason else shown), about(*numbers, reason)


def _area(sites: Sequence[_Site], name: str) -> Finding:
    """Mean of the sites' areas, each weighted by its held-out patients; a patient is compared within his site."""
    parts = [auroc_interval(site.scores[name], site.patients, site.control, CONFIDENCE) for site in sites]
    alone = [sqrt((site.patients + site.control + 1) / (12 * site.patients * site.control)) for site in sites]
    low, high = ([abs(getattr(part, end) - part.value) for part in parts] for end in ("low", "high"))
    return _mean(sites, [part.value for part in parts], low, high, alone, 0.5)


def _true_positives(sites: Sequence[_Site], name: str) -> Finding:
    """As `_area`; the error of the threshold enters with the steepest slope that a concave ROC curve can have there."""
    alpha, errors, alone = FALSE_POSITIVES, [], []
    for site in sites:
        rate, of_threshold = site.scores[name], alpha * (1 - alpha) / site.control
        errors.append(Z * sqrt(rate * (1 - rate) / site.patients + (rate / alpha) ** 2 * of_threshold))
        alone.append(sqrt(alpha * (1 - alpha) / site.patients + of_threshold))
    return _mean(sites, [site.scores[name] for site in sites], errors, errors, alone, alpha)


def _mean(
    sites: Sequence[_Site],
    values: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    alone: Sequence[float],
    chance: float,
) -> Finding:
    weights = np.array([site.control for site in sites], dtype=np.float64)
    weights /= weights.sum()
    value = float(weights @ np.array(values))
    below, above, deviation = (float(np.linalg.norm(weights * np.array(part))) for part in (low, high, alone))
    ends = (value - below, value + above, chance, chance - Z * deviation, chance + Z * deviation)
    return Finding(value, *(float(np.clip(end, 0.0, 1.0)) for end in ends))


def _contrast(sites: Sequence[_Site], name: str, cohort_rows: int, floor: int) -> dict[str, Any]:
    shown, found = _shown(sites, f"{name}/fit", cohort_rows)
    if not shown:
        return found | {"fit": None, "holdout": None, "difference": None}
    fit = _rate([(site.scores[f"{name}/fit"], site.patients) for site in shown], floor)
    control = _rate([(site.scores[f"{name}/holdout"], site.control) for site in shown], floor)
    (value, low, high), (other, other_low, other_high) = _ends(fit), _ends(control)
    # Newcombe 1998, method 10, as in `attacks.risk`; ends that the floor leaves open are in the intervals already.
    below, above = (
        sqrt(a**2 + b**2) for a, b in ((value - low, other_high - other), (high - value, other - other_low))
    )
    together = min(0.5, (fit.most + control.most) / (fit.guesses + control.guesses))
    alone = Z * sqrt(together * (1 - together) * (1 / fit.guesses + 1 / control.guesses))
    gap = value - other
    ends = (gap - below, gap + above, 0.0, -alone, alone)
    return found | {
        "fit": {"value": value, "low": low, "high": high},
        "holdout": {"value": other, "low": other_low, "high": other_high},
        "difference": asdict(Finding(gap, *(float(np.clip(end, -1.0, 1.0)) for end in ends))),
    }


def _rate(parts: Sequence[tuple[float, int]], floor: int) -> _Rate:
    given = fewest = most = guesses = 0
    for rate, patients in parts:
        successes = round(rate * patients)
        given, guesses = given + successes, guesses + patients
        fewest += max(0, patients - floor + 1) if rate == 1 else successes
        most += min(patients, floor - 1) if rate == 0 else successes
    return _Rate(given, fewest, most, guesses)


def _ends(rate: _Rate) -> tuple[float, float, float]:
    low, high = wilson(rate.fewest, rate.guesses, CONFIDENCE).low, wilson(rate.most, rate.guesses, CONFIDENCE).high
    return rate.given / rate.guesses, low, high
