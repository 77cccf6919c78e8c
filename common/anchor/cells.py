"""A row as one cell in every column: the encoding's levels or bins, and one more cell where a value may be missing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.encoding import TableEncoding
from common.encoding.base import UNOBSERVED
from common.schema import Schema


@dataclass(frozen=True)
class ColumnCells:
    """The cells of one column: `known` levels or bins, then one for missing if `nullable`; in `block` of the encoding.

    `numeric` says that neighbouring cells are neighbours on the column's scale.
    """

    name: str
    known: int
    nullable: bool
    numeric: bool
    block: int

    @property
    def size(self) -> int:
        """Number of cells."""
        return self.known + self.nullable


class TableCells:
    """The cells of every column of a schema; a pure function of the schema, equal at every party."""

    def __init__(self, schema: Schema, target: str | None) -> None:
        self.schema = schema
        encoding = TableEncoding(schema)
        self.blocks = len(encoding.blocks)
        found, block = [], 0
        for column in encoding.columns:
            declared = column.column
            size = column.blocks[0].size
            known = size if declared.is_numeric else len(declared.levels)
            found.append(ColumnCells(declared.name, known, declared.nullable, declared.is_numeric, block))
            block += len(column.blocks)
        self.columns: tuple[ColumnCells, ...] = tuple(found)
        self.target: int | None = None if target is None else schema.index(target)

    @property
    def sizes(self) -> list[int]:
        """Number of cells of every column."""
        return [column.size for column in self.columns]

    def of(self, levels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Cells (rows, columns) of encoded levels (rows, blocks)."""
        cells = levels[:, [column.block for column in self.columns]]
        for j, column in enumerate(self.columns):
            if column.numeric and column.nullable:
                cells[:, j] = np.where(cells[:, j] == UNOBSERVED, column.known, cells[:, j])
        return cells

    def levels(self, cells: NDArray[np.int64]) -> NDArray[np.int64]:
        """Encoded levels (rows, blocks) of cells (rows, columns): the inverse of `of`."""
        levels = np.zeros((len(cells), self.blocks), dtype=np.int64)
        for j, column in enumerate(self.columns):
            levels[:, column.block] = cells[:, j]
            if column.numeric and column.nullable:
                missing = cells[:, j] == column.known
                levels[missing, column.block] = UNOBSERVED
                levels[:, column.block + 1] = missing
        return levels

    def split(self, flat: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        """The parts of a vector with one entry a cell, by column."""
        return np.split(flat, np.cumsum(self.sizes)[:-1])
