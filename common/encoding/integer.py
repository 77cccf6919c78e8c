"""Integers: one level a value up to `MAX_LEVELS` values, else bins of whole numbers that are even on the scale."""

from __future__ import annotations

import numpy as np

from common.encoding.number import NumericEncoding, from_unit
from common.schema import Column

MAX_LEVELS = 200


class IntegerEncoding(NumericEncoding):
    """Whole numbers; edges lie half-way between integers, so every bin holds at least one."""

    def __init__(self, column: Column) -> None:
        count = int(column.maximum - column.minimum) + 1
        if count <= MAX_LEVELS:
            edges = column.minimum - 0.5 + np.arange(count + 1, dtype=np.float64)
        else:
            inner = np.floor(from_unit(np.linspace(-1.0, 1.0, MAX_LEVELS + 1)[1:-1], column)) + 0.5
            edges = np.unique(np.concatenate([[column.minimum - 0.5], inner, [column.maximum + 0.5]]))
        self.first = np.ceil(edges[:-1])
        self.count = np.ceil(edges[1:]) - self.first
        super().__init__(column, edges, self.first + (self.count - 1) / 2)

    def within(self, bins: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """A whole number inside the bin, each equally likely."""
        return self.first[bins] + np.floor(uniform * self.count[bins])
