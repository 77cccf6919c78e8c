from pathlib import Path

import numpy as np
import pytest

from common.schema import Schema
from common.table import BATCH, inspect_table, read_table
from tests.common.tables import GOOD, HEADER, SCHEMA, SECRET, csv_file, days, error_of, only


def test_every_kind_of_cell_is_read(tmp_path: Path) -> None:
    path = csv_file(tmp_path, GOOD, "NA,,1,0,", " +1e1 ,12.0,02,FALSE,2020-12-31")
    table, report = read_table(path, SCHEMA)
    nan = np.nan
    expected = [[40.5, 2, 0, 1, days("2010-05-06")], [nan, nan, 1, 0, nan], [10, 12, 2, 0, days("2020-12-31")]]
    np.testing.assert_array_equal(table.values, expected)
    assert table.values.dtype == np.float64 and len(table) == report.rows == 3
    assert [c.missing for c in report.columns] == [1, 1, 0, 0, 1]
    assert report.clipped == 0 and report.undeclared == () and not report.problems("refuse")
    np.testing.assert_array_equal(table["parity"], [2, nan, 12])


def test_code_01_stays_apart_from_code_1(tmp_path: Path) -> None:
    table, _ = read_table(csv_file(tmp_path, "1,1,01,1,", "1,1,1,1,", "1,1,02,1,"), SCHEMA)
    assert table["ward"].tolist() == [0, 1, 2]


def test_columns_are_found_by_name_and_undeclared_ones_are_ignored(tmp_path: Path) -> None:
    lines = [f"{SECRET},2010-05-06,true,01,2,40.5", '"a, ""b""\nc",2010-05-07,false,1,3,41.5']
    table, report = read_table(csv_file(tmp_path, *lines, header="note,admitted,died,ward,parity,age"), SCHEMA)
    assert table["age"].tolist() == [40.5, 41.5] and table["ward"].tolist() == [0, 1]
    assert report.undeclared == ("note",)


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_endings_blank_lines_and_byte_order_mark(tmp_path: Path, ending: str, mark: bytes) -> None:
    path = tmp_path / "SITE.CSV"
    path.write_bytes(mark + ending.join([HEADER, "", GOOD, "   ", GOOD, "", ""]).encode())
    assert len(read_table(path, SCHEMA)[0]) == 2


def test_a_quoted_empty_cell_of_a_single_column_is_a_row(tmp_path: Path) -> None:
    table, report = read_table(csv_file(tmp_path, "1", '""', "-9", header="x"), only("number", minimum=0, maximum=1))
    assert len(table) == 3 and report.columns[0].missing == 2


def test_files_longer_than_a_batch_keep_their_order_and_row_numbers(tmp_path: Path) -> None:
    rows = BATCH + 7
    path = csv_file(tmp_path, *(str(i % 1000) for i in range(rows)), SECRET, header="x")
    table, report = inspect_table(path, only("integer", minimum=0, maximum=999))
    np.testing.assert_array_equal(table["x"][:-1], np.arange(rows) % 1000)
    assert report.columns[0].invalid_rows == (rows + 1,)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([GOOD, "1,2,01"], "1 row(s) have more or fewer fields than the header's 5 (data rows 2)"),
        (["1,2,01", GOOD], "(data rows 1)"),
        ([GOOD + "," + SECRET], "(data rows 1)"),
        ([GOOD, GOOD + ","], "(data rows 2)"),
        ([GOOD + ",", GOOD + ","], "2 row(s) have more or fewer fields than the header's 5 (data rows 1, 2)"),
        ([SECRET] * 7, "7 row(s) have more or fewer fields than the header's 5 (data rows 1, 2, 3, 4, 5, ...)"),
        ([GOOD, f'1,2,"01{SECRET},true,', GOOD], "not a well-formed CSV file"),
        ([f'1,2,"01"{SECRET},true,', GOOD], "not a well-formed CSV file"),
        ([], "no data rows"),
        (["", " "], "no data rows"),
    ],
)
def test_malformed_rows(tmp_path: Path, lines: list[str], expected: str) -> None:
    assert expected in error_of(csv_file(tmp_path, *lines))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the first line is empty"),
        (b"\n\n", "the first line is empty"),
        (HEADER.replace(",", ";").encode() + b"\n1;2;01;true;\n", "columns must be separated by commas"),
        (HEADER.replace(",", "\t").encode() + b"\n", "columns must be separated by commas"),
        (HEADER.encode() + b"\n40,2,\xe9,true,\n", "not UTF-8 text"),
        (HEADER.encode("utf-16"), "not UTF-8 text"),
        (f'age,"parity,ward\n{SECRET},1,2\n'.encode(), "not a well-formed CSV file"),
        (HEADER.encode(), "no data rows"),
    ],
)
def test_malformed_files(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "site.csv"
    path.write_bytes(content)
    assert expected in error_of(path)


def test_missing_files_directories_and_unknown_types(tmp_path: Path) -> None:
    for name in ("none.csv", "none.parquet"):
        assert "cannot be read" in error_of(tmp_path / name)
    (tmp_path / "folder.csv").mkdir()
    assert "cannot be read" in error_of(tmp_path / "folder.csv")
    assert "unknown file type '.xlsx'" in error_of(tmp_path / "site.xlsx")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1" + SECRET.encode() * 10 + b"PAR1")
    assert "not a well-formed Parquet file" in error_of(broken)
    broken.write_bytes(b"")
    assert "not a well-formed Parquet file" in error_of(broken)


def test_missing_and_repeated_columns_are_named_together(tmp_path: Path) -> None:
    text = error_of(csv_file(tmp_path, "1,1,1,1", header="age,age,WARD,died"))
    assert "4 problem(s) in the header" in text
    for name in ("parity", "ward", "admitted"):
        assert f"column '{name}' is missing" in text
    assert "column 'age' occurs 2 times" in text
    assert "columns that the schema does not declare: 'WARD'" in text


def test_an_undeclared_column_may_be_repeated(tmp_path: Path) -> None:
    _, report = read_table(csv_file(tmp_path, GOOD + ",1,2", header=HEADER + ",,"), SCHEMA)
    assert report.undeclared == ("", "")


def test_a_file_without_header_does_not_show_its_first_patient(tmp_path: Path) -> None:
    text = error_of(csv_file(tmp_path, GOOD, header=f"40.5,2,01,{SECRET},2010-05-06"))
    assert "no column of the schema is in the header" in text
    assert "40.5" not in text and "2010" not in text


@pytest.mark.parametrize(
    "cell",
    [
        SECRET,
        "0x1F",
        "1_000",
        "1,5",
        "1.5.2",
        "inf",
        "-inf",
        "Infinity",
        "nan",
        "NaN",
        "1e",
        "e5",
        ".",
        "-",
        "1 2",
        "1e999",
        "٣",
        "true",
        "12 kg",
        "1\x00",
        "½",
    ],
)
def test_what_is_no_plain_number_is_located_but_not_shown(tmp_path: Path, cell: str) -> None:
    path = csv_file(tmp_path, "7", f'"{cell}"', "8", header="x")
    table, report = inspect_table(path, only("number", minimum=0, maximum=10))
    assert report.columns[0].invalid == 1 and report.columns[0].invalid_rows == (2,)
    assert not report.columns[0].fits and np.isnan(table["x"][1])
    text = error_of(path, only("number", minimum=0, maximum=10)).replace(str(path), "")
    assert "column 'x': 1 value(s) are not finite numbers (decimal point, no unit) (data rows 2)" in text
    assert "7" not in text and "8" not in text


@pytest.mark.parametrize(
    ("cell", "value"),
    [("5", 5), ("5.", 5), (".5", 0.5), ("+5", 5), ("-0.5", -0.5), ("5e-1", 0.5), ("1E1", 10), (" 5\t", 5), ("007", 7)],
)
def test_plain_decimal_notation_is_read(tmp_path: Path, cell: str, value: float) -> None:
    table, _ = read_table(csv_file(tmp_path, cell, header="x"), only("number", minimum=-1, maximum=10))
    assert table["x"].tolist() == [value]


@pytest.mark.parametrize(
    ("schema", "cell", "expected"),
    [
        (only("integer", minimum=0, maximum=9), "1.5", "whole numbers"),
        (only("string", enum=["a", "b"]), "A", "one of the declared categories"),
        (only("string", enum=["a", "b"]), " a", "one of the declared categories"),
        (only("integer", enum=[1, 2]), "01", "one of the declared categories"),
        (only("boolean"), "yes", "one of the declared categories"),
        (only("date", minimum="2000-01-01", maximum="2001-01-01"), "01.02.2000", "dates as YYYY-MM-DD"),
        (only("date", minimum="2000-01-01", maximum="2001-01-01"), "2000-02-30", "dates as YYYY-MM-DD"),
        (only("date", minimum="2000-01-01", maximum="2001-01-01"), "2000-1-2", "dates as YYYY-MM-DD"),
        (only("date", minimum="2000-01-01", maximum="2001-01-01"), "2000-01-02T00:00", "dates as YYYY-MM-DD"),
    ],
)
def test_cells_of_the_wrong_kind(tmp_path: Path, schema: Schema, cell: str, expected: str) -> None:
    text = error_of(csv_file(tmp_path, "-9", cell, header="x"), schema)
    assert f"column 'x': 1 value(s) are not {expected} (data rows 2)" in text


def test_all_problems_are_listed_together(tmp_path: Path) -> None:
    lines = [GOOD, f"{SECRET},1.5,03,maybe,yesterday", f"{SECRET},1,,1,"]
    text = error_of(csv_file(tmp_path, *lines))
    assert "column 'age': 2 value(s)" in text and "(data rows 2, 3)" in text
    assert "column 'ward': 1 missing value(s) in a required column (data rows 3)" in text
    for name in ("parity", "ward", "died", "admitted"):
        assert f"column '{name}': 1 value(s) are not" in text
    for value in ("1.5", "03", "maybe", "yesterday"):
        assert value not in text


def test_row_numbers_stop_after_five(tmp_path: Path) -> None:
    text = error_of(csv_file(tmp_path, *[SECRET] * 6, header="x"), only("number", minimum=0, maximum=1))
    assert "6 value(s)" in text and "(data rows 1, 2, 3, 4, 5, ...)" in text


def test_values_out_of_bounds_are_clipped_and_counted_or_refused(tmp_path: Path) -> None:
    path = csv_file(tmp_path, "-3,13,01,1,1999-12-31", "121,14,01,1,9999-12-31", "120,0,01,1,2000-01-01")
    table, report = read_table(path, SCHEMA)
    assert table["age"].tolist() == [0, 120, 120] and table["parity"].tolist() == [12, 12, 0]
    assert table["admitted"].tolist() == [days("2000-01-01"), days("2020-12-31"), days("2000-01-01")]
    assert [(c.below, c.above) for c in report.columns] == [(1, 1), (0, 2), (0, 0), (0, 0), (1, 1)]
    assert report.clipped == 6 and report.columns[0].bounds_rows == (1, 2)
    text = error_of(path, out_of_bounds="refuse")
    assert "column 'parity': 0 value(s) below the minimum and 2 above the maximum (data rows 1, 2)" in text
    with pytest.raises(ValueError, match="out_of_bounds"):
        read_table(path, SCHEMA, out_of_bounds="drop")  # type: ignore[arg-type]


def test_all_missing_and_constant_columns_are_marked_not_refused(tmp_path: Path) -> None:
    _, report = read_table(csv_file(tmp_path, "NA,1,01,1,", ",1,01,0,", ",NA,01,0,"), SCHEMA)
    assert [c.all_missing for c in report.columns] == [True, False, False, False, True]
    assert [c.constant for c in report.columns] == [False, True, True, False, False]
    _, report = inspect_table(csv_file(tmp_path, "a", "b", header="x"), only("number", minimum=0, maximum=1))
    assert not report.columns[0].all_missing and report.columns[0].invalid == 2
