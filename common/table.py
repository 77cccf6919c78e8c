"""Tables of patients or synthetic rows: one float64 matrix beside its schema.

Reading never guesses a dtype (a code "01" stays "01") and never quotes a value: problems are counted by kind and
located by row number.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.cells import MOST_ROWS_NAMED, ColumnReport, parse_column, row_list
from common.errors import DataError
from common.schema import Schema

OutOfBounds = Literal["clip", "refuse"]
SUFFIXES = (".csv", ".parquet")
HEADER_FIX = "check that the first line holds the column names, spelled as in the schema"
BATCH = 2_000  # CSV rows held as Python strings at a time


@dataclass(frozen=True)
class Table:
    """Rows that fit a schema.

    `values` has shape (rows, columns), float64, columns in schema order; NaN is missing, a categorical value is the
    index of its level, a date the number of days since 1970-01-01.
    """

    schema: Schema
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.values[:, self.schema.index(name)]


@dataclass(frozen=True)
class TableReport:
    """What reading a file found, column by column."""

    source: str
    rows: int
    columns: tuple[ColumnReport, ...]
    undeclared: tuple[str, ...]

    @property
    def clipped(self) -> int:
        """Number of values outside their declared bounds."""
        return sum(column.below + column.above for column in self.columns)

    def problems(self, out_of_bounds: OutOfBounds = "clip") -> list[str]:
        """Every reason why the file cannot be used under this policy, in words without values."""
        if out_of_bounds not in ("clip", "refuse"):
            raise ValueError(f"out_of_bounds must be 'clip' or 'refuse', not {out_of_bounds!r}")
        found = []
        for column in self.columns:
            outside = column.below + column.above
            if outside and out_of_bounds == "refuse":
                found.append(
                    f"column {column.name!r}: {column.below} value(s) below the minimum and {column.above} above the"
                    f" maximum (data rows {row_list(column.bounds_rows, outside)})"
                )
            if column.invalid:
                found.append(
                    f"column {column.name!r}: {column.invalid} value(s) are not {column.expected}"
                    f" (data rows {row_list(column.invalid_rows, column.invalid)})"
                )
            if column.missing_but_required:
                found.append(
                    f"column {column.name!r}: {column.missing_but_required} missing value(s) in a required column"
                    f" (data rows {row_list(column.required_rows, column.missing_but_required)})"
                )
        return found


def read_table(
    path: str | Path, schema: Schema, *, out_of_bounds: OutOfBounds = "clip", withheld: Sequence[str] = ()
) -> tuple[Table, TableReport]:
    """Read a CSV or Parquet file that must fit `schema`; raise `DataError` listing every problem at once.

    Values outside declared bounds are moved to the bound and counted (`out_of_bounds="clip"`) or refused ("refuse").
    Columns that are `withheld` are missing in every row, whatever the file holds.
    """
    table, report = inspect_table(path, schema, withheld)
    return require_fit(table, report, out_of_bounds), report


def require_fit(table: Table, report: TableReport, out_of_bounds: OutOfBounds) -> Table:
    """`table`, or `DataError` listing every problem of its report."""
    problems = report.problems(out_of_bounds)
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise DataError(
            f"{report.source}: the file does not fit the schema\n{listing}",
            fix="correct the file, or have the consortium change the schema; `cohortium-site check` shows every column",
        )
    return table


def inspect_table(path: str | Path, schema: Schema, withheld: Sequence[str] = ()) -> tuple[Table, TableReport]:
    """Read a file and report on every column; unusable cells become missing in the returned table.

    Raises `DataError` only for what leaves nothing to report on: an unreadable file, a missing or repeated column, no
    rows. Columns that are `withheld` are not read.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path}: unknown file type {path.suffix!r}", fix="use a .csv or .parquet file")
    wanted = [name for name in schema.names if name not in withheld]
    read = _read_parquet if path.suffix.lower() == ".parquet" else _read_csv
    try:
        header, arrays = read(path, wanted)
    except MemoryError:  # Arrow's is one of its own exceptions too
        raise
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text", fix="export the file as UTF-8") from None
    except (csv.Error, pa.ArrowException):  # their text may quote a row, so it is not repeated
        kind = "Parquet" if read is _read_parquet else "CSV"
        raise DataError(
            f"{path}: not a well-formed {kind} file (broken quotes, or cut off)", fix="export it again"
        ) from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or 'not readable'})",
            fix="check the path and its permissions",
        ) from None
    return parse_columns(str(path), header, dict(zip(wanted, arrays, strict=True)), schema)


def parse_columns(
    source: str, header: Sequence[str], arrays: Mapping[str, pa.ChunkedArray], schema: Schema
) -> tuple[Table, TableReport]:
    """The table of columns that were read, by name, and a report; a column that is not among them is missing in
    every row.
    """
    rows = len(next(iter(arrays.values()), ()))
    if rows == 0:
        raise DataError(f"{source}: no data rows", fix="a site needs at least one patient; check the export")
    nothing = pa.chunked_array([pa.nulls(rows, pa.string())])
    values = np.empty((rows, len(schema.columns)))
    reports = []
    for j, column in enumerate(schema.columns):
        cells = arrays.get(column.name, nothing)
        values[:, j], column_report = parse_column(cells, column, schema.missing_values)
        reports.append(column_report)
    undeclared = tuple(name for name in header if name not in schema.names)
    return Table(schema, values), TableReport(source, rows, tuple(reports), undeclared)


def parse_header(line: str, source: Path) -> list[str]:
    """The column names on the first line of a CSV file.

    Raises `DataError` for an empty line or another separator than the comma, `csv.Error` for a quote that does not
    close.
    """
    header = next(csv.reader([line], strict=True), []) if line.strip() else []
    if not header:
        raise DataError(f"{source}: the first line is empty", fix="the file must start with the column names")
    if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
        raise DataError(
            f"{source}: the header is one field; columns must be separated by commas",
            fix="export the file as comma-separated CSV",
        )
    return header


def check_header(header: Sequence[str], wanted: Sequence[str], source: str, fix: str = HEADER_FIX) -> None:
    """`DataError` unless every wanted column occurs once; `fix` is for a header without any of them."""
    absent = [name for name in wanted if name not in header]
    if len(absent) == len(wanted):
        # The first line is then perhaps a patient's, so none of it is shown.
        raise DataError(f"{source}: no column of the schema is in the header", fix=fix)
    occurrences = Counter(header)
    problems = [f"column {n!r} occurs {occurrences[n]} times" for n in wanted if occurrences[n] > 1]
    problems += [f"column {name!r} is missing" for name in absent]
    if problems:
        undeclared = [repr(name) for name in header if name not in wanted]
        extra = f"\n  columns that the schema does not declare: {', '.join(undeclared)}" if undeclared else ""
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise DataError(
            f"{source}: {len(problems)} problem(s) in the header\n{listing}{extra}",
            fix="the file needs every column of the schema once, spelled as there",
        )


def _read_csv(path: Path, wanted: Sequence[str]) -> tuple[list[str], list[pa.ChunkedArray]]:
    """Header, and every cell of the wanted columns as written."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = parse_header(file.readline(), path)
        check_header(header, wanted, str(path))
        positions = [header.index(name) for name in wanted]
        chunks: list[list[pa.Array]] = [[] for _ in positions]
        batch: list[list[str]] = []

        def flush() -> None:
            cells = list(zip(*batch, strict=True))
            for chunk, position in zip(chunks, positions, strict=True):
                chunk.append(pa.array(cells[position] if cells else [], pa.string()))
            batch.clear()

        ragged: list[int] = []
        width, number = len(header), 0
        # `strict` refuses broken quotes, which would swallow rows (Arrow's and pandas' readers let some pass).
        for row in csv.reader(file, strict=True):
            if not row or (len(row) == 1 < width and not row[0].strip()):
                continue
            number += 1
            if len(row) == width:
                batch.append(row)
            else:
                ragged.append(number)
            if len(batch) == BATCH:
                flush()
        flush()
    if ragged:
        raise DataError(
            f"{path}: {len(ragged)} row(s) have more or fewer fields than the header's {width}"
            f" (data rows {row_list(tuple(ragged[:MOST_ROWS_NAMED]), len(ragged))})",
            fix="export it again; a text with commas must stand in quotes",
        )
    return header, [pa.chunked_array(chunk) for chunk in chunks]


def _read_parquet(path: Path, wanted: Sequence[str]) -> tuple[list[str], list[pa.ChunkedArray]]:
    """Column names, and the wanted columns as stored."""
    with path.open("rb") as file:
        parquet = pq.ParquetFile(file)
        header = list(parquet.schema_arrow.names)
        check_header(header, wanted, str(path))
        table = parquet.read(columns=list(wanted))
        return header, [table.column(name) for name in wanted]
