"""Numbers: a monotone map of the declared range onto [-1, 1], cut into bins of equal width there.

Nothing is learned from data: range and scale are declared. Within a bin a synthetic value is uniform (in the mapped
range), so that the resolution of the model is one bin. Missing values are a block of their own.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np
from numpy.polynomial import legendre

from common.encoding.base import UNOBSERVED, Block, ColumnEncoding, one_hot
from common.schema import Column

BINS = 64
DEGREE = 4
# A log scale is log(1 + (x - minimum)/offset) with this offset, as a fraction of the range: defined at a minimum of 0.
LOG_OFFSET = 0.01
MOST_DECIMALS = 290  # more would overflow in rounding


def to_unit(values: np.ndarray, column: Column) -> np.ndarray:
    """Map [minimum, maximum] monotonically onto [-1, 1] on the column's declared scale; NaN stays NaN."""
    share = (np.clip(values, column.minimum, column.maximum) - column.minimum) / (column.maximum - column.minimum)
    if column.scale == "log":
        share = np.log1p(share / LOG_OFFSET) / math.log1p(1.0 / LOG_OFFSET)
    return 2.0 * share - 1.0


def from_unit(unit: np.ndarray, column: Column) -> np.ndarray:
    """Inverse of `to_unit`, clipped to the declared bounds."""
    share = (np.clip(unit, -1.0, 1.0) + 1.0) / 2.0
    if column.scale == "log":
        share = LOG_OFFSET * np.expm1(share * math.log1p(1.0 / LOG_OFFSET))
    return np.clip(column.minimum + share * (column.maximum - column.minimum), column.minimum, column.maximum)


def polynomial_basis(points: np.ndarray, degree: int = DEGREE) -> np.ndarray:
    """Legendre polynomials P_1 … P_k at `points` in [-1, 1], shape (m, k), k = min(degree, m - 1); |P_k| ≤ 1."""
    degree = min(degree, len(points) - 1)
    return legendre.legvander(np.clip(points, -1.0, 1.0), degree)[:, 1:]


class NumericEncoding(ColumnEncoding):
    """Shared by numbers, integers and dates: bins between `edges`, which are in the column's unit and increasing."""

    def __init__(self, column: Column, edges: np.ndarray, centres: np.ndarray) -> None:
        self.column = column
        self.edges = edges
        bins = Block(len(edges) - 1, polynomial_basis(to_unit(centres, column)))
        self.blocks = (bins, Block(2)) if column.nullable else (bins,)
        self.input_width = 3 if column.nullable else 1
        # The value lies in [-1, 1] and a missing one at 0 with its flag √2 away: √(1 + 2) < 2.
        self.diameter = 2.0

    def inputs(self, values: np.ndarray) -> np.ndarray:
        """The mapped value (0 where missing) and, if nullable, a one-hot flag (known, missing)."""
        missing = np.isnan(values)
        unit = np.where(missing, 0.0, to_unit(values, self.column)).astype(np.float32)[:, None]
        return np.hstack([unit, one_hot(missing.astype(np.int64), 2)]) if self.column.nullable else unit

    def levels(self, values: np.ndarray) -> np.ndarray:
        """Bin of each value (`UNOBSERVED` where missing) and, if nullable, 0 = known, 1 = missing."""
        missing = np.isnan(values)
        clipped = np.clip(np.where(missing, self.column.minimum, values), self.column.minimum, self.column.maximum)
        bins = np.clip(np.searchsorted(self.edges, clipped, side="right") - 1, 0, self.blocks[0].size - 1)
        bins = np.where(missing, UNOBSERVED, bins)
        return np.column_stack([bins, missing]) if self.column.nullable else bins[:, None]

    def decode(self, levels: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """A value inside each bin, NaN where the flag says missing."""
        bins = np.maximum(levels[:, 0], 0)
        values = self.within(bins, uniform)
        if self.column.nullable:
            values[levels[:, 1] == 1] = np.nan
        return values

    @abstractmethod
    def within(self, bins: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """The point at share `uniform` of each bin, in the column's unit."""


class NumberEncoding(NumericEncoding):
    """A real number: `BINS` bins of equal width on the declared scale."""

    def __init__(self, column: Column) -> None:
        unit_edges = np.linspace(-1.0, 1.0, BINS + 1)
        edges = from_unit(unit_edges, column)
        edges[0], edges[-1] = column.minimum, column.maximum  # which rounding may miss
        super().__init__(column, edges, from_unit((unit_edges[1:] + unit_edges[:-1]) / 2, column))
        self.step = 2.0 / BINS
        # Digits beyond a ten-thousandth of the declared range would claim a precision that one bin does not have.
        self.decimals = max(0, math.ceil(4.0 - math.log10(column.maximum - column.minimum)))

    def within(self, bins: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Uniform on the declared scale inside the bin, rounded to `decimals`, inside the declared bounds."""
        values = from_unit(-1.0 + (bins + uniform) * self.step, self.column)
        if self.decimals <= MOST_DECIMALS:
            values = np.round(values, self.decimals)
        return np.clip(values, self.column.minimum, self.column.maximum)
