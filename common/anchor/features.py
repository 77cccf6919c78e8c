"""How a row is encoded for message two: scores that come from the noised marginals of message one, never from patients.

A column contributes, each about of mean 0 and variance 1 over the marginals it was made from:
- a missing value: the indicator, standardised;
- a number: Legendre polynomials 1 and 2 of its rank (the share of the marginal below it), 0 where it is missing;
- categories: the most frequent level against all others, the next against the rest, and so on, at most `MOST_STICKS`.

The target's scores are multiplied by `TARGET_WEIGHT`, the second polynomials by `CURVATURE_WEIGHT`. Weights cost
radius, which is noise on everything, and buy precision where they are large: a correlation with the target is what a
prognostic model rests on. They are constants, chosen on two public tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from common.anchor.cells import ColumnCells, TableCells

TARGET_WEIGHT = 3.0
CURVATURE_WEIGHT = 0.5
MOST_STICKS = 12
# R^2 over the mean squared length of a row whose columns are independent: longer rows are shortened.
RADIUS_FACTOR = 1.1
# Added to a variance before dividing by its root: a level that hardly occurs must not become a long row.
VARIANCE_FLOOR = 0.02
LEAST_SPREAD = 0.3  # of a score whose marginal sits in a few cells
LEAST_CURVATURE = 0.2  # a second polynomial that is nearly a multiple of the first says nothing


class Kind(Enum):
    """What a feature of a column says."""

    MISSING = "missing"
    RANK = "rank"
    CURVATURE = "curvature"
    LEVEL = "level"


@dataclass(frozen=True)
class ColumnFeatures:
    """The features of one column: `table` (cells, features), weights included, and what each says.

    `order` are the known levels of a column of categories, most frequent first; feature LEVEL number i tells level
    order[i] from those behind it.
    """

    column: ColumnCells
    table: NDArray[np.float64]
    kinds: tuple[Kind, ...]
    weights: NDArray[np.float64]
    order: tuple[int, ...] = ()


class FeatureMap:
    """Rows of cells to rows of features, and the radius to which rows are clipped; a function of the marginals."""

    def __init__(self, cells: TableCells, marginals: Sequence[NDArray[np.float64]]) -> None:
        self.cells = cells
        self.columns = tuple(
            column_features(column, marginal, TARGET_WEIGHT if j == cells.target else 1.0)
            for j, (column, marginal) in enumerate(zip(cells.columns, marginals, strict=True))
        )
        counts = [len(column.kinds) for column in self.columns]
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self.size = int(self.starts[-1])
        self.owner = np.repeat(np.arange(len(counts)), counts)
        self.kinds = tuple(kind for column in self.columns for kind in column.kinds)
        self.weights = np.concatenate([column.weights for column in self.columns])
        expected = sum(
            float(marginal @ np.square(column.table).sum(axis=1))
            for column, marginal in zip(self.columns, marginals, strict=True)
        )
        self.radius = math.sqrt(RADIUS_FACTOR * max(expected, 1.0))

    def of(self, cells: NDArray[np.int64]) -> NDArray[np.float64]:
        """Features (rows, size), clipped to the radius, of cells (rows, columns); a row that is not finite is 0."""
        rows = np.hstack([column.table[cells[:, j]] for j, column in enumerate(self.columns)])
        length = np.linalg.norm(rows, axis=1)
        finite = np.isfinite(length)
        # Shortened by a hair more than needed, so that rounding cannot leave a row outside the ball.
        share = np.minimum(1.0, self.radius * (1.0 - 1e-12) / np.maximum(np.where(finite, length, 1.0), 1e-300))
        return np.where(finite[:, None], rows, 0.0) * share[:, None]


def column_features(column: ColumnCells, marginal: NDArray[np.float64], weight: float) -> ColumnFeatures:
    """The features of one column whose cells have these probabilities (cells,), every feature times `weight`."""
    known = marginal[: column.known]
    total = float(known.sum())
    shares = known / total if total > 0 else np.full(column.known, 1.0 / column.known)
    found: list[tuple[Kind, NDArray[np.float64], float]] = []
    if column.nullable:
        indicator = np.zeros(column.size)
        indicator[column.known] = 1.0
        found.append((Kind.MISSING, _standardised(indicator, float(marginal[column.known])), 1.0))
    order: tuple[int, ...] = ()
    if column.numeric:
        for kind, scores in _ranks(shares):
            padded = np.zeros(column.size)
            padded[: column.known] = scores
            found.append((kind, padded, CURVATURE_WEIGHT if kind is Kind.CURVATURE else 1.0))
    else:
        order = tuple(int(level) for level in np.argsort(-shares, kind="stable"))
        for number in range(min(column.known - 1, MOST_STICKS)):
            rest = list(order[number:])
            mass = float(shares[rest].sum())
            share = float(shares[order[number]]) / mass if mass > 0 else 0.5
            scores = np.zeros(column.size)
            scores[rest] = _standardised(np.eye(column.known)[order[number]][rest], share)
            found.append((Kind.LEVEL, scores, 1.0))
    table = np.zeros((column.size, len(found)))
    for i, (_, scores, own) in enumerate(found):
        table[:, i] = (scores - float(marginal @ scores)) * own * weight
    weights = np.array([own * weight for _, _, own in found])
    return ColumnFeatures(column, table, tuple(kind for kind, _, _ in found), weights, order)


def _standardised(indicator: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    share = min(max(share, 0.0), 1.0)
    return (indicator - share) / math.sqrt(share * (1.0 - share) + VARIANCE_FLOOR)


def _ranks(shares: NDArray[np.float64]) -> list[tuple[Kind, NDArray[np.float64]]]:
    """Orthonormal scores of the bins: the rank, and its square as far as it is not the rank."""
    rank = np.cumsum(shares) - shares / 2.0
    first = math.sqrt(3.0) * (2.0 * rank - 1.0)
    first = first - float(shares @ first)
    variance = float(shares @ np.square(first))
    found = [(Kind.RANK, first / max(math.sqrt(variance), LEAST_SPREAD))]
    second = math.sqrt(5.0) * (6.0 * np.square(rank) - 6.0 * rank + 1.0)
    second = second - float(shares @ second)
    second = second - first * float(shares @ (second * first)) / max(variance, 1e-9)
    spread = math.sqrt(float(shares @ np.square(second)))
    if spread >= LEAST_CURVATURE:
        found.append((Kind.CURVATURE, second / max(spread, LEAST_SPREAD)))
    return found
