"""One-way marginals for a picture: the share of rows in every bin of every column, synthetic beside real.

Every number is an un-noised aggregate of patients when one of the tables holds patients (privacy.md, section 0).
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.encoding.number import from_unit, to_unit
from common.evaluation.counts import bins_of, cells_of, count
from common.evaluation.fidelity import check_comparable
from common.evaluation.pairs import distance_of_counts, expected_distance, nullable
from common.schema import EPOCH, Column
from common.table import Table

BINS = 24  # of a number, of equal width on its declared scale
MOST_VALUES = 30  # of an integer that has a bin for each value
DIGITS = 4  # of a share, which is there to be looked at


@dataclass(frozen=True)
class Marginal:
    """The shares of one column, with what is missing apart; all shares of a table add up to 1 with `missing`.

    `labels` name the levels, or the values of a short integer; of other numbers they are the bounds of the bins, one
    more than there are bins. `distance` is the total variation over the evaluation's bins (`counts.bins_of`) and
    missing, `chance` what it would be on average if both tables were draws from one distribution.
    """

    column: str
    kind: str
    scale: str
    labels: tuple[str, ...]
    synthetic: tuple[float, ...]
    real: tuple[float, ...]
    synthetic_missing: float
    real_missing: float
    distance: float
    chance: float


def compare_marginals(synthetic: Table, real: Table) -> list[Marginal]:
    """The marginal of every column, in the order of the schema.

    Raises `DataError` if the schemas differ or a table has no rows.
    """
    check_comparable(synthetic, real)
    return [_marginal(column, synthetic[column.name], real[column.name]) for column in real.schema.columns]


def _marginal(column: Column, synthetic: NDArray[np.float64], real: NDArray[np.float64]) -> Marginal:
    open_to_missing = nullable(column)
    a, b = (count(cells_of(v, open_to_missing), (bins_of(open_to_missing),)) for v in (synthetic, real))
    shares = [_shares(column, values) for values in (synthetic, real)]
    missing = [round(float(np.isnan(values).mean()), DIGITS) for values in (synthetic, real)]
    return Marginal(
        column=column.name,
        kind=column.kind,
        scale=column.scale,
        labels=_labels(column),
        synthetic=shares[0],
        real=shares[1],
        synthetic_missing=missing[0],
        real_missing=missing[1],
        distance=distance_of_counts(a, b),
        chance=expected_distance(a, b),
    )


def _by_value(column: Column) -> bool:
    """Whether a number is an integer of so few values that each has a bin."""
    return column.kind == "integer" and column.maximum - column.minimum < MOST_VALUES


def _shares(column: Column, values: NDArray[np.float64]) -> tuple[float, ...]:
    known = values[~np.isnan(values)]
    if not column.is_numeric:
        found = np.bincount(known.astype(np.intp), minlength=len(column.levels))
    elif _by_value(column):
        places = np.rint(known - column.minimum).astype(np.intp)
        found = np.bincount(places, minlength=round(column.maximum - column.minimum) + 1)
    else:
        found, _ = np.histogram(to_unit(known, column), bins=BINS, range=(-1.0, 1.0))
    return tuple(round(float(share), DIGITS) for share in found / values.size)


def _labels(column: Column) -> tuple[str, ...]:
    if not column.is_numeric:
        return tuple(column.levels)
    if _by_value(column):
        return tuple(str(value) for value in range(round(column.minimum), round(column.maximum) + 1))
    return bin_labels(column, BINS)


def bin_labels(column: Column, bins: int) -> tuple[str, ...]:
    """The `bins` + 1 bounds of the bins of equal width on a number's declared scale."""
    edges = from_unit(np.linspace(-1.0, 1.0, bins + 1), column)
    if column.kind == "date":
        return tuple((EPOCH + datetime.timedelta(days=round(float(edge)))).isoformat() for edge in edges)
    return tuple(f"{float(edge):.4g}" for edge in edges)
