"""Writing the cohort: CSV and Parquet from a stream of tables, in constant memory, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from common.files import atomic_path
from common.schema import Column, Schema
from common.table import Table

ARROW_TYPES = {"number": pa.float64(), "integer": pa.int64(), "boolean": pa.bool_(), "date": pa.date32()}


def write_cohort(tables: Iterable[Table], schema: Schema, csv_path: Path, parquet_path: Path) -> int:
    """Write every row to both files and return how many there are; `OutputError` if the disk does not take them."""
    arrow_schema = pa.schema(
        [
            pa.field(c.name, ARROW_TYPES.get(c.kind, pa.dictionary(pa.int8(), pa.string())), nullable=c.nullable)
            for c in schema.columns
        ]
    )
    text_schema = pa.schema([pa.field(c.name, _text_type(c, schema)) for c in schema.columns])
    rows = 0
    with atomic_path(csv_path) as csv_temporary, atomic_path(parquet_path) as parquet_temporary:
        options = pa.csv.WriteOptions(quoting_style="needed")
        with (
            pa.csv.CSVWriter(str(csv_temporary), text_schema, write_options=options) as csv_writer,
            pa.parquet.ParquetWriter(str(parquet_temporary), arrow_schema, compression="zstd") as parquet_writer,
        ):
            for table in tables:
                arrays = [_to_arrow(table.values[:, j], c) for j, c in enumerate(schema.columns)]
                parquet_writer.write_table(pa.Table.from_arrays(arrays, schema=arrow_schema))
                texts = [_to_text(array, c, schema) for array, c in zip(arrays, schema.columns, strict=True)]
                csv_writer.write_table(pa.Table.from_arrays(texts, schema=text_schema))
                rows += len(table)
    return rows


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
    plain = column.kind in ("number", "integer") and "" in schema.missing_values
    return ARROW_TYPES[column.kind] if plain else pa.string()


def _to_text(array: pa.Array, column: Column, schema: Schema) -> pa.Array:
    """The array as the CSV writes it, so that `read_table` with the same schema reads the same values back."""
    if column.kind == "boolean":
        array = pc.if_else(array, column.true_values[0], column.false_values[0])
    kind = _text_type(column, schema)
    text = array if array.type == kind else array.cast(kind)
    return text if "" in schema.missing_values else pc.fill_null(text, schema.missing_values[0])
