"""From the cells of one column, as a file holds them, to numbers; what does not fit is counted, never quoted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from common.schema import Column, parse_date

pc: Any = pyarrow.compute  # its functions are made at run time, where a type checker cannot see them
MOST_ROWS_NAMED = 5
# Only plain decimal notation: no "0x1F", no "1_000", no "infinity", no decimal comma.
PLAIN_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"


@dataclass(frozen=True)
class ColumnReport:
    """What reading one column found: counts and row numbers (1 = first data row), never values."""

    name: str
    missing: int = 0
    below: int = 0
    above: int = 0
    bounds_rows: tuple[int, ...] = ()
    invalid: int = 0
    invalid_rows: tuple[int, ...] = ()
    expected: str = ""
    missing_but_required: int = 0
    required_rows: tuple[int, ...] = ()
    all_missing: bool = False
    constant: bool = False

    @property
    def fits(self) -> bool:
        """Whether the column can be used (clipped values are the site policy's business)."""
        return not self.invalid and not self.missing_but_required


def row_list(rows: tuple[int, ...], total: int) -> str:
    """Row numbers for a person: "3, 8" or, where `total` is more than are named, "3, 8, ..."."""
    return ", ".join(map(str, rows)) + (", ..." if total > len(rows) else "")


def parse_column(
    array: pa.ChunkedArray, column: Column, missing_values: tuple[str, ...]
) -> tuple[np.ndarray, ColumnReport]:
    """Parse one column as read from a file, and report on it.

    Returns float64 of shape (rows,) in the encoding of `Table.values`: values outside the bounds are moved to the
    bound, missing and invalid cells are NaN.
    """
    array = _plain(array)
    missing = _mask(array.is_null(nan_is_null=pa.types.is_floating(array.type)))
    if pa.types.is_string(array.type):
        missing |= _mask(pc.is_in(array, value_set=pa.array(missing_values, pa.string())))
    elif pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        # In a typed column the spelling "-9" for missing is the number -9.
        marks = [float(mark) for mark in missing_values if re.fullmatch(PLAIN_NUMBER, mark, re.ASCII)]
        missing |= np.isin(_floats(array), marks)
    if column.kind in ("categorical", "boolean"):
        parsed, expected = _parse_levels(array, column)
    elif column.kind == "date":
        parsed, expected = _parse_dates(array), "dates as YYYY-MM-DD"
    else:
        parsed, expected = _parse_numbers(array), "finite numbers (decimal point, no unit)"
        if column.kind == "integer":
            parsed = np.where(parsed == np.floor(parsed), parsed, np.nan)
            expected = "whole numbers"
    parsed = np.where(missing, np.nan, parsed)
    invalid = np.isnan(parsed) & ~missing
    below = above = np.zeros(len(parsed), dtype=bool)
    if column.is_numeric:
        below, above = parsed < column.minimum, parsed > column.maximum
        parsed = np.clip(parsed, column.minimum, column.maximum)
    unmet = missing & column.required
    known = parsed[~np.isnan(parsed)]
    return parsed, ColumnReport(
        name=column.name,
        missing=int(missing.sum()),
        below=int(below.sum()),
        above=int(above.sum()),
        bounds_rows=_first_rows(below | above),
        invalid=int(invalid.sum()),
        invalid_rows=_first_rows(invalid),
        expected=expected,
        missing_but_required=int(unmet.sum()),
        required_rows=_first_rows(unmet),
        all_missing=bool(missing.all()),
        constant=known.size > 0 and bool((known == known[0]).all()),
    )


def _plain(array: pa.ChunkedArray) -> pa.ChunkedArray:
    """The array without dictionary, and text in Arrow's one plain string type."""
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if pa.types.is_large_string(array.type) or pa.types.is_string_view(array.type):
        array = array.cast(pa.string())
    return array


def _first_rows(mask: np.ndarray) -> tuple[int, ...]:
    return tuple(int(row) + 1 for row in np.flatnonzero(mask)[:MOST_ROWS_NAMED])


def _mask(array: pa.ChunkedArray) -> np.ndarray:
    return np.array(array.to_numpy(), dtype=bool)


def _floats(array: pa.ChunkedArray) -> np.ndarray:
    return np.array(array.cast(pa.float64(), safe=False).to_numpy(), dtype=np.float64)


def _parse_numbers(array: pa.ChunkedArray) -> np.ndarray:
    kind = array.type
    if pa.types.is_string(kind):
        text = pc.utf8_trim_whitespace(array)
        plain = pc.match_substring_regex(text, PLAIN_NUMBER)
        array = pc.if_else(plain, text, pa.scalar(None, pa.string()))
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        return np.full(len(array), np.nan)
    numbers = _floats(array)
    return np.where(np.isfinite(numbers), numbers, np.nan)


def _parse_levels(array: pa.ChunkedArray, column: Column) -> tuple[np.ndarray, str]:
    """Index of each cell's level, and what is expected of a cell."""
    expected = "one of the declared categories"
    spellings: dict[str, float] = {level: float(i) for i, level in enumerate(column.levels)}
    if column.kind == "boolean":
        if pa.types.is_boolean(array.type):
            return _floats(array.cast(pa.uint8())), expected
        spellings = dict.fromkeys(column.false_values, 0.0) | dict.fromkeys(column.true_values, 1.0)
    if pa.types.is_floating(array.type):
        # A code stored as a float has lost its spelling; refuse, do not guess.
        expected += " (they are stored as floating point numbers, which lose a code's spelling)"
    if not (pa.types.is_string(array.type) or pa.types.is_integer(array.type)):
        return np.full(len(array), np.nan), expected
    index = pc.index_in(array.cast(pa.string()), value_set=pa.array(list(spellings), pa.string()))
    known = _mask(index.is_valid())
    codes = np.array(list(spellings.values()))[np.array(index.fill_null(0).to_numpy(), dtype=np.int64)]
    return np.where(known, codes, np.nan), expected


def _parse_dates(array: pa.ChunkedArray) -> np.ndarray:
    """Days since 1970-01-01; a moment counts as the day it falls on in its own time zone."""
    kind = array.type
    if pa.types.is_string(kind):
        unique: list[str | None] = array.unique().to_pylist()
        index = pc.index_in(array, value_set=pa.array(unique, pa.string()))
        days = [parse_date(text or "") for text in unique]
        return np.array(days, dtype=np.float64)[np.array(index.to_numpy(), dtype=np.int64)]
    if pa.types.is_timestamp(kind) or pa.types.is_date64(kind):
        array = array.cast(pa.date32())
    elif not pa.types.is_date32(kind):
        return np.full(len(array), np.nan)
    return _floats(array.cast(pa.int32()))
