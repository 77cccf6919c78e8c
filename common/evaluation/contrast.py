"""Patients who took part against those held out: what noised histograms of both say, with what chance would give.

Both totals are public, so that a share is a count over its total, noise and all: an estimate without bias. Intervals
and what chance gives come from simulated repetitions of the patients and of the noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.evaluation.pooled import CONFIDENCE, DRAWS, projected

FALSE_POSITIVES = 0.1  # the rate at which members are called in `true_positive_rate`
Array = NDArray[np.float64]
# Shares of both groups by cell, shape (..., cells) each, to one number for each of the leading axes.
Statistic = Callable[[Array, Array], Array]


@dataclass(frozen=True)
class Finding:
    """A number with its 95 % interval, and the interval it would lie in if the two groups did not differ.

    `chance` is what it would then be on average.
    """

    value: float
    low: float
    high: float
    chance: float
    chance_low: float
    chance_high: float


@dataclass(frozen=True)
class Sides:
    """Counts by cell of both groups, shape (cells,) each; their public totals; the deviation of a cell's noise."""

    fit: Array
    holdout: Array
    patients: int
    control: int
    fit_deviation: float = 0.0
    holdout_deviation: float = 0.0


def auroc_between(fit: Array, holdout: Array) -> Array:
    """P(cell of a fit patient > cell of a held-out one) + ½ P(same cell), from shares, shape (..., cells)."""
    below = np.cumsum(holdout, axis=-1) - holdout
    return (fit * (below + holdout / 2)).sum(axis=-1)


def true_positive_rate(fit: Array, holdout: Array) -> Array:
    """Share of fit patients above the threshold that `FALSE_POSITIVES` of the held-out ones exceed.

    Within the cell in which the threshold lies, patients are called at random. Shares must not be negative.
    """
    called = [np.cumsum(side[..., ::-1], axis=-1) for side in (holdout, fit)]
    zero = np.zeros((*fit.shape[:-1], 1))
    false, true = (np.concatenate([zero, side], axis=-1) for side in called)
    flat = zip(false.reshape(-1, false.shape[-1]), true.reshape(-1, true.shape[-1]), strict=True)
    found = np.array([np.interp(FALSE_POSITIVES, np.maximum.accumulate(x), y) for x, y in flat])
    return found.reshape(fit.shape[:-1])


def rate_difference(first: int) -> Statistic:
    """The share in cells from `first` on among fit patients, less that among held-out ones."""
    return lambda fit, holdout: fit[..., first:].sum(axis=-1) - holdout[..., first:].sum(axis=-1)


def rate_of(first: int) -> Statistic:
    """The share in cells from `first` on of the first group alone."""
    return lambda fit, holdout: fit[..., first:].sum(axis=-1) + 0 * holdout[..., 0]


def find(
    sides: Sides,
    statistic: Statistic,
    chance: float,
    rng: np.random.Generator,
    *,
    within: tuple[float, float] = (0.0, 1.0),
    linear: bool = True,
) -> Finding:
    """The statistic with its intervals, cut to `within`.

    `linear` in each group's shares: it is then taken of shares as they are, negative ones too, as cutting them off
    would draw it to one side; otherwise of the nearest shares that are none. The interval turns the simulated errors
    round the value (basic bootstrap).
    """
    groups = (
        (sides.fit, sides.patients, sides.fit_deviation),
        (sides.holdout, sides.control, sides.holdout_deviation),
    )
    likely = [projected(counts, total) / total for counts, total, _ in groups]
    both = (likely[0] * sides.patients + likely[1] * sides.control) / (sides.patients + sides.control)

    def value(counts: list[Array]) -> Array:
        shares = [_shares(each, total, linear) for each, (_, total, _) in zip(counts, groups, strict=True)]
        return statistic(shares[0], shares[1])

    def repeated(truth: list[Array]) -> Array:
        drawn = []
        for share, (_, total, sigma) in zip(truth, groups, strict=True):
            counts = rng.multinomial(total, share, size=DRAWS).astype(np.float64)
            drawn.append(counts + sigma * rng.standard_normal(counts.shape))
        return value(drawn)

    # Cut off before the interval is laid round it: noise that leads out of the possible must not make it narrow.
    found = float(np.clip(value([sides.fit, sides.holdout]), *within))
    errors = repeated(likely) - float(statistic(likely[0], likely[1]))
    tail = (1 - CONFIDENCE) / 2
    low, high = found - np.quantile(errors, [1 - tail, tail])
    alone = np.quantile(repeated([both, both]), [tail, 1 - tail])
    numbers = np.clip([found, min(low, found), max(high, found), chance, *alone], *within)
    return Finding(*(float(number) for number in numbers))


def _shares(counts: Array, total: int, linear: bool) -> Array:
    if linear:  # the nearest ones with the total that is known
        return (counts + (total - counts.sum(axis=-1, keepdims=True)) / counts.shape[-1]) / total
    return projected(counts, total) / total
