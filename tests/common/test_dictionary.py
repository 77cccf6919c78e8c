import csv
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.dictionary import Entry, _suffix, read_dictionary
from common.errors import SchemaError
from common.schema import check_schema

REDCAP = [
    "Variable / Field Name",
    "Form Name",
    "Field Type",
    "Field Label",
    "Choices, Calculations, OR Slider Labels",
    "Text Validation Type OR Show Slider Number",
    "Text Validation Min",
    "Text Validation Max",
    "Identifier?",
    "Branching Logic (Show field only if...)",
    "Required Field?",
]
API = [
    "field_name", "form_name", "field_type", "field_label", "select_choices_or_calculations",
    "text_validation_type_or_show_slider_number", "text_validation_min", "text_validation_max", "identifier",
    "branching_logic", "required_field",
]  # fmt: skip
ID = {"name": "record_id", "type": "text"}


def redcap(folder: Path, *variables: dict[str, str], header: list[str] = REDCAP) -> dict[str, Entry]:
    keys = ["name", "form", "type", "label", "choices", "validation", "min", "max", "identifier", "if", "required"]
    path = folder / "dictionary.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([variable.get(key, "") for key in keys] for variable in (ID, *variables))
    return read_dictionary(path)


def simple(folder: Path, text: str) -> dict[str, Entry]:
    path = folder / "dictionary.csv"
    path.write_text(text, encoding="utf-8")
    return read_dictionary(path)


def problems_of(entry: Entry) -> list[str]:
    return check_schema({"fields": [{"name": entry.name, **entry.field}]})[1]


CHOICES = "1, Male | 2, Female, or else | 09, "


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (
            {"type": "text", "validation": "integer", "min": "18", "max": "99", "label": "Age", "required": "y"},
            {"type": "integer", "title": "Age", "constraints": {"required": True, "minimum": 18, "maximum": 99}},
        ),
        (
            {"type": "text", "validation": "number", "min": "0.5", "max": "99"},
            {"type": "number", "constraints": {"minimum": 0.5, "maximum": 99}},
        ),
        (
            {"type": "text", "validation": "number_2dp", "min": "-1", "max": ".5"},
            {"type": "number", "constraints": {"minimum": -1, "maximum": 0.5}},
        ),
        (
            {"type": "text", "validation": "date_dmy", "min": "2000-01-01", "max": "2020-01-01"},
            {"type": "date", "constraints": {"minimum": "2000-01-01", "maximum": "2020-01-01"}},
        ),
        (
            {"type": "radio", "choices": CHOICES, "label": "<div class='x'>Sex</div>", "required": "y", "if": "[a]=1"},
            {
                "type": "string",
                "title": "Sex",
                "description": "1 = Male; 2 = Female, or else; 09 = ",
                "constraints": {"enum": ["1", "2", "09"]},
            },
        ),
        (
            {"type": "dropdown", "choices": "a, A", "required": "Y"},
            {"type": "string", "description": "a = A", "constraints": {"required": True, "enum": ["a"]}},
        ),
        ({"type": "yesno"}, {"type": "boolean", "trueValues": ["1"], "falseValues": ["0"]}),
        ({"type": "truefalse"}, {"type": "boolean", "trueValues": ["1"], "falseValues": ["0"]}),
        ({"type": "slider"}, {"type": "integer", "constraints": {"minimum": 0, "maximum": 100}}),
        ({"type": "slider", "max": "10"}, {"type": "integer", "constraints": {"minimum": 0, "maximum": 10}}),
    ],
)
@pytest.mark.parametrize("header", [REDCAP, API])
def test_redcap_fields_that_are_complete(
    tmp_path: Path, variable: dict[str, str], expected: dict[str, Any], header: list[str]
) -> None:
    entry = redcap(tmp_path, variable | {"name": "x"}, header=header)["x"]
    assert (entry.field, entry.left_out) == (expected, "")
    assert problems_of(entry) == []


@pytest.mark.parametrize(
    ("variable", "missing"),
    [
        ({"type": "text", "validation": "integer"}, ["minimum", "maximum"]),
        ({"type": "text", "validation": "number", "min": "0"}, ["maximum"]),
        ({"type": "text", "validation": "date_ymd", "min": "2000-01-01", "max": "today"}, ["maximum"]),
        ({"type": "text", "validation": "number", "min": "[lower]", "max": "5"}, ["minimum"]),
        ({"type": "calc", "choices": "[weight] / [height]", "min": "0"}, ["minimum", "maximum"]),
    ],
)
def test_redcap_fields_without_a_literal_bound_stay_open(
    tmp_path: Path, variable: dict[str, str], missing: list[str]
) -> None:
    problems = problems_of(redcap(tmp_path, variable | {"name": "x"})["x"])
    assert [problem.split("`")[1] for problem in problems] == [f"constraints.{key}" for key in missing]


@pytest.mark.parametrize(
    ("variable", "reason"),
    [
        ({"type": "text"}, "free text"),
        ({"type": "notes"}, "free text"),
        ({"type": "text", "validation": "email"}, "text validated as 'email'"),
        ({"type": "text", "validation": "time"}, "text validated as 'time'"),
        ({"type": "text", "validation": "datetime_ymd"}, "a date with a time"),
        ({"type": "text", "validation": "number_comma_decimal"}, "decimal comma"),
        ({"type": "file"}, "an uploaded file"),
        ({"type": "sql"}, "live query"),
        ({"type": "text", "validation": "integer", "min": "0", "max": "9", "identifier": "y"}, "an identifier"),
        ({"type": "yesno", "identifier": "Y"}, "an identifier"),
    ],
)
def test_redcap_fields_that_are_left_out(tmp_path: Path, variable: dict[str, str], reason: str) -> None:
    entry = redcap(tmp_path, variable | {"name": "x"})["x"]
    assert reason in entry.left_out and entry.field == {}


def test_redcap_checkboxes_become_a_column_each(tmp_path: Path) -> None:
    entries = redcap(
        tmp_path,
        {"name": "drug", "type": "checkbox", "choices": "1, Aspirin | -9, Other | A b, Third", "label": "Drugs"},
        {"name": "race", "type": "checkbox", "choices": "1, A | 2, B", "identifier": "y"},
    )
    assert list(entries)[1:] == ["drug___1", "drug____9", "drug___a_b", "race___1", "race___2"]
    boolean = {"type": "boolean", "trueValues": ["1"], "falseValues": ["0"]}
    assert entries["drug____9"].field == boolean | {"title": "Drugs: Other"}
    assert entries["race___2"].left_out == "an identifier"


def test_redcap_record_id_forms_and_descriptive_text(tmp_path: Path) -> None:
    entries = redcap(
        tmp_path,
        {"name": "a", "type": "yesno", "form": "demographics"},
        {"name": "text", "type": "descriptive", "label": "Welcome"},
    )
    assert entries["record_id"].left_out == "REDCap's record ID"
    assert "form is complete" in entries["demographics_complete"].left_out
    assert "text" not in entries


def test_redcap_record_id_is_left_out_even_as_a_number(tmp_path: Path) -> None:
    path = tmp_path / "dictionary.csv"
    header = ",".join(f'"{name}"' for name in REDCAP)
    path.write_text(f"{header}\npatient,form,text,,,integer,1,999,,,y\n")
    assert read_dictionary(path)["patient"].left_out == "REDCap's record ID"


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ({"name": "x", "type": "radio", "choices": "no code here"}, "variable 'x': its choices are not written as"),
        ({"name": "x", "type": "dropdown"}, "variable 'x': its choices are not written as"),
        ({"name": "x", "type": "hologram"}, "variable 'x': field type 'hologram' is not known"),
        ({"name": "", "type": "yesno"}, "line 3: no name in column 'Variable / Field Name'"),
        ({"name": "record_id", "type": "yesno"}, "variable 'record_id' is described twice"),
    ],
)
def test_faults_in_a_redcap_dictionary(tmp_path: Path, variable: dict[str, str], expected: str) -> None:
    with pytest.raises(SchemaError) as caught:
        redcap(tmp_path, variable)
    assert expected in str(caught.value) and "line 3" in str(caught.value)


def test_simple_dictionary(tmp_path: Path) -> None:
    entries = simple(
        tmp_path,
        "name,type,minimum,maximum,levels,required,title\n"
        "age,number,0,120.5,,yes,Age in years\n"
        "parity,Integer,0,12,,no,\n"
        "ward,string,,,01 | 02,1,\n"
        "code,integer,,,1|2,,\n"
        "died,boolean,,,,,\n"
        "day,date,2000-01-01,2001-01-01,,,\n"
        "mrn,identifier,,,,,\n"
        "crp,number,0,,,,\n",
    )
    fields = {name: entry.field for name, entry in entries.items()}
    assert fields == {
        "age": {
            "type": "number",
            "title": "Age in years",
            "constraints": {"minimum": 0, "maximum": 120.5, "required": True},
        },
        "parity": {"type": "integer", "constraints": {"minimum": 0, "maximum": 12}},
        "ward": {"type": "string", "constraints": {"enum": ["01", "02"], "required": True}},
        "code": {"type": "integer", "constraints": {"enum": [1, 2]}},
        "died": {"type": "boolean"},
        "day": {"type": "date", "constraints": {"minimum": "2000-01-01", "maximum": "2001-01-01"}},
        "mrn": {},
        "crp": {"type": "number", "constraints": {"minimum": 0}},
    }
    assert entries["mrn"].left_out == "an identifier"
    assert {name for name, entry in entries.items() if entry.field and problems_of(entry)} == {"crp"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "not a data dictionary known here; its columns are an empty file"),
        ("a,b\n1,2\n", "its columns are 'a', 'b'"),
        ("name,type,colour\nx,number,red\n", "not a data dictionary known here"),
        ("name,type\n", "no variable is described"),
        ("name,type\nx,free\n", "line 2, variable 'x': type 'free' is not one of number"),
        ("name,type,minimum\nx,number,low\n", "line 2, variable 'x': minimum is 'low'; expected a number"),
        ("name,type,required\nx,boolean,perhaps\n", "required is 'perhaps'; expected yes or no"),
        ("name,type\nx,boolean,1\n", "line 2: more or fewer fields than the header's 2"),
        ("name,type\nx\n", "line 2: more or fewer fields than the header's 2"),
        ("name,type\n,boolean\n", "line 2: no name in column 'name'"),
        ("name,type\nx,boolean\nx,boolean\n", "line 3: variable 'x' is described twice"),
        ('name,type\n"x,boolean\n', "not a well-formed CSV file"),
    ],
)
def test_faults_in_a_simple_dictionary(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(SchemaError) as caught:
        simple(tmp_path, text)
    assert expected in str(caught.value) and "dictionary.csv" in str(caught.value)


def test_all_faults_are_listed_together(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"2 problem\(s\)") as caught:
        simple(tmp_path, "name,type\nx,free\ny,number\nz,loose\n")
    assert "line 2" in str(caught.value) and "line 4" in str(caught.value)


def test_unreadable_dictionaries(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="cannot be read"):
        read_dictionary(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes(b"name,type\n\xe9,number\n")
    with pytest.raises(SchemaError, match="UTF-8"):
        read_dictionary(tmp_path / "latin.csv")


@given(st.text(max_size=10))
def test_checkbox_endings_are_what_redcap_allows_in_a_name(code: str) -> None:
    assert set(_suffix(code)) <= set("abcdefghijklmnopqrstuvwxyz0123456789_")
    assert len(_suffix(code)) == len(code.lower())
