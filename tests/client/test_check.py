import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from client.check import FileCheck, check_file, render
from common.errors import DataError, SchemaError

SECRET = "Zq7731"
SCHEMA = {
    "fields": [
        {"name": "age", "type": "number", "constraints": {"minimum": 0, "maximum": 120, "required": True}},
        {"name": "ward", "type": "string", "constraints": {"enum": ["01", "02"]}},
        {"name": "crp", "type": "number", "constraints": {"minimum": 0, "maximum": 600}},
    ]
}


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    return path


def data(folder: Path, *lines: str, header: str = "age,ward,crp") -> Path:
    path = folder / "site.csv"
    path.write_text("".join(f"{line}\n" for line in (header, *lines)))
    return path


def text_of(check: FileCheck, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False)
    console.print(*render(check), sep="\n")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def row_of(text: str, name: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [name])


def test_a_file_that_fits(schema: Path, tmp_path: Path) -> None:
    check = check_file(schema, data(tmp_path, "40.25,01,3", "41.75,02,"))
    assert (
        check.fits
        and check.problems == []
        and check.warnings == ["column 'crp': the same value in every row that has one"]
    )
    text = text_of(check)
    assert "2 data rows in" in text and "Verdict: the file fits the schema (2 rows)." in text
    assert row_of(text, "age") == ["age", "number", "0", "0", "0", "0", "fits"]
    assert row_of(text, "ward") == ["ward", "categorical", "0", "0", "fits"]
    assert row_of(text, "crp") == ["crp", "number", "1", "0", "0", "0", "see", "note"]
    assert "40.25" not in text and "41.75" not in text


@pytest.mark.parametrize(("policy", "fits"), [("clip", True), ("refuse", False)])
def test_the_policy_decides_on_values_out_of_bounds(schema: Path, tmp_path: Path, policy: str, fits: bool) -> None:
    path = data(tmp_path, "-1.5,01,3", "130.5,02,4", "131.5,02,5")
    check = check_file(schema, path, policy)  # type: ignore[arg-type]
    assert check.fits is fits
    text = text_of(check, width=200)
    assert row_of(text, "age")[:6] == ["age", "number", "0", "1", "2", "0"]
    assert ("3 value(s) outside their bounds are moved to the bound" in text) is fits
    assert ("1 value(s) below the minimum and 2 above the maximum (data rows 1, 2, 3)" in text) is not fits
    assert check.to_json()["columns"][0]["fits"] is fits
    assert "130.5" not in text and "1.5" not in text


def test_everything_to_mend_and_to_know_is_named_without_a_value(schema: Path, tmp_path: Path) -> None:
    path = data(tmp_path, f"{SECRET},03,,x", f",{SECRET},,{SECRET}", "50,01,,y", header="age,ward,crp,note[1]")
    check = check_file(schema, path)
    text = text_of(check, width=200)
    for line in (
        "To mend: column 'age': 1 value(s) are not finite numbers (decimal point, no unit) (data rows 1)",
        "To mend: column 'age': 1 missing value(s) in a required column (data rows 2)",
        "To mend: column 'ward': 2 value(s) are not one of the declared categories (data rows 1, 2)",
        "Note: column 'crp': no value in any row",
        "Note: columns that the schema does not declare are ignored: 'note[1]'",
        "Verdict: the file does not fit the schema (2 column(s) to mend).",
    ):
        assert line in text
    assert row_of(text, "age")[-1] == row_of(text, "ward")[-1] == "mend"
    assert SECRET not in text and SECRET not in json.dumps(check.to_json())


def test_json_holds_every_count(schema: Path, tmp_path: Path) -> None:
    document = check_file(schema, data(tmp_path, "-1,03,3", "200,,4", header="age,ward,crp")).to_json()
    assert json.loads(json.dumps(document)) == json.loads(json.dumps(document, allow_nan=False))
    assert (document["fits"], document["rows"], document["out_of_bounds"]) == (False, 2, "clip")
    age, ward, crp = document["columns"]
    assert (age["kind"], age["required"], age["rows"], age["below"], age["above"]) == ("number", True, 2, 1, 1)
    assert (age["bounds_rows"], age["fits"]) == ((1, 2), True)
    assert (ward["missing"], ward["invalid"], ward["invalid_rows"], ward["fits"]) == (1, 1, (1,), False)
    assert (crp["fits"], crp["warnings"]) == (True, [])
    assert len(document["problems"]) == 1 and len(document["schema_sha256"]) == 64


def test_what_cannot_be_reported_on_is_an_error(schema: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column 'crp' is missing"):
        check_file(schema, data(tmp_path, "1,01", header="age,ward"))
    with pytest.raises(SchemaError, match="cannot be read"):
        check_file(tmp_path / "none.json", tmp_path / "site.csv")


def test_a_table_of_thirty_columns_is_one_line_a_column(tmp_path: Path) -> None:
    names = [f"measurement_{i}" for i in range(30)]
    fields = [{"name": n, "type": "number", "constraints": {"minimum": 0, "maximum": 1}} for n in names]
    (tmp_path / "schema.json").write_text(json.dumps({"fields": fields}))
    path = data(tmp_path, ",".join("0" * 30), ",".join("1" * 30), header=",".join(names))
    lines = [
        line.split()[0] for line in text_of(check_file(tmp_path / "schema.json", path)).splitlines() if line.strip()
    ]
    first = lines.index(names[0])
    assert lines[first : first + 30] == names
