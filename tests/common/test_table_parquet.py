import datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from common.arrow import to_arrow
from common.schema import Schema, parse_schema
from common.table import Table, inspect_table, read_table
from tests.common.tables import SCHEMA, days, error_of, only, parquet_file

DATE = only("date", minimum="2000-01-01", maximum="2030-12-31")
DAY = datetime.date(2020, 2, 29)
NUMBER = only("number", minimum=-10, maximum=100)
INTEGER = only("integer", minimum=-10, maximum=100)
CODE = only("integer", enum=[1, 2])
TEXT_CODE = only("string", enum=["01", "1"])
BOOL = only("boolean")


@pytest.mark.parametrize(
    ("schema", "array", "expected"),
    [
        (NUMBER, pa.array([1, None, 3], pa.int64()), [1, np.nan, 3]),
        (NUMBER, pa.array([1.5, None, np.nan], pa.float32()), [1.5, np.nan, np.nan]),
        (NUMBER, pa.array([Decimal("1.25"), None]), [1.25, np.nan]),
        (NUMBER, pa.array(["1.25", None, ""]), [1.25, np.nan, np.nan]),
        (NUMBER, pa.array([-9, 5], pa.int16()), [np.nan, 5]),
        (NUMBER, pa.array([-9.0, 5]), [np.nan, 5]),
        (INTEGER, pa.array([3.0, None]), [3, np.nan]),
        (INTEGER, pa.array([3, None], pa.uint8()), [3, np.nan]),
        (CODE, pa.array([2, None, 1], pa.int32()), [1, np.nan, 0]),
        (TEXT_CODE, pa.array(["01", "1", None]), [0, 1, np.nan]),
        (TEXT_CODE, pa.array(["01", "1", ""], pa.large_string()), [0, 1, np.nan]),
        (TEXT_CODE, pa.array(["01", "1", "-9", None]).dictionary_encode(), [0, 1, np.nan, np.nan]),
        (TEXT_CODE, pa.array(["1", "01"], pa.string_view()), [1, 0]),
        (BOOL, pa.array([True, None, False]), [1, np.nan, 0]),
        (BOOL, pa.array(["1", "False"]), [1, 0]),
        (BOOL, pa.array([1, 0], pa.int8()), [1, 0]),
        (DATE, pa.array([DAY, None]), [18321, np.nan]),
        (DATE, pa.array([DAY, None], pa.date64()), [18321, np.nan]),
        (DATE, pa.array(["2020-02-29", None]), [18321, np.nan]),
        (DATE, pa.array([datetime.datetime(2020, 2, 29, 23, 59)], pa.timestamp("ns")), [18321]),
        (DATE, pa.array([datetime.datetime(2020, 2, 29, 23, 59)], pa.timestamp("s")), [18321]),
        (
            only("date", minimum="1960-01-01", maximum="1980-01-01"),
            pa.array([datetime.datetime(1969, 12, 31, 1), datetime.datetime(1970, 1, 1, 1)], pa.timestamp("ms")),
            [-1, 0],
        ),
        # 23:30 UTC is already the next day in Berlin, the column's own time zone.
        (DATE, pa.array([datetime.datetime(2020, 2, 28, 23, 30)], pa.timestamp("us", "Europe/Berlin")), [18321]),
        (NUMBER, pa.array([None, None]), [np.nan, np.nan]),
        (TEXT_CODE, pa.array([None, None]), [np.nan, np.nan]),
        (DATE, pa.array([None, None]), [np.nan, np.nan]),
    ],
)
def test_typed_parquet_columns(tmp_path: Path, schema: Schema, array: pa.Array, expected: list[float]) -> None:
    table, report = read_table(parquet_file(tmp_path, x=array), schema)
    np.testing.assert_array_equal(table["x"], expected)
    assert report.columns[0].missing == int(np.isnan(expected).sum())


@pytest.mark.parametrize(
    ("schema", "array"),
    [
        (NUMBER, pa.array([True])),
        (NUMBER, pa.array([DAY])),
        (NUMBER, pa.array([np.inf])),
        (NUMBER, pa.array([b"1"])),
        (INTEGER, pa.array([1.5])),
        (CODE, pa.array([1.0])),
        (CODE, pa.array([3])),
        (TEXT_CODE, pa.array([[1]])),
        (BOOL, pa.array([1.0])),
        (DATE, pa.array([18321])),
        (DATE, pa.array([18321.0])),
    ],
)
def test_parquet_columns_of_the_wrong_type(tmp_path: Path, schema: Schema, array: pa.Array) -> None:
    _, report = inspect_table(parquet_file(tmp_path, x=array), schema)
    assert report.columns[0].invalid_rows == (1,)


def test_codes_stored_as_floats_are_explained(tmp_path: Path) -> None:
    assert "lose a code's spelling" in error_of(parquet_file(tmp_path, x=pa.array([1.0])), CODE)


def test_parquet_with_pandas_index_dots_and_repeated_names(tmp_path: Path) -> None:
    schema = parse_schema({"fields": [{"name": "a.b", "type": "boolean"}]})
    table = pa.table({"a.b": [True], "a": [{"b": 3}]}).to_pandas().set_index("a.b")
    table.to_parquet(tmp_path / "site.parquet")
    read, report = read_table(tmp_path / "site.parquet", schema)
    assert read["a.b"].tolist() == [1] and report.undeclared == ("a",)
    pq.write_table(pa.table([pa.array([1]), pa.array([1])], names=["x", "x"]), tmp_path / "twice.parquet")
    assert "column 'x' occurs 2 times" in error_of(tmp_path / "twice.parquet", NUMBER)


def test_parquet_without_rows_or_columns(tmp_path: Path) -> None:
    assert "no data rows" in error_of(parquet_file(tmp_path, x=pa.array([], pa.int64())), NUMBER)
    assert "no column of the schema" in error_of(parquet_file(tmp_path, y=pa.array([1])), NUMBER)


def test_arrow_has_types_and_nulls() -> None:
    values = np.array([[1.5, 2, 0, 1, days("2010-05-06")], [np.nan, np.nan, 2, np.nan, np.nan]])
    rows = to_arrow(Table(SCHEMA, values))
    assert [str(t) for t in rows.schema.types][:2] == ["double", "int64"] and rows.schema.types[3] == pa.bool_()
    assert rows["admitted"].to_pylist() == [datetime.date(2010, 5, 6), None]
    assert rows["ward"].to_pylist() == ["01", "02"] and not rows.schema.field("ward").nullable
    assert [column.null_count for column in rows.columns] == [1, 1, 0, 1, 1]
