"""What the counts of several sites say about a cohort: distances and accuracies, with what noise and chance do to them.

Pure functions of counts and of the cohort's own counts; nothing here sees a patient. A hidden cell (NaN) is unknown: a
table with hidden cells is left out of the pool of that table, and how many patients that leaves is stated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.evaluation.counts import CountPlan, Key

DRAWS = 400  # simulated repetitions behind every interval
CONFIDENCE = 0.95
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, over chance in the patients counted and over the noise of the counts.

    `value` is None if the counts do not allow it; `patients` is how many were counted.
    """

    value: float | None
    low: float | None
    high: float | None
    patients: int


@dataclass(frozen=True)
class Distance:
    """A total variation distance between cohort and patients, and what chance and noise alone would have given.

    `chance` is the 95 % quantile of the distance if cohort and patients were samples of one distribution, that of the
    cohort: a value below it says nothing.
    """

    value: float | None
    chance: float | None
    patients: int


@dataclass(frozen=True)
class PooledCounts:
    """The sums over sites of every table, the standard deviation of a cell's noise, and the patients behind them."""

    counts: Mapping[Key, Array]
    deviation: Mapping[Key, float]
    patients: Mapping[Key, int]
    sites: Mapping[Key, int]


def pool(
    plan: CountPlan,
    answers: Mapping[str, Array],
    patients: Mapping[str, Mapping[str, int]],
    deviations: Array | None,
) -> PooledCounts:
    """Add the sites' vectors of cells; `patients[site][population]` is public, `deviations` those of one site's noise.

    A table with a hidden cell at a site leaves that site out of the sum of that table.
    """
    totals: dict[Key, Array] = {}
    sigma: dict[Key, float] = {}
    people: dict[Key, int] = {}
    sites: dict[Key, int] = {}
    split = {site: plan.split(vector) for site, vector in answers.items()}
    spread = plan.split(np.zeros(plan.size) if deviations is None else deviations)
    for table in plan.tables:
        shown = {site: parts[table.key] for site, parts in split.items() if not np.isnan(parts[table.key]).any()}
        totals[table.key] = sum(shown.values(), np.zeros(table.shape))
        sigma[table.key] = float(spread[table.key].flat[0]) * len(shown) ** 0.5
        people[table.key] = sum(patients[site][table.population] for site in shown)
        sites[table.key] = len(shown)
    return PooledCounts(totals, sigma, people, sites)


def repaired(counts: Array, total: float) -> Array:
    """The counts nearest to noised ones that are not negative and have this sum (Euclidean projection), same shape."""
    return projected(counts.ravel(), total).reshape(counts.shape)


def projected(counts: Array, total: float) -> Array:
    """As `repaired`, of every table of an array of them, shape (..., cells)."""
    ordered = np.sort(counts, axis=-1)[..., ::-1]
    excess = (np.cumsum(ordered, axis=-1) - total) / np.arange(1, counts.shape[-1] + 1)
    last = np.maximum((ordered > excess).sum(axis=-1, keepdims=True) - 1, 0)  # 0: of a total of 0
    return np.maximum(counts - np.take_along_axis(excess, last, axis=-1), 0.0)


def distance(pooled: PooledCounts, key: Key, cohort: Array, rng: np.random.Generator) -> Distance:
    """Total variation between the cohort's counts of a table and the pooled patients'."""
    patients, sigma = pooled.patients[key], pooled.deviation[key]
    if patients == 0 or cohort.sum() == 0:
        return Distance(None, None, patients)
    share = cohort / cohort.sum()
    found = np.abs(repaired(pooled.counts[key], patients) / patients - share).sum() / 2
    draws = rng.multinomial(patients, share.ravel(), size=DRAWS).astype(np.float64)
    draws += sigma * rng.standard_normal(draws.shape)
    rows = int(cohort.sum())
    others = rng.multinomial(rows, share.ravel(), size=DRAWS) / rows
    alone = np.abs(projected(draws, patients) / patients - others).sum(axis=1) / 2
    return Distance(float(found), float(np.quantile(alone, CONFIDENCE)), patients)


def auroc(pooled: PooledCounts, key: Key, rng: np.random.Generator) -> Estimate:
    """AUROC of a binned score against an outcome, from a table (score bins, outcomes: not the level, the level, …).

    Ties within a bin count one half, so that the value lies a little nearer to 0.5 than that of the scores themselves.
    """
    return _estimate(pooled, key, rng, auroc_of)


def auroc_of(table: Array) -> float | None:
    """AUROC of a table of counts, shape (score bins, 2 or more): column 1 is the level, column 0 is not."""
    no, yes = table[:, 0], table[:, 1]
    if no.sum() <= 0 or yes.sum() <= 0:
        return None
    below = np.concatenate([[0.0], np.cumsum(no)[:-1]])
    return float((yes * (below + no / 2)).sum() / (no.sum() * yes.sum()))


def calibration(pooled: PooledCounts, key: Key) -> list[tuple[float, float]]:
    """Patients with a known outcome, and the share of them with the level, in every score bin."""
    table = repaired(pooled.counts[key], pooled.patients[key]) if pooled.patients[key] else pooled.counts[key]
    known = table[:, 0] + table[:, 1]
    return [(float(n), float(yes / n) if n > 0 else float("nan")) for n, yes in zip(known, table[:, 1], strict=True)]


def miscalibration(pooled: PooledCounts, key: Key, predicted: Array, rng: np.random.Generator) -> Estimate:
    """Share of patients with the level less the share predicted, of those whose outcome is known.

    `predicted` is the probability that the model gives in every score bin, shape (bins,). 0 is right.
    """

    def value(table: Array) -> float | None:
        known = table[:, 0] + table[:, 1]
        return float((table[:, 1] - known * predicted).sum() / known.sum()) if known.sum() > 0 else None

    return _estimate(pooled, key, rng, value)


def share(pooled: PooledCounts, key: Key, cell: int, among: Sequence[int], rng: np.random.Generator) -> Estimate:
    """The share of one cell of a one-dimensional table among some of its cells."""

    def value(table: Array) -> float | None:
        total = table[list(among)].sum()
        return float(table[cell] / total) if total > 0 else None

    return _estimate(pooled, key, rng, value)


def _estimate(
    pooled: PooledCounts, key: Key, rng: np.random.Generator, value: Callable[[Array], float | None]
) -> Estimate:
    patients, sigma, counts = pooled.patients[key], pooled.deviation[key], pooled.counts[key]
    if patients == 0:
        return Estimate(None, None, None, 0)
    repaired_counts = repaired(counts, patients)
    found = value(repaired_counts)
    if found is None:
        return Estimate(None, None, None, patients)
    probabilities = repaired_counts.ravel() / repaired_counts.sum()
    draws = rng.multinomial(patients, probabilities, size=DRAWS).reshape(DRAWS, *counts.shape).astype(np.float64)
    draws += sigma * rng.standard_normal(draws.shape)
    values = [v for v in (value(repaired(draw, patients)) for draw in draws) if v is not None]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail]) if values else (np.nan, np.nan)
    return Estimate(found, float(min(low, found)), float(max(high, found)), patients)
