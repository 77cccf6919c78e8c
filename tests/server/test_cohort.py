import csv
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import CohortiumError, ExitCode, OutputError, StudyError
from common.markers import MARKER_COLUMNS, Markers
from common.schema import Schema, parse_schema
from common.study import Protocol, Study
from common.table import Table, read_table
from server.cohort import ROW_GROUP, write_cohort
from tests.disk import full_disk

SCHEMA = parse_schema(
    {
        "missingValues": ["", "NA"],
        "fields": [
            {"name": "age", "type": "number", "constraints": {"minimum": 0, "maximum": 100}},
            {"name": "visits", "type": "integer", "constraints": {"minimum": 0, "maximum": 9, "required": True}},
            {"name": "ward", "type": "string", "constraints": {"enum": ["a, b", 'say "c"', "01", "ü"]}},
            {"name": "dead", "type": "boolean", "trueValues": ["yes"], "falseValues": ["no"]},
            {"name": "day", "type": "date", "constraints": {"minimum": "2020-01-01", "maximum": "2020-12-31"}},
        ],
    }
)


def make_table(rows: int, seed: int = 0, schema: Schema = SCHEMA) -> Table:
    random = np.random.default_rng(seed)
    values = np.column_stack(
        [
            np.round(random.uniform(0, 100, rows), 2),
            random.integers(0, 10, rows),
            random.integers(0, 4, rows),
            random.integers(0, 2, rows),
            random.integers(18262, 18628, rows),
        ]
    ).astype(float)
    for column in (0, 2, 3, 4):
        values[random.random(rows) < 0.1, column] = np.nan
    return Table(schema, values)


def test_both_files_hold_every_row_in_order(tmp_path: Path) -> None:
    tables = [make_table(rows, seed) for seed, rows in enumerate((1, 700, 30))]
    written = write_cohort(iter(tables), SCHEMA, tmp_path / "cohort.csv", tmp_path / "cohort.parquet")
    assert written == 731
    expected = np.vstack([table.values for table in tables])
    for name in ("cohort.csv", "cohort.parquet"):
        table, report = read_table(tmp_path / name, SCHEMA, out_of_bounds="refuse")
        np.testing.assert_array_equal(table.values, expected)
        assert report.undeclared == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cohort.csv", "cohort.parquet"]


def test_the_csv_is_spelled_as_the_schema_says(tmp_path: Path) -> None:
    values = np.array([[12.5, 3, 0, 1, 18262], [np.nan, 4, 2, 0, np.nan], [7, 0, 1, np.nan, 18627]], dtype=float)
    write_cohort([Table(SCHEMA, values)], SCHEMA, tmp_path / "cohort.csv", tmp_path / "cohort.parquet")
    with (tmp_path / "cohort.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, strict=True))
    assert rows == [
        ["age", "visits", "ward", "dead", "day"],
        ["12.5", "3", "a, b", "yes", "2020-01-01"],
        ["", "4", "01", "no", ""],
        ["7", "0", 'say "c"', "", "2020-12-31"],
    ]


def test_the_parquet_file_has_types(tmp_path: Path) -> None:
    write_cohort([make_table(50)], SCHEMA, tmp_path / "cohort.csv", tmp_path / "cohort.parquet")
    found = pq.read_schema(tmp_path / "cohort.parquet")
    assert [found.field(name).type for name in ("age", "visits", "dead", "day")] == [
        pa.float64(), pa.int64(), pa.bool_(), pa.date32(),
    ]  # fmt: skip
    assert pa.types.is_dictionary(found.field("ward").type)
    assert not found.field("visits").nullable and found.field("age").nullable


@pytest.mark.parametrize("markers", [None, Markers("trial", "ab" * 32)])
def test_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path, markers: Markers | None) -> None:
    seen: list[weakref.ref[Table]] = []
    tables_alive: list[int] = []
    arrow_bytes: list[int] = []
    before = pa.total_allocated_bytes()

    def stream(parts: int, rows: int) -> Iterator[Table]:
        values = make_table(rows).values
        for _ in range(parts):
            table = Table(SCHEMA, values.copy())
            seen.append(weakref.ref(table))
            tables_alive.append(sum(reference() is not None for reference in seen))
            arrow_bytes.append(pa.total_allocated_bytes() - before)
            yield table

    parts, rows = 60, 8192
    paths = tmp_path / "cohort.csv", tmp_path / "cohort.parquet"
    written = write_cohort(stream(parts, rows), SCHEMA, *paths, markers)
    assert written == parts * rows > 7 * ROW_GROUP
    assert len(tables_alive) == parts and max(tables_alive) <= 3
    half = parts // 2
    assert max(arrow_bytes[half:]) <= 1.2 * max(arrow_bytes[:half])
    metadata = pq.read_metadata(tmp_path / "cohort.parquet")
    assert metadata.num_rows == written and metadata.num_row_groups <= -(-written // ROW_GROUP)
    with (tmp_path / "cohort.csv").open("rb") as file:
        assert sum(1 for _ in file) == written + 1


@pytest.mark.parametrize("limit", [1000, 60_000])
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, limit: int) -> None:
    with full_disk(limit), pytest.raises(OutputError, match="cannot be written") as caught:
        write_cohort(
            (make_table(5000, seed) for seed in range(30)), SCHEMA, tmp_path / "cohort.csv", tmp_path / "cohort.parquet"
        )
    assert caught.value.exit_code is ExitCode.OUTPUT
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after", [0, 1, 20])
def test_a_failure_while_sampling_leaves_nothing_half_written(tmp_path: Path, after: int) -> None:
    def stream() -> Iterator[Table]:
        for seed in range(after):
            yield make_table(5000, seed)
        raise CohortiumError("a synthetic value breaks the schema")

    with pytest.raises(CohortiumError, match="breaks the schema"):
        write_cohort(stream(), SCHEMA, tmp_path / "cohort.csv", tmp_path / "cohort.parquet")
    assert list(tmp_path.iterdir()) == []


def test_files_of_an_earlier_run_stay_until_the_new_ones_are_whole(tmp_path: Path) -> None:
    paths = tmp_path / "cohort.csv", tmp_path / "cohort.parquet"
    write_cohort([make_table(10)], SCHEMA, *paths)
    before = [path.read_bytes() for path in paths]
    with full_disk(1000), pytest.raises(OutputError):
        write_cohort([make_table(100_000)], SCHEMA, *paths)
    assert [path.read_bytes() for path in paths] == before


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_cohort([make_table(1)], SCHEMA, tmp_path / "out" / "cohort.csv", tmp_path / "out" / "cohort.parquet")


MARKERS = Markers('A trial, "one"', "0123456789abcdef" * 4)
ONE = ('A trial, "one"', "0123456789abcdef", True)


def test_every_row_is_marked_and_reads_back_as_if_it_were_not(tmp_path: Path) -> None:
    table = make_table(ROW_GROUP + 100)
    paths = tmp_path / "cohort.csv", tmp_path / "cohort.parquet"
    assert write_cohort([table, make_table(7, 1)], SCHEMA, *paths, MARKERS) == ROW_GROUP + 107
    for path in paths:
        read, report = read_table(path, SCHEMA, out_of_bounds="refuse")
        np.testing.assert_array_equal(read.values[: len(table)], table.values)
        assert report.undeclared == MARKER_COLUMNS  # exactly these are there besides, and ignored
    with paths[0].open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, strict=True))
    assert rows[0][-3:] == list(MARKER_COLUMNS)
    assert {tuple(row[-3:]) for row in rows[1:]} == {(*ONE[:2], "true")}
    stored = pq.read_table(paths[1]).select(MARKER_COLUMNS)
    assert [set(column.to_pylist()) for column in stored.columns] == [{value} for value in ONE]
    assert stored["cohortium_synthetic"].type == pa.bool_()
    assert all(not field.nullable for field in stored.schema)


def test_markers_cost_a_parquet_file_next_to_nothing(tmp_path: Path) -> None:
    sizes = []
    for markers in (None, MARKERS):
        write_cohort([make_table(ROW_GROUP)], SCHEMA, tmp_path / "c.csv", tmp_path / "c.parquet", markers)
        sizes.append((tmp_path / "c.parquet").stat().st_size)
    assert sizes[1] - sizes[0] < 4000


def test_a_column_named_like_a_marker_is_refused_unless_there_are_none() -> None:
    fields = [*SCHEMA.descriptor["fields"], {**SCHEMA.descriptor["fields"][0], "name": "cohortium_release"}]
    schema = parse_schema({**SCHEMA.descriptor, "fields": fields})
    document: dict[str, Any] = {"study": {"name": "s", "schema": "schema.json"}}
    with pytest.raises(StudyError, match="'cohortium_release', a name that marks"):
        Protocol(Study.model_validate(document), schema)
    assert Protocol(Study.model_validate({**document, "release": {"markers": False}}), schema).markers is None
    protocol = Protocol(Study.model_validate(document), SCHEMA)
    assert protocol.markers is not None and protocol.markers.values()["cohortium_release"] == protocol.digest[:16]


@pytest.mark.parametrize("markers", [None, MARKERS])
def test_a_table_of_one_column_with_missing_values(tmp_path: Path, markers: Markers | None) -> None:
    schema = parse_schema({"missingValues": [""], "fields": SCHEMA.descriptor["fields"][:1]})
    values = np.array([[1.0], [np.nan], [3.0]])
    paths = tmp_path / "cohort.csv", tmp_path / "cohort.parquet"
    write_cohort([Table(schema, values)], schema, *paths, markers)
    for path in paths if markers else paths[1:]:
        np.testing.assert_array_equal(read_table(path, schema)[0].values, values)
