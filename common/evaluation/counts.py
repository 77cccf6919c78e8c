"""What a site may count for an evaluation: tables in which every patient is in exactly one cell.

A table is declared by the study and its schema alone; so are its bins. Replacing one patient moves one count from one
cell to another, an L2 distance of √2, whatever the cohort is that the table compares the patients with. All tables
together are one Gaussian mechanism (`CountPlan.deviations`), or leave un-noised under the site's floor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.schema import Column

Population = Literal["everyone", "fit", "holdout"]
# Bins of equal width on a numeric column's declared scale; a coarse bin is a whole number of fine ones.
FINE_BINS, COARSE_BINS = 12, 4
Key = tuple[str, ...]  # the family, then what the table is about: ("pair", "sex", "age")
Counts = Mapping[Key, NDArray[np.float64]]


@dataclass(frozen=True)
class CountTable:
    """The table `key` with `shape` cells over the patients of `population`; `weight` is its part of the noise budget.

    `nested`: so many cells in a row, from the first on, make up one cell of the same column in another table.
    """

    key: Key
    population: Population
    shape: tuple[int, ...]
    weight: float
    nested: int = 1

    @property
    def size(self) -> int:
        """Number of cells."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class CountPlan:
    """The tables of an evaluation in their order; a vector of all cells is laid out table after table."""

    tables: tuple[CountTable, ...]

    @cached_property
    def size(self) -> int:
        """Cells of all tables."""
        return sum(table.size for table in self.tables)

    def split(self, vector: NDArray[np.float64]) -> dict[Key, NDArray[np.float64]]:
        """The tables of a vector of shape (size,), each in its own shape."""
        if vector.shape != (self.size,):
            raise ValueError(f"expected {self.size} cells, got shape {vector.shape}")
        parts = np.split(vector, np.cumsum([table.size for table in self.tables])[:-1])
        return {table.key: part.reshape(table.shape) for table, part in zip(self.tables, parts, strict=True)}

    def join(self, counts: Counts) -> NDArray[np.float64]:
        """All cells of `counts` as one vector, shape (size,)."""
        if set(counts) != {table.key for table in self.tables}:
            raise ValueError("the counts are not those of this plan")
        return np.concatenate([np.asarray(counts[table.key], dtype=np.float64).ravel() for table in self.tables])

    def deviations(self, noise_multiplier: float) -> NDArray[np.float64]:
        """Standard deviation of the noise in every cell, shape (size,), for a noise multiplier ν in replace units.

        Table t carries σ_t = ν √(2 W / w_t), where w_t is its weight and W the largest total weight that a patient of
        either population takes part in. Replacing him shifts every one of his tables by at most √2, so the shift in
        units of the noise is at most √(Σ 2/σ_t²) = √(Σ w_t / W) / ν ≤ 1/ν: one Gaussian mechanism of multiplier ν.
        """
        totals = [
            sum(table.weight for table in self.tables if table.population in ("everyone", population))
            for population in ("fit", "holdout")
        ]
        scale = max(totals)
        sigma = [noise_multiplier * math.sqrt(2.0 * scale / table.weight) for table in self.tables]
        return np.repeat(sigma, [table.size for table in self.tables])


def bins_of(column: Column, *, coarse: bool = False) -> int:
    """Cells of a column: its levels or its bins, and one more for missing values if it is nullable."""
    inner = (COARSE_BINS if coarse else FINE_BINS) if column.is_numeric else len(column.levels)
    return inner + column.nullable


def cells_of(values: NDArray[np.float64], column: Column, *, coarse: bool = False) -> NDArray[np.intp]:
    """The cell of every value, shape (n,); bins are of equal width on the declared scale, missing is the last cell.

    A missing value of a required column cannot occur in a table that was read with its schema; `ValueError`.
    """
    from common.encoding.number import to_unit  # with PyTorch, for which what only plans need not wait

    missing = np.isnan(values)
    if missing.any() and not column.nullable:
        raise ValueError(f"column {column.name!r} is required and has missing values")
    if column.is_numeric:
        inner = COARSE_BINS if coarse else FINE_BINS
        unit = to_unit(np.where(missing, column.minimum, values), column)
        found = np.clip(np.floor((unit + 1.0) / 2.0 * inner), 0, inner - 1)
    else:
        inner = len(column.levels)
        found = np.where(missing, 0, values)
    return np.where(missing, inner, found).astype(np.intp)


def count(cells: NDArray[np.intp], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """How many patients are in each cell; `cells` holds flat positions in `shape`, one a patient."""
    size = math.prod(shape)
    if cells.size and not (cells.min() >= 0 and cells.max() < size):
        raise ValueError("a cell outside the table")
    return np.bincount(cells, minlength=size).astype(np.float64).reshape(shape)
