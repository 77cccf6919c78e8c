"""Categorical columns: one-hot levels; a missing value of a nullable column is one more level."""

from __future__ import annotations

import math

import numpy as np

from common.encoding.base import Block, ColumnEncoding, one_hot
from common.schema import Column


class CategoricalEncoding(ColumnEncoding):
    """Values are level indices 0 … m-1 (NaN: missing); the block has m levels, or m + 1 if nullable."""

    def __init__(self, column: Column) -> None:
        self.column = column
        self.size = len(column.levels) + column.nullable
        self.input_width = self.size
        self.blocks = (Block(self.size),)
        self.diameter = math.sqrt(2.0) if self.size > 1 else 0.0

    def inputs(self, values: np.ndarray) -> np.ndarray:
        """One-hot rows (n, size)."""
        return one_hot(self._codes(values), self.size)

    def levels(self, values: np.ndarray) -> np.ndarray:
        """Level indices (n, 1)."""
        return self._codes(values)[:, None]

    def decode(self, levels: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Level indices as float64 (n,), NaN for the missing level; `uniform` is not needed."""
        values = levels[:, 0].astype(np.float64)
        values[levels[:, 0] == len(self.column.levels)] = np.nan
        return values

    def _codes(self, values: np.ndarray) -> np.ndarray:
        return np.where(np.isnan(values), len(self.column.levels), values).astype(np.int64)
