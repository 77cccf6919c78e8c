"""All columns of a table side by side, and the registry of column kinds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.encoding.base import Block, ColumnEncoding
from common.encoding.boolean import BooleanEncoding
from common.encoding.categorical import CategoricalEncoding
from common.encoding.date import DateEncoding
from common.encoding.integer import IntegerEncoding
from common.encoding.number import NumberEncoding
from common.schema import Column, Schema
from common.table import Table

KINDS: dict[str, type[CategoricalEncoding] | type[NumberEncoding] | type[IntegerEncoding]] = {
    "number": NumberEncoding,
    "integer": IntegerEncoding,
    "categorical": CategoricalEncoding,
    "boolean": BooleanEncoding,
    "date": DateEncoding,
}


def encode_column(column: Column) -> ColumnEncoding:
    """The encoding of one column, by its kind."""
    return KINDS[column.kind](column)


@dataclass(frozen=True)
class EncodedTable:
    """`inputs`: float32 (rows, input_width); `levels`: int64 (rows, blocks), `UNOBSERVED` where a block is silent."""

    inputs: Tensor
    levels: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, rows: np.ndarray) -> EncodedTable:
        """The rows with these numbers, in this order."""
        index = torch.from_numpy(rows)
        return EncodedTable(self.inputs[index], self.levels[index])

    def to(self, device: torch.device) -> EncodedTable:
        """The same rows on another device."""
        return EncodedTable(self.inputs.to(device), self.levels.to(device))


class TableEncoding:
    """Encodes tables of one schema; a pure function of the schema, equal at every party.

    `diameter` is diam 𝒳 = √Σ d_j², the largest distance between two encoded rows (privacy.md, section 2).
    """

    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.columns = tuple(encode_column(column) for column in schema.columns)
        self.blocks: tuple[Block, ...] = tuple(block for column in self.columns for block in column.blocks)
        self.input_width = sum(column.input_width for column in self.columns)
        self.diameter = math.sqrt(sum(column.diameter**2 for column in self.columns))

    def encode(self, table: Table) -> EncodedTable:
        """Encode every row."""
        pairs = list(zip(self.columns, table.values.T, strict=True))
        inputs = np.hstack([column.inputs(values) for column, values in pairs])
        levels = np.hstack([column.levels(values) for column, values in pairs])
        return EncodedTable(torch.from_numpy(inputs), torch.from_numpy(levels.astype(np.int64)))

    def decode(self, levels: np.ndarray, uniform: np.ndarray) -> Table:
        """Rows from levels (rows, blocks) and uniform numbers (rows, columns) in [0, 1)."""
        values = np.empty((len(levels), len(self.columns)))
        start = 0
        for j, column in enumerate(self.columns):
            stop = start + len(column.blocks)
            values[:, j] = column.decode(levels[:, start:stop], uniform[:, j])
            start = stop
        return Table(self.schema, values)
