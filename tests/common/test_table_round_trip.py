import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from common.arrow import text_schema, to_arrow, to_text
from common.schema import Column, parse_schema
from common.table import Table, TableReport, read_table
from tests.common.tables import SCHEMA, days

LEVEL = st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=6)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    marks = draw(st.lists(st.sampled_from(["", "NA", "?", "missing, unknown"]), min_size=1, max_size=3, unique=True))
    fields: list[dict[str, Any]] = []
    for index in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["number", "integer", "string", "boolean", "date"]))
        field: dict[str, Any] = {"name": f'c,"{index}', "type": kind}
        if kind in ("number", "integer"):
            numbers = st.floats(-1e9, 1e9) if kind == "number" else st.integers(-(10**9), 10**9)
            low, high = sorted(draw(st.lists(numbers, min_size=2, max_size=2, unique=True)))
            field["constraints"] = {"minimum": low, "maximum": high}
        elif kind == "date":
            low, high = sorted(draw(st.lists(st.dates(), min_size=2, max_size=2, unique=True)))
            field["constraints"] = {"minimum": low.isoformat(), "maximum": high.isoformat()}
        elif kind == "string":
            levels = st.lists(LEVEL.filter(lambda level: level not in marks), min_size=1, max_size=4, unique=True)
            field["constraints"] = {"enum": draw(levels)}
        elif draw(st.booleans()):
            field |= {"trueValues": ["yes", "y"], "falseValues": ["no"]}
        fields.append(field)
    schema = parse_schema({"fields": fields, "missingValues": marks})
    rows = draw(st.integers(1, 4))
    columns = [draw(st.lists(st.none() | _cells(c), min_size=rows, max_size=rows)) for c in schema.columns]
    return Table(schema, np.array(columns, dtype=np.float64).T.reshape(rows, len(columns)))


def _cells(column: Column) -> st.SearchStrategy[float]:
    if column.kind == "number":
        return st.floats(column.minimum, column.maximum)
    if column.is_numeric:
        return st.integers(int(column.minimum), int(column.maximum)).map(float)
    return st.integers(0, len(column.levels) - 1).map(float)


def _same(table: Table, read: Table, report: TableReport) -> None:
    np.testing.assert_array_equal(read.values, table.values)
    assert report.clipped == 0 and report.problems("refuse") == []
    assert [c.missing for c in report.columns] == np.isnan(table.values).sum(axis=0).tolist()


def write_csv(parts: list[Table], path: Path) -> None:
    schema = parts[0].schema
    options = pyarrow.csv.WriteOptions(quoting_style="needed")
    with pyarrow.csv.CSVWriter(str(path), text_schema(schema), write_options=options) as writer:
        for part in parts:
            writer.write_table(to_text(to_arrow(part), schema))


@settings(max_examples=150, deadline=None)
@given(tables())
def test_round_trip_through_csv(table: Table) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cohort.csv")
        write_csv([table], path)
        _same(table, *read_table(path, table.schema, out_of_bounds="refuse"))


@settings(max_examples=50, deadline=None)
@given(tables())
def test_round_trip_through_parquet(table: Table) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cohort.parquet")
        pq.write_table(to_arrow(table), path)
        _same(table, *read_table(path, table.schema, out_of_bounds="refuse"))


def test_csv_written_in_parts_is_one_file(tmp_path: Path) -> None:
    table = Table(SCHEMA, np.array([[40.5, 2, 0, 1, days("2010-05-06")], [np.nan, np.nan, 2, 0, np.nan]]))
    path = tmp_path / "cohort.csv"
    write_csv([table, table], path)
    header = ",".join(f'"{name}"' for name in SCHEMA.names)
    rows = '40.5,2,"01","true","2010-05-06"\n,,"02","false",\n'
    assert path.read_text() == f"{header}\n" + rows * 2
    _same(Table(SCHEMA, np.vstack([table.values] * 2)), *read_table(path, SCHEMA))
