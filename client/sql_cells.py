"""From the values of a database driver to columns that the cell rules of files can read; no value in any error."""

from __future__ import annotations

import datetime
import decimal
import uuid
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from common.errors import DataError
from common.schema import Column

SOURCE = "[site.sql]"
KINDS: dict[type, str] = {
    bool: "boolean",
    int: "number",
    float: "number",
    decimal.Decimal: "number",
    str: "text",
    uuid.UUID: "text",
    datetime.date: "date",
    datetime.datetime: "date",
}
SORTABLE = (int, str, decimal.Decimal, uuid.UUID, datetime.date, datetime.datetime)


class ColumnCells:
    """One column of a result, collected batch by batch."""

    def __init__(self, column: Column, missing_values: tuple[str, ...]) -> None:
        self.name = column.name
        self._codes = column.kind in ("categorical", "boolean")
        self._missing = frozenset(missing_values)
        self._kind = ""
        self._whole = True
        self._chunks: list[pa.Array] = []

    def add(self, values: Sequence[Any]) -> None:
        """The next values; `DataError` for a type that no cell has, or for a second one."""
        cells = [None if isinstance(value, str) and value in self._missing else value for value in values]
        types = {type(cell) for cell in cells if cell is not None}
        if self._codes and decimal.Decimal in types:  # a code keeps its spelling
            cells = [format(cell, "f") if isinstance(cell, decimal.Decimal) else cell for cell in cells]
            types = {type(cell) for cell in cells if cell is not None}
        kinds = sorted({self._kind_of(found) for found in types} | ({self._kind} if self._kind else set()))
        if len(kinds) > 1:
            raise DataError(
                f"{SOURCE}: column {self.name!r} mixes {' and '.join(kinds)}, expected one type in all rows",
                fix="cast it in the query, or turn what means missing into NULL: nullif(column, '')",
            )
        if datetime.datetime in types:
            cells = [self._day(cell) for cell in cells]
        self._kind = kinds[0] if kinds else ""
        self._chunks.append(self._arrow(cells, types))

    def array(self) -> pa.ChunkedArray:
        """The whole column, of one Arrow type."""
        if self._kind in ("", "text"):
            kind = pa.string()
        elif self._kind == "number":
            kind = pa.int64() if self._whole else pa.float64()
        else:
            kind = pa.bool_() if self._kind == "boolean" else pa.date32()
        return pa.chunked_array([chunk.cast(kind, safe=False) for chunk in self._chunks], kind)

    def _kind_of(self, found: type) -> str:
        if found not in KINDS:
            raise DataError(
                f"{SOURCE}: column {self.name!r} holds {found.__name__}, expected text, numbers, booleans or dates",
                fix="cast it in the query",
            )
        return KINDS[found]

    def _day(self, cell: Any) -> Any:
        if not isinstance(cell, datetime.datetime):
            return cell
        if cell.tzinfo is not None:
            raise DataError(
                f"{SOURCE}: column {self.name!r} holds moments with a time zone, whose day depends on the connection",
                fix="name the zone in the query: (column at time zone 'Europe/Berlin')::date",
            )
        return cell.date()

    def _arrow(self, cells: list[Any], types: set[type]) -> pa.Array:
        if self._kind == "text":
            return pa.array([None if cell is None else str(cell) for cell in cells], pa.string())
        if self._kind != "number":
            return pa.array(cells)
        if types <= {int}:
            try:
                return pa.array(cells, pa.int64())
            except (OverflowError, pa.ArrowException):
                pass
        self._whole = False
        return pa.array([None if cell is None else float(cell) for cell in cells], pa.float64())


def order_of(keys: Sequence[Any], name: str) -> list[int]:
    """The places of the rows in the order of their keys; `DataError` unless each has one and no two the same."""
    types = {type(key) for key in keys}
    problem = ""
    if type(None) in types:
        problem = f"{sum(key is None for key in keys)} row(s) without a value"
    elif len(types) > 1 or not types <= set(SORTABLE):
        problem = f"values of the type {' and '.join(sorted(found.__name__ for found in types))}"
    elif repeated := len(keys) - len(set(keys)):
        problem = f"{repeated} value(s) that occur before"
    if problem:
        raise DataError(
            f"{SOURCE}: the key column {name!r} has {problem}; expected one value a row, all different, of one type:"
            " text, whole numbers or dates",
            fix="name a column that identifies a patient, or use ORDER BY with several columns",
        )
    return sorted(range(len(keys)), key=lambda row: keys[row])
