"""Whether the files of a cohort are what the study declares: rows, columns, markers, and every value in the schema."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from common.errors import CohortiumError
from common.markers import MARKER_COLUMNS, Markers
from common.study import Protocol
from common.table import Table, read_table
from server.run import RunFiles


def check_cohort(files: RunFiles, protocol: Protocol, rows: int) -> tuple[Table | None, list[str]]:
    """The cohort as the CSV file holds it, None if it cannot be read, and everything that is wrong with either file."""
    problems: list[str] = []
    tables: list[Table] = []
    columns = [*protocol.schema.names, *(MARKER_COLUMNS if protocol.markers else ())]
    for path in (files.cohort_csv, files.cohort_parquet):
        try:
            table, _ = read_table(path, protocol.schema, out_of_bounds="refuse")
        except CohortiumError as error:
            problems.append(error.message)
            continue
        tables.append(table)
        if len(table) != rows:
            problems.append(f"{path.name}: {len(table)} rows, {rows} were declared")
        try:
            problems += [f"{path.name}: {problem}" for problem in _about_columns(path, columns, protocol.markers)]
        except (pa.ArrowException, OSError, UnicodeDecodeError):  # their text may quote a row
            problems.append(f"{path.name}: its columns cannot be read")
    if len(tables) == 2 and not np.array_equal(tables[0].values, tables[1].values, equal_nan=True):
        problems.append("cohort.csv and cohort.parquet hold different rows")
    return (tables[0] if tables else None), problems


def _about_columns(path: Path, columns: list[str], markers: Markers | None) -> list[str]:
    found = _header(path)
    if found != columns:
        lacking, more = [c for c in columns if c not in found], [c for c in found if c not in columns]
        parts = [f"lacks {', '.join(lacking)}"] if lacking else []
        parts += [f"has {', '.join(more)} as well"] if more else []
        return [f"other columns than declared: {'; '.join(parts) or 'in another order'}"]
    if markers is None:
        return []
    wanted = {
        name: str(value).lower() if isinstance(value, bool) else value for name, value in markers.values().items()
    }
    wrong = dict.fromkeys(wanted, 0)
    for batch in _markers_of(path):
        for name, value in wanted.items():
            held = batch.column(name).cast(pa.string()).value_counts().to_pylist()
            wrong[name] += sum(each["counts"] for each in held if each["values"] != value)
    return [f"{number} row(s) without the marker {name}" for name, number in wrong.items() if number]


def _header(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        return list(pq.read_schema(path).names)
    with csv.open_csv(path) as reader:
        return list(reader.schema.names)


def _markers_of(path: Path) -> Iterator[pa.RecordBatch]:
    """The marker columns of a file, batch by batch."""
    if path.suffix == ".parquet":
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(columns=list(MARKER_COLUMNS))
        return
    texts = dict.fromkeys(MARKER_COLUMNS, pa.string())
    options = csv.ConvertOptions(column_types=texts, include_columns=list(MARKER_COLUMNS))
    with csv.open_csv(path, convert_options=options) as reader:
        yield from reader
