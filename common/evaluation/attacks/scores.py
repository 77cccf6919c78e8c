"""Histograms of membership scores, and AUROC and true-positive rates as pure functions of them.

A patient falls into exactly one bin, so that histograms of several hospitals can be added, and replacing one patient
changes two cells by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import floor, sqrt
from typing import Any

import numpy as np
from scipy.stats import betabinom, norm

from common.errors import DataError
from common.evaluation.attacks.risk import Estimate, wilson

LEVELS = (0.01, 0.05, 0.10)
# Even edges over [0, 1], and the top ones: exact copies have score 1.
EVEN = 50
TOP = (0.99, 0.999, 1 - 1e-6)


@dataclass(frozen=True)
class ScoreCounts:
    """How many training and control patients have a score in each bin; a high score speaks for membership.

    Bin i is [edges[i − 1], edges[i]), the first and the last are open; there is one bin more than edges. `setting` says
    what scores were made from. Raises `DataError` for counts that do not fit the edges, are negative or empty.
    """

    attack: str
    setting: str
    edges: tuple[float, ...]
    train: tuple[int, ...]
    control: tuple[int, ...]

    def __post_init__(self) -> None:
        if list(self.edges) != sorted(set(self.edges)):
            raise DataError(f"attack {self.attack!r}: bin edges must increase")
        for name in ("train", "control"):
            counts: tuple[int, ...] = getattr(self, name)
            if len(counts) != len(self.edges) + 1 or min(counts) < 0 or sum(counts) == 0:
                raise DataError(
                    f"attack {self.attack!r}: the {name} histogram has {len(counts)} bins and {sum(counts)} patients",
                    fix=f"expected {len(self.edges) + 1} counts of at least 0, and at least one patient",
                )

    def __add__(self, other: ScoreCounts) -> ScoreCounts:
        if not isinstance(other, ScoreCounts):
            return NotImplemented
        if (self.attack, self.setting) != (other.attack, other.setting) or self.edges != other.edges:
            raise DataError(
                f"histograms of different attacks or bins cannot be added: {self.attack} ({self.setting}) and"
                f" {other.attack} ({other.setting})",
                fix="run the attack everywhere on the same cohort, with the same seed and the same kind of reference",
            )
        train, control = (
            tuple(a + b for a, b in zip(getattr(self, name), getattr(other, name), strict=True))
            for name in ("train", "control")
        )
        return ScoreCounts(self.attack, self.setting, self.edges, train, control)

    def __radd__(self, other: object) -> ScoreCounts:
        # `sum` starts at 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


@dataclass(frozen=True)
class TruePositives:
    """Share of training patients above a threshold that at most `level` of the control exceed.

    `threshold` is the edge above which a patient is called a member (None: no bin qualifies, and nobody is called one),
    `false_positive_rate` what the control shows there. `p_value` is for "training patients score higher than control
    patients". `possible` is False if there are too few control patients to show so small a rate; all is then None.
    """

    level: float
    possible: bool
    threshold: float | None
    true_positive_rate: Estimate | None
    false_positive_rate: Estimate | None
    p_value: float | None


def calibrated_edges(scores: np.ndarray, count: int = 96) -> tuple[float, ...]:
    """Bin edges in (0, 1): `count` quantiles of the scores of rows that are no patients, even ones, a few at the top.

    The quantiles resolve where scores lie, the even ones hold if patients' scores lie elsewhere.
    """
    quantiles = np.quantile(scores, np.linspace(0, 1, count + 2)[1:-1])
    edges = np.concatenate([quantiles, np.linspace(0, 1, EVEN + 1)[1:-1], TOP])
    # Rounded, so that machines that differ in the last digit of a score agree on the edges.
    return tuple(float(edge) for edge in np.unique(np.round(edges, 6)) if 0 < edge < 1)


def histogram(
    attack: str, setting: str, edges: tuple[float, ...], train: np.ndarray, control: np.ndarray
) -> ScoreCounts:
    """Count the scores of patients, shapes (patients,), between `edges`."""
    train_counts, control_counts = (
        np.bincount(np.searchsorted(edges, scores, side="right"), minlength=len(edges) + 1).tolist()
        for scores in (train, control)
    )
    return ScoreCounts(attack, setting, edges, tuple(train_counts), tuple(control_counts))


def auroc(counts: ScoreCounts, confidence: float = 0.95) -> Estimate:
    """P(score of a training patient > of a control patient) + ½ P(same bin); 0.5 is chance.

    Interval: method 5 of Newcombe 2006 (Statistics in Medicine 25:559), which inverts the variance of Hanley and McNeil
    1982 and stays informative at 0 and 1.
    """
    train, control = (np.asarray(each, dtype=np.float64) for each in (counts.train, counts.control))
    m, n = train.sum(), control.sum()
    below = np.concatenate([[0.0], np.cumsum(control)[:-1]])
    return auroc_interval(float(train @ (below + control / 2) / (m * n)), m, n, confidence)


def auroc_interval(value: float, m: float, n: float, confidence: float = 0.95) -> Estimate:
    """An AUROC of `m` training and `n` control patients with the interval of `auroc`."""
    z, star = float(norm.ppf((1 + confidence) / 2)), (m + n) / 2 - 1

    def excess(theta: float) -> float:
        spread = 1 + star * (1 - theta) / (2 - theta) + star * theta / (1 + theta)
        return abs(value - theta) - z * sqrt(theta * (1 - theta) * spread / (m * n))

    return Estimate(value, _boundary(excess, value, 0.0), _boundary(excess, value, 1.0))


def mann_whitney(counts: ScoreCounts) -> float:
    """One-sided p-value of "training patients score higher", by the normal approximation corrected for ties."""
    train, control = (np.asarray(each, dtype=np.float64) for each in (counts.train, counts.control))
    m, n, ties = train.sum(), control.sum(), train + control
    total = m + n
    variance = m * n / 12 * (total + 1 - (ties**3 - ties).sum() / (total * (total - 1)))
    if variance <= 0:  # all in one bin
        return 1.0
    return float(norm.sf((auroc(counts).value * m * n - m * n / 2) / sqrt(variance)))


def _boundary(excess: Callable[[float], float], inside: float, outside: float) -> float:
    """Where `excess` turns positive on the way from `inside`, where it is not, to `outside`, by bisection."""
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if excess(middle) > 0 else (middle, outside)
    return (inside + outside) / 2


def true_positives(counts: ScoreCounts, level: float, confidence: float = 0.95) -> TruePositives:
    """True-positive rate at a false-positive rate of at most `level`, with Wilson intervals.

    The threshold is the lowest edge with (1 + control patients above)/(1 + control patients) <= level, so that a new
    control patient exceeds it with probability at most `level`. The intervals take the threshold as given; the p-value
    does not: were train and control exchangeable, the number of training patients above the j-th largest control score
    would have the beta-binomial distribution (m, j, n + 1 − j), and ties only lower it.
    """
    m, n = sum(counts.train), sum(counts.control)
    allowed = floor(level * (n + 1) + 1e-9) - 1
    if allowed < 0:
        return TruePositives(level, False, None, None, None, None)
    above = np.cumsum(counts.control[::-1])[::-1][1:]  # control patients at or above each edge
    enough = np.flatnonzero(above <= allowed)
    first = int(enough[0]) if enough.size else len(counts.edges)
    called = sum(counts.train[first + 1 :])
    return TruePositives(
        level=level,
        possible=True,
        threshold=counts.edges[first] if enough.size else None,
        true_positive_rate=wilson(called, m, confidence),
        false_positive_rate=wilson(sum(counts.control[first + 1 :]), n, confidence),
        p_value=min(1.0, float(betabinom.sf(called - 1, m, allowed + 1, n - allowed))),
    )
