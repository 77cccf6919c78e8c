"""Writing the cohort: CSV and Parquet from a stream of tables, in constant memory, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
from pyarrow import csv, parquet

from common.arrow import (
    arrow_schema,
    mark,
    mark_text,
    marked_schema,
    marked_text_schema,
    text_schema,
    to_arrow,
    to_text,
)
from common.files import atomic_path
from common.markers import Markers
from common.schema import Schema
from common.table import Table

ROW_GROUP = 65_536  # rows gathered before they are written: small Parquet row groups compress badly and read slowly


def write_cohort(
    tables: Iterable[Table], schema: Schema, csv_path: Path, parquet_path: Path, markers: Markers | None = None
) -> int:
    """Write every row to both files and return how many there are; `OutputError` if the disk does not take them.

    With `markers` every row is marked as synthetic; `read_table` ignores those columns, which no schema has.
    """
    rows = 0
    typed, spelled = arrow_schema(schema), text_schema(schema)
    if markers is not None:
        typed, spelled = marked_schema(typed, markers), marked_text_schema(spelled, markers)
    with atomic_path(csv_path) as csv_temporary, atomic_path(parquet_path) as parquet_temporary:
        options = csv.WriteOptions(quoting_style="needed")
        with (
            csv.CSVWriter(str(csv_temporary), spelled, write_options=options) as csv_writer,
            parquet.ParquetWriter(str(parquet_temporary), typed, compression="zstd") as parquet_writer,
        ):
            for part in _gathered(tables):
                text = to_text(part, schema)
                parquet_writer.write_table(part if markers is None else mark(part, markers))
                csv_writer.write_table(text if markers is None else mark_text(text, markers))
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
