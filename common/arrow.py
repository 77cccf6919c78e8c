"""Tables as Arrow data: typed for Parquet, and as text in the spelling that `read_table` reads back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from common.markers import Markers
from common.schema import Column, Schema
from common.table import Table

pc: Any = pyarrow.compute  # its functions are made at run time, where a type checker cannot see them
TYPES = {"number": pa.float64(), "integer": pa.int64(), "boolean": pa.bool_(), "date": pa.date32()}
CATEGORY = pa.dictionary(pa.int8(), pa.string())


def arrow_schema(schema: Schema) -> pa.Schema:
    """double, int64, dictionary of strings, bool or date32; nullable where a value may be missing."""
    return pa.schema([pa.field(c.name, TYPES.get(c.kind, CATEGORY), nullable=c.nullable) for c in schema.columns])


def text_schema(schema: Schema) -> pa.Schema:
    """What `to_text` gives: numbers where Arrow's CSV spelling serves, strings elsewhere."""
    return pa.schema([pa.field(c.name, _text_type(c, schema)) for c in schema.columns])


def to_arrow(table: Table) -> pa.Table:
    """The rows with types, missing values as nulls."""
    arrays = [_to_arrow(table.values[:, j], column) for j, column in enumerate(table.schema.columns)]
    return pa.Table.from_arrays(arrays, schema=arrow_schema(table.schema))


def to_text(rows: pa.Table, schema: Schema) -> pa.Table:
    """`to_arrow`'s rows for a CSV file: the schema's words for booleans, and for missing values if "" is not one."""
    texts = []
    for column in schema.columns:
        array = rows[column.name]
        if column.kind == "boolean":
            array = pc.if_else(array, column.true_values[0], column.false_values[0])
        array = array.cast(_text_type(column, schema))
        texts.append(array if _null_is_empty(schema) else pc.fill_null(array, schema.missing_values[0]))
    return pa.Table.from_arrays(texts, schema=text_schema(schema))


def mark(rows: pa.Table, markers: Markers) -> pa.Table:
    """`rows` with the marker columns behind them: one constant a column, held once for all rows."""
    for name, value in markers.values().items():
        rows = rows.append_column(_marker_field(name, value), _constant(value, len(rows)))
    return rows


def marked_schema(schema: pa.Schema, markers: Markers) -> pa.Schema:
    """The schema of what `mark` makes of a table."""
    for name, value in markers.values().items():
        schema = schema.append(_marker_field(name, value))
    return schema


def mark_text(rows: pa.Table, markers: Markers) -> pa.Table:
    """`mark` for a CSV file: all as text, the truth as "true"."""
    for name, value in markers.values().items():
        text = str(value).lower() if isinstance(value, bool) else value
        rows = rows.append_column(pa.field(name, pa.string()), pa.repeat(text, len(rows)))
    return rows


def marked_text_schema(schema: pa.Schema, markers: Markers) -> pa.Schema:
    """The schema of what `mark_text` makes of a table."""
    for name in markers.values():
        schema = schema.append(pa.field(name, pa.string()))
    return schema


def _marker_field(name: str, value: str | bool) -> pa.Field:
    return pa.field(name, pa.bool_() if isinstance(value, bool) else CATEGORY, nullable=False)


def _constant(value: str | bool, rows: int) -> pa.Array:
    if isinstance(value, bool):
        return pa.repeat(value, rows)
    return pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int8()), rows), pa.array([value], pa.string()))


def _to_arrow(values: np.ndarray, column: Column) -> pa.Array:
    missing = np.isnan(values)
    if column.kind == "number":
        return pa.array(values, mask=missing)
    whole = np.where(missing, 0, values)
    if column.kind == "integer":
        return pa.array(whole.astype(np.int64), mask=missing)
    if column.kind == "boolean":
        return pa.array(whole.astype(bool), mask=missing)
    if column.kind == "date":
        return pa.array(whole.astype(np.int32), mask=missing).cast(pa.date32())
    indices = pa.array(whole.astype(np.int8), mask=missing)
    return pa.DictionaryArray.from_arrays(indices, pa.array(column.levels, pa.string()))


def _text_type(column: Column, schema: Schema) -> pa.DataType:
    plain = column.kind in ("number", "integer") and _null_is_empty(schema)
    return TYPES[column.kind] if plain else pa.string()


def _null_is_empty(schema: Schema) -> bool:
    """Whether a null may be written as nothing; in a table of one column that would be a blank line, not a row."""
    return "" in schema.missing_values and len(schema.columns) > 1
