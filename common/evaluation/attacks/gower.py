"""Gower distances from patients to synthetic rows, block by block, so that memory does not grow with the tables.

Each column contributes between 0 and 1: for numbers |a − b| as a share of the declared range (on the declared scale),
for categories 0 if equal and 1 if not; a missing value is at 0 from missing and at 1 from every value, so that the
distance is a metric and missingness, which a cohort models too, is compared like a level. Nothing is scaled by data
(Gower 1971 scales by the observed range and leaves missing values out, which makes a row of few values near to all).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from common.encoding.number import to_unit
from common.table import Table

# Distances held at a time: 2 MB in float32, so that a block stays in a core's cache.
BLOCK = 1 << 19
# A missing number lies here; contributions are cut at 1, which is what every known value in [0, 1] is away from it.
MISSING = 3.0


@dataclass(frozen=True)
class _Coded:
    """Columns of a table as arrays of shape (rows,): float32 in [0, 1] or `MISSING`, int8 level or -1."""

    arrays: tuple[np.ndarray, ...]
    rows: int


def _code(table: Table, columns: Sequence[int]) -> _Coded:
    arrays = []
    for j in columns:
        column, values = table.schema.columns[j], table.values[:, j]
        gone = np.isnan(values)
        if column.is_numeric:
            arrays.append(np.where(gone, MISSING, (to_unit(values, column) + 1) / 2).astype(np.float32))
        else:
            arrays.append(np.where(gone, -1, values).astype(np.int8))
    return _Coded(tuple(arrays), len(table))


class Block:
    """Distances of some consecutive patients to every synthetic row; arrays are reused by the next block."""

    def __init__(self, queries: _Coded, candidates: _Coded, rows: slice, buffers: tuple[np.ndarray, ...]) -> None:
        self.rows = rows
        self._queries, self._candidates = queries, candidates
        n = rows.stop - rows.start
        self.total, self._number, self._differs = (buffer[:n] for buffer in buffers)
        self.total[:] = 0
        for position in range(len(candidates.arrays)):
            self.total += self.part(position)

    def part(self, position: int) -> np.ndarray:
        """Contribution of one column, shape (patients, synthetic rows); overwritten by the next call."""
        a, b = self._queries.arrays[position][self.rows, None], self._candidates.arrays[position][None, :]
        if a.dtype == np.int8:
            np.not_equal(a, b, out=self._differs)
            return self._differs
        np.subtract(a, b, out=self._number)
        np.abs(self._number, out=self._number)
        np.minimum(self._number, 1, out=self._number)
        return self._number


def blocks(patients: Table, synthetic: Table, columns: Sequence[int] | None = None) -> Iterator[Block]:
    """Sums of the contributions of `columns` (positions; default all), for consecutive blocks of patients."""
    columns = range(len(synthetic.schema.columns)) if columns is None else columns
    queries, candidates = _code(patients, columns), _code(synthetic, columns)
    size = max(1, BLOCK // candidates.rows)
    shape = (min(size, queries.rows), candidates.rows)
    buffers = np.empty(shape, np.float32), np.empty(shape, np.float32), np.empty(shape, np.bool_)
    for start in range(0, queries.rows, size):
        yield Block(queries, candidates, slice(start, min(start + size, queries.rows)), buffers)


def nearest(patients: Table, synthetic: Table) -> np.ndarray:
    """Mean contribution over all columns to the nearest synthetic row, in [0, 1], shape (patients,)."""
    found = [block.total.min(axis=1) for block in blocks(patients, synthetic)]
    return np.concatenate(found).astype(np.float64) / len(synthetic.schema.columns)


def nearest_other(table: Table, chosen: np.ndarray) -> np.ndarray:
    """As `nearest`, from the `chosen` rows (positions) of a table to the nearest of its other rows."""
    found = []
    for block in blocks(Table(table.schema, table.values[chosen]), table):
        block.total[np.arange(len(block.total)), chosen[block.rows]] = np.inf
        found.append(block.total.min(axis=1))
    return np.concatenate(found).astype(np.float64) / len(table.schema.columns)


def neighbours(patients: Table, synthetic: Table, columns: Sequence[int], k: int) -> np.ndarray:
    """Positions of the `k` nearest synthetic rows, nearest first, shape (patients, k)."""
    found = []
    for block in blocks(patients, synthetic, columns):
        near = np.argpartition(block.total, k - 1, axis=1)[:, :k] if k > 1 else block.total.argmin(axis=1)[:, None]
        order = np.argsort(np.take_along_axis(block.total, near, axis=1), axis=1, kind="stable")
        found.append(np.take_along_axis(near, order, axis=1))
    return np.concatenate(found)
