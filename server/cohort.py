"""Writing the cohort: CSV and Parquet from a stream of tables, in constant memory, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
from pyarrow import csv, parquet

from common.arrow import arrow_schema, text_schema, to_arrow, to_text
from common.files import atomic_path
from common.schema import Schema
from common.table import Table

ROW_GROUP = 65_536  # rows gathered before they are written: small Parquet row groups compress badly and read slowly


def write_cohort(tables: Iterable[Table], schema: Schema, csv_path: Path, parquet_path: Path) -> int:
    """Write every row to both files and return how many there are; `OutputError` if the disk does not take them."""
    rows = 0
    with atomic_path(csv_path) as csv_temporary, atomic_path(parquet_path) as parquet_temporary:
        options = csv.WriteOptions(quoting_style="needed")
        with (
            csv.CSVWriter(str(csv_temporary), text_schema(schema), write_options=options) as csv_writer,
            parquet.ParquetWriter(str(parquet_temporary), arrow_schema(schema), compression="zstd") as parquet_writer,
        ):
            for part in _gathered(tables):
                parquet_writer.write_table(part)
                csv_writer.write_table(to_text(part, schema))
                rows += len(part)
    return rows


def _gathered(tables: Iterable[Table]) -> Iterable[pa.Table]:
    parts: list[pa.Table] = []
    for table in tables:
        parts.append(to_arrow(table))
        if sum(len(part) for part in parts) >= ROW_GROUP:
            yield pa.concat_tables(parts).combine_chunks()
            parts = []
    if parts:
        yield pa.concat_tables(parts).combine_chunks()
