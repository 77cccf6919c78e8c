"""Two-way marginals: how well pairs of columns are kept, and correlation matrices for a picture side by side.

Every number is an un-noised aggregate of patients when one of the tables holds patients (privacy.md, section 0).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from common.evaluation.counts import bins_of, cells_of, count
from common.evaluation.fidelity import check_comparable, correlation_matrix, expand
from common.schema import Column
from common.table import Table

WORST = 10  # pairs that are named
MOST_FEATURES = 60  # of a picture in which single cells can still be told apart


@dataclass(frozen=True)
class PairDistance:
    """Total variation between the two-way tables of two columns; `chance` is `expected_distance`."""

    columns: tuple[str, str]
    value: float
    chance: float


@dataclass(frozen=True)
class Pairs:
    """All pairs of columns: `mean` and the mean of what chance alone would give, and those farthest above chance.

    None and a `reason` where there is no pair. Each distance lies in [0, 1]; 0 is equal.
    """

    mean: float | None
    chance_mean: float | None
    pairs: int
    worst: tuple[PairDistance, ...]
    reason: str = ""


@dataclass(frozen=True)
class Correlations:
    """Pearson correlation matrices of both tables over the same features, shape (features, features) each.

    `features` names a numeric column, or column and level; `left_out` counts features that vary but are not shown.
    """

    features: tuple[str, ...]
    synthetic: NDArray[np.float64]
    real: NDArray[np.float64]
    left_out: int
    reason: str = ""


def compare_pairs(synthetic: Table, real: Table) -> Pairs:
    """Total variation of every pair of columns on the coarse grid, with missing values as a cell of each column.

    Raises `DataError` if the schemas differ or a table has no rows.
    """
    check_comparable(synthetic, real)
    columns = [nullable(column) for column in real.schema.columns]
    if len(columns) < 2:
        return Pairs(None, None, 0, (), "not possible because the schema has one column only")
    sizes = [bins_of(column, coarse=True) for column in columns]
    cells = [
        [cells_of(table.values[:, j], column, coarse=True) for j, column in enumerate(columns)]
        for table in (synthetic, real)
    ]
    found = []
    for i, j in combinations(range(len(columns)), 2):
        a, b = (count(side[i] * sizes[j] + side[j], (sizes[i] * sizes[j],)) for side in cells)
        names = (columns[i].name, columns[j].name)
        found.append(PairDistance(names, distance_of_counts(a, b), expected_distance(a, b)))
    return Pairs(
        mean=float(np.mean([pair.value for pair in found])),
        chance_mean=float(np.mean([pair.chance for pair in found])),
        pairs=len(found),
        worst=tuple(sorted(found, key=lambda pair: pair.chance - pair.value)[:WORST]),
    )


def nullable(column: Column) -> Column:
    """The column with a cell for missing values: a withheld column is missing even where the schema requires it."""
    return replace(column, required=False)


def distance_of_counts(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """½ Σ |p_a − p_b| of two tables of counts of the same shape, neither empty."""
    return float(np.abs(a / a.sum() - b / b.sum()).sum() / 2)


def expected_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """What the distance would be on average if both tables were draws from one distribution, their pooled one.

    ½ Σ E|X| with X normal of variance p (1 − p)(1/n + 1/m), and E|X| = √(2/π) times its standard deviation. Cells
    with one or two rows are not quite normal, and it is then a little too large.
    """
    n, m = float(a.sum()), float(b.sum())
    p = (a + b) / (n + m)
    return float(np.sqrt(2 / np.pi * p * (1 - p) * (1 / n + 1 / m)).sum() / 2)


def compare_correlations(synthetic: Table, real: Table, most: int = MOST_FEATURES) -> Correlations:
    """Correlations over the features of `fidelity.expand` that vary in both tables.

    Of more than `most` features those are kept that have the largest differences, in the order of the schema. The
    second level of a column of two says nothing that the first does not, and is left out of the features altogether.

    Raises `DataError` if the schemas differ or a table has no rows.
    """
    check_comparable(synthetic, real)
    features_a, _ = expand(synthetic)
    features_b, _ = expand(real)
    varies = (np.ptp(features_a, axis=0) > 0) & (np.ptp(features_b, axis=0) > 0)
    names = np.array(list(_names(real.schema.columns)))
    told = np.array(list(_told(real.schema.columns)))
    chosen = np.flatnonzero(varies & told)
    if chosen.size < 2:
        empty = np.empty((0, 0))
        return Correlations((), empty, empty, 0, "not possible because fewer than two features vary in both tables")
    a, b = correlation_matrix(features_a[:, chosen]), correlation_matrix(features_b[:, chosen])
    largest = np.abs(a - b).max(axis=0)
    shown = np.sort(np.argsort(-largest, kind="stable")[:most])
    return Correlations(
        features=tuple(str(name) for name in names[chosen[shown]]),
        synthetic=a[np.ix_(shown, shown)],
        real=b[np.ix_(shown, shown)],
        left_out=int(chosen.size - shown.size),
    )


def _names(columns: Iterable[Column]) -> Iterable[str]:
    for column in columns:
        yield from [column.name] if column.is_numeric else [f"{column.name}={level}" for level in column.levels]


def _told(columns: Iterable[Column]) -> Iterable[bool]:
    for column in columns:
        two = len(column.levels) == 2
        yield from [True] if column.is_numeric else [not (two and level == 0) for level in range(len(column.levels))]
