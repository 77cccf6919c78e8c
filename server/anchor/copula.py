"""The anchor's own generator: a class of the target, a Gaussian code with a linear map, and monotone maps to levels.

y ~ p(y); z ~ N(0, I), u = L z; every column turns its part of u into a cell by thresholds that depend on y. Given y it
is a Gaussian copula of mixed type. A column reads its part of u from left to right: is the value missing, is it the
most frequent level, the next one, …, or in which bin does it lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from common.anchor.cells import ColumnCells, TableCells
from common.anchor.features import MOST_STICKS
from common.encoding import TableEncoding
from common.generation import BATCH_ROWS, check_rows
from common.table import Table

LEAST_PROBABILITY = 1e-9


@dataclass(frozen=True)
class ColumnMap:
    """One column: from codes (rows, dims) and classes (rows,) to cells.

    `conditional` (cells, classes) are probabilities; `order` the known levels of a column of categories.
    """

    column: ColumnCells
    conditional: NDArray[np.float64]
    order: tuple[int, ...] = ()

    @property
    def dims(self) -> int:
        """How many entries of the code the column reads."""
        return self.column.nullable + (1 if self.column.numeric else min(self.column.known - 1, MOST_STICKS))

    def cells(
        self, codes: NDArray[np.float64], classes: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """The cell of every row; `rng` is asked only for levels behind the last stick."""
        result = np.full(len(codes), -1, dtype=np.int64)
        start = 0
        if self.column.nullable:
            limits = ndtri(1.0 - np.clip(self.conditional[self.column.known], 0.0, 1.0))
            result[codes[:, 0] > limits[classes]] = self.column.known
            start = 1
        known = self.conditional[: self.column.known] + LEAST_PROBABILITY
        known = known / known.sum(axis=0)
        if self.column.numeric:
            edges = ndtri(np.clip(np.cumsum(known, axis=0)[:-1], 0.0, 1.0))
            bins = np.empty_like(result)
            for label in range(known.shape[1]):
                chosen = classes == label
                bins[chosen] = np.searchsorted(edges[:, label], codes[chosen, start], side="right")
            return np.where(result < 0, bins, result)
        sticks = self.dims - start
        for number in range(sticks):
            share = known[self.order[number]] / known[list(self.order[number:])].sum(axis=0)
            here = (result < 0) & (codes[:, start + number] > ndtri(1.0 - share)[classes])
            result[here] = self.order[number]
        left, rest = np.flatnonzero(result < 0), list(self.order[sticks:])
        if len(rest) == 1:
            result[left] = rest[0]
        else:
            cumulative = np.cumsum(known[rest] / known[rest].sum(axis=0), axis=0)
            uniform = rng.random(len(left))
            which = (uniform[None, :] > cumulative[:-1][:, classes[left]]).sum(axis=0)
            result[left] = np.array(rest)[which]
        return result


@dataclass(frozen=True)
class Copula:
    """The generator. `classes` (K,) are p(y), `loading` L (dims, dims), `columns` all but the target, in order."""

    cells: TableCells
    classes: NDArray[np.float64]
    columns: tuple[ColumnMap, ...]
    loading: NDArray[np.float64]

    @property
    def largest_singular_value(self) -> float:
        """‖L‖₂: the Lipschitz constant of the linear map from the code to what the columns read."""
        return float(np.linalg.norm(self.loading, 2))

    def rows(
        self, codes: NDArray[np.float64], classes: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.int64]:
        """Cells (rows, columns) of standard normal codes (rows, dims) and classes of the target (rows,)."""
        read = codes @ self.loading.T
        result = np.empty((len(codes), len(self.cells.columns)), dtype=np.int64)
        if self.cells.target is not None:
            result[:, self.cells.target] = classes
        start = 0
        for j, mapped in zip(self.others, self.columns, strict=True):
            result[:, j] = mapped.cells(read[:, start : start + mapped.dims], classes, rng)
            start += mapped.dims
        return result

    @property
    def others(self) -> Sequence[int]:
        """Positions of the columns that are not the target."""
        return [j for j in range(len(self.cells.columns)) if j != self.cells.target]

    def sample_cells(self, rows: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Cells (rows, columns) of `rows` new rows."""
        classes = draw_classes(self.classes, rng.random(rows))
        return self.rows(rng.standard_normal((rows, len(self.loading))), classes, rng)

    def sample(self, rows: int, seed: int) -> Iterator[Table]:
        """New rows in tables of at most `BATCH_ROWS`, checked against the schema."""
        encoding, rng = TableEncoding(self.cells.schema), np.random.default_rng(seed)
        for start in range(0, rows, BATCH_ROWS):
            levels = self.cells.levels(self.sample_cells(min(BATCH_ROWS, rows - start), rng))
            table = encoding.decode(levels, rng.random((len(levels), len(encoding.columns))))
            check_rows(table)
            yield table


def draw_classes(probabilities: NDArray[np.float64], uniform: NDArray[np.float64]) -> NDArray[np.int64]:
    """Classes by inversion of the distribution function."""
    return np.searchsorted(np.cumsum(probabilities)[:-1], uniform, side="right").astype(np.int64)
