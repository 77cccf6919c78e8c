"""Rows as keys that are equal if and only if the rows are, missing being equal to missing."""

from __future__ import annotations

import numpy as np

from common.table import Table


def canonical(table: Table) -> np.ndarray:
    """The values with one bit pattern a value: -0.0 as 0.0, every NaN the same; shape (rows, columns)."""
    return np.ascontiguousarray(np.where(np.isnan(table.values), np.nan, table.values + 0.0))


def contained(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which rows of `a` are rows of `b`; both canonical, result of shape (rows of a,)."""
    known = {row.tobytes() for row in b}
    return np.array([row.tobytes() in known for row in a], dtype=np.bool_)


def occurs_in(table: Table, other: Table) -> np.ndarray:
    """Which rows of `table` equal one of `other` in every column, shape (rows,)."""
    return contained(canonical(table), canonical(other))


def distinct(table: Table) -> Table:
    """The table with every row once, in order of first occurrence."""
    first: dict[bytes, int] = {}
    for i, row in enumerate(canonical(table)):
        first.setdefault(row.tobytes(), i)
    return Table(table.schema, table.values[list(first.values())])
