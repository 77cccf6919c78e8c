"""Which values are missing together: the pattern of missing values over a row, and pairs of columns.

The rate of every single column is in `fidelity`. Every number is an un-noised aggregate of patients when one of the
tables holds patients (privacy.md, section 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from common.evaluation.fidelity import check_comparable
from common.evaluation.pairs import WORST, PairDistance, distance_of_counts, expected_distance
from common.table import Table

PATTERNS = 50  # most common patterns that have a cell of their own; all others share one
LISTED = 12  # most common patterns that are listed
DIGITS = 4  # of a share, which is there to be looked at


@dataclass(frozen=True)
class Pattern:
    """Columns that a row lacks, none or several, and the share of synthetic and of real rows that lack just these."""

    columns: tuple[str, ...]
    synthetic: float
    real: float


@dataclass(frozen=True)
class Missingness:
    """Patterns and pairs of missing values.

    `patterns` is the total variation over the `cells` most common patterns of both tables together and one cell for
    all others, `patterns_chance` what chance alone would give, `others` the share of synthetic and of real rows in that
    last cell. `together` is the mean over `pairs` of columns of the difference in the share of rows that lack both,
    `worst` the largest, each with its mean under chance alone. `common` lists the most common patterns of both tables
    together. None and a `reason` where no value is missing anywhere.
    """

    patterns: float | None
    patterns_chance: float | None
    cells: int
    others: tuple[float, float]
    together: float | None
    pairs: int
    worst: tuple[PairDistance, ...]
    common: tuple[Pattern, ...] = ()
    reason: str = ""


def compare_missingness(synthetic: Table, real: Table) -> Missingness:
    """Compare what is missing together in two tables of the same schema.

    Raises `DataError` if the schemas differ or a table has no rows.
    """
    check_comparable(synthetic, real)
    gone = [np.isnan(table.values) for table in (synthetic, real)]
    columns = np.flatnonzero(gone[0].any(axis=0) | gone[1].any(axis=0))
    if columns.size == 0:
        return Missingness(None, None, 0, (0.0, 0.0), None, 0, (), (), "not possible because no value is missing")
    gone = [side[:, columns] for side in gone]
    a, b, patterns = _pattern_counts(*gone)
    cells = len(patterns)
    names = [real.schema.names[j] for j in columns]
    pairs = _pairs(gone[0], gone[1], names)
    return Missingness(
        patterns=distance_of_counts(a, b),
        patterns_chance=expected_distance(a, b),
        cells=cells,
        others=(float(a[-1] / a.sum()), float(b[-1] / b.sum())),
        together=float(np.mean([pair.value for pair in pairs])) if pairs else None,
        pairs=len(pairs),
        worst=tuple(sorted(pairs, key=lambda pair: -pair.value)[:WORST]),
        common=tuple(
            Pattern(
                tuple(name for name, lacks in zip(names, pattern, strict=True) if lacks),
                round(float(a[k] / a.sum()), DIGITS),
                round(float(b[k] / b.sum()), DIGITS),
            )
            for k, pattern in enumerate(patterns[:LISTED])
        ),
    )


def _pattern_counts(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of each table with every common pattern, the last entry for all others, and the common ones as booleans."""
    patterns, which = np.unique(np.packbits(np.vstack([a, b]), axis=1), axis=0, return_inverse=True)
    which = which.ravel()
    sides = [np.bincount(part, minlength=len(patterns)) for part in (which[: len(a)], which[len(a) :])]
    # A pattern is common by its shares, so that a cohort larger than the patients does not choose alone.
    order = np.argsort(-(sides[0] / len(a) + sides[1] / len(b)), kind="stable")
    own, rest = order[:PATTERNS], order[PATTERNS:]
    first, second = (np.append(side[own], side[rest].sum()).astype(np.float64) for side in sides)
    return first, second, np.unpackbits(patterns[own], axis=1, count=a.shape[1]).astype(bool)


def _pairs(a: np.ndarray, b: np.ndarray, names: list[str]) -> list[PairDistance]:
    shares = [side.astype(np.float64).T @ side.astype(np.float64) / len(side) for side in (a, b)]
    pooled = (shares[0] * len(a) + shares[1] * len(b)) / (len(a) + len(b))
    chance = np.sqrt(2 / np.pi * pooled * (1 - pooled) * (1 / len(a) + 1 / len(b)))
    difference = np.abs(shares[0] - shares[1])
    return [
        PairDistance((names[i], names[j]), float(difference[i, j]), float(chance[i, j]))
        for i, j in combinations(range(len(names)), 2)
    ]
