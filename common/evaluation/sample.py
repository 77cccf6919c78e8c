"""A random part of a table that is larger than an evaluation needs."""

from __future__ import annotations

import numpy as np

from common.table import Table


def at_most(table: Table, rows: int, rng: np.random.Generator) -> Table:
    """`table` itself, or `rows` of its rows drawn without replacement, in their order."""
    if len(table) <= rows:
        return table
    return Table(table.schema, table.values[np.sort(rng.choice(len(table), rows, replace=False))])
