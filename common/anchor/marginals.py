"""Message one: how many patients fall into every cell of every column, numeric columns as cosine coefficients.

The counts h of a numeric column leave as W C h, C the orthonormal cosine transform over its bins (without the constant,
which the public number of patients gives) and W decreasing weights: equal noise on these coefficients is little noise
on the smooth part of a histogram, on which distribution functions and quantiles rest, and much on the rough one. This
is a strategy in the sense of the matrix mechanism (Li, Hay, Rastogi, Miklau, McGregor 2010) and a function of the
schema alone. Other columns, and the cell of the missing, leave as plain counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dct

from common.anchor.cells import ColumnCells, TableCells

# Weight (1 + f)^-DECAY of frequency f; chosen on two public tables between 0 (plain counts) and 1.5.
DECAY = 0.5
# Columns with fewer bins are counted plainly.
FEWEST_BINS = 5


@dataclass(frozen=True)
class ColumnStatistic:
    """One column's part of message one: `matrix` (values, cells) maps counts to values, columns of norm at most 1."""

    column: ColumnCells

    @property
    def smooth(self) -> bool:
        """Whether the known cells leave as cosine coefficients."""
        return self.column.numeric and self.column.known >= FEWEST_BINS

    @cached_property
    def weights(self) -> NDArray[np.float64]:
        """W (known - 1,) of a smooth column, scaled so that no column of W C is longer than 1."""
        transform = dct(np.eye(self.column.known), axis=0, norm="ortho")[1:]
        weights = (1.0 + np.arange(1, self.column.known)) ** -DECAY
        return weights / np.linalg.norm(weights[:, None] * transform, axis=0).max()

    @property
    def size(self) -> int:
        """Number of values."""
        return self.column.size - self.smooth

    def values(self, counts: NDArray[np.float64]) -> NDArray[np.float64]:
        """The column's values (size,) of its counts (cells,)."""
        if not self.smooth:
            return counts
        known = self.weights * np.asarray(dct(counts[: self.column.known], norm="ortho"))[1:]
        return np.concatenate([known, counts[self.column.known :]])

    @cached_property
    def largest_shift_squared(self) -> float:
        """The largest squared distance between the values of two patients: over all pairs of cells, exactly."""
        vectors = np.array([self.values(row) for row in np.eye(self.column.size)])
        gram = vectors @ vectors.T
        lengths = np.diag(gram)
        return float((lengths[:, None] + lengths[None, :] - 2.0 * gram).max())


class MarginalStatistics:
    """Message one of a schema: a vector, its parts, and the distance by which replacing one patient can move it."""

    def __init__(self, cells: TableCells) -> None:
        self.cells = cells
        self.columns = tuple(ColumnStatistic(column) for column in cells.columns)

    @property
    def size(self) -> int:
        """Number of values."""
        return sum(column.size for column in self.columns)

    @cached_property
    def sensitivity(self) -> float:
        """L2 sensitivity under replacing one patient: every column may move by the largest distance of two cells.

        A fact about the schema, not a bound on data: computed over all pairs of cells.
        """
        return math.sqrt(sum(column.largest_shift_squared for column in self.columns)) * (1.0 + 1e-12)

    def vector(self, levels: NDArray[np.int64]) -> NDArray[np.float64]:
        """The exact values (size,) of encoded patients (rows, blocks)."""
        cells = self.cells.of(levels)
        return np.concatenate(
            [
                statistic.values(np.bincount(cells[:, j], minlength=statistic.column.size).astype(np.float64))
                for j, statistic in enumerate(self.columns)
            ]
        )

    def split(self, vector: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        """The values of every column."""
        return np.split(vector, np.cumsum([column.size for column in self.columns])[:-1])
