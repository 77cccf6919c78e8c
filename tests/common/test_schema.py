import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ExitCode, SchemaError
from common.schema import MAX_LEVELS, check_schema, load_schema, parse_date, parse_schema

AGE = {"name": "age", "type": "number", "constraints": {"minimum": 0, "maximum": 120}}
SEX = {"name": "sex", "type": "string", "constraints": {"enum": ["01", "02"], "required": True}}


def descriptor(*fields: Any, **more: Any) -> dict[str, Any]:
    return {"fields": list(fields), **more}


def field(kind: str | None = None, /, name: str = "x", **more: Any) -> dict[str, Any]:
    constraints = {key: more.pop(key) for key in ("minimum", "maximum", "enum", "required", "unique") if key in more}
    typed = {"name": name} if kind is None else {"name": name, "type": kind}
    return typed | {key.replace("__", ":"): value for key, value in more.items()} | {"constraints": constraints}


def problems_of(*fields: Any, **more: Any) -> list[str]:
    schema, problems = check_schema(descriptor(*fields, **more))
    assert (schema is None) == bool(problems)
    return problems


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_every_kind_is_read() -> None:
    schema = parse_schema(
        descriptor(
            AGE,
            SEX,
            field("integer", "parity", minimum=0, maximum=12, cohortium__scale="log"),
            field("integer", "code", enum=[1, 2, 9]),
            field("boolean", "died", trueValues=["y"], falseValues=["n"]),
            field("date", "admitted", minimum="1970-01-02", maximum="2000-01-01", title="Admission"),
            **{"cohortium:target": "died", "missingValues": ["", "NA"], "title": "Study"},
        )
    )
    age, sex, parity, code, died, admitted = schema.columns
    assert (age.kind, age.minimum, age.maximum, age.required, age.nullable) == ("number", 0, 120, False, True)
    assert (sex.kind, sex.levels, sex.required, sex.is_numeric) == ("categorical", ("01", "02"), True, False)
    assert (parity.kind, parity.scale, parity.is_numeric) == ("integer", "log", True)
    assert (code.kind, code.levels) == ("categorical", ("1", "2", "9"))
    assert (died.kind, died.levels, died.true_values, died.false_values) == (
        "boolean",
        ("false", "true"),
        ("y",),
        ("n",),
    )
    assert (admitted.kind, admitted.minimum, admitted.maximum, admitted.title) == ("date", 1, 10957, "Admission")
    assert (schema.target, schema.missing_values, schema.title) == ("died", ("", "NA"), "Study")
    assert schema.names == ("age", "sex", "parity", "code", "died", "admitted")
    assert schema["code"] is code and schema.index("code") == 3
    with pytest.raises(KeyError):
        schema["nothing"]


def test_a_type_may_be_left_out_where_there_is_an_enum() -> None:
    assert parse_schema(descriptor(field(enum=["a", "b"]))).columns[0].kind == "categorical"


def test_digest_ignores_key_order_and_sees_every_change() -> None:
    first = parse_schema(descriptor(AGE, SEX))
    same = parse_schema({"fields": [dict(reversed(AGE.items())), SEX]})
    other = parse_schema(descriptor(AGE, SEX | {"title": "Sex"}))
    assert first.digest == same.digest != other.digest


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (field("number", maximum=1), "a number needs `constraints.minimum`"),
        (field("integer", minimum=1), "an integer needs `constraints.maximum`"),
        (field("date", minimum="2000-01-01"), "a date needs `constraints.maximum`"),
        (field("number", minimum=2, maximum=1), "minimum must be less than maximum (found 2 and 1)"),
        (field("number", minimum=1, maximum=1), "minimum must be less than maximum"),
        (field("date", minimum="2001-01-01", maximum="2000-01-01"), "minimum must be less than maximum"),
        (field("number", minimum="0", maximum=1), "`minimum` must be a finite number"),
        (field("number", minimum=True, maximum=2), "`minimum` must be a finite number"),
        (field("number", minimum=0, maximum=math.inf), "`maximum` must be a finite number"),
        (field("number", minimum=0, maximum=10**400), "`maximum` must be a finite number"),
        (field("number", minimum=math.nan, maximum=1), "`minimum` must be a finite number"),
        (field("integer", minimum=0.5, maximum=3), "`minimum` of an integer must be a whole number"),
        (field("date", minimum="20000101", maximum="2001-01-01"), "`minimum` must be a date as YYYY-MM-DD"),
        (field("date", minimum="2000-02-30", maximum="2001-01-01"), "`minimum` must be a date as YYYY-MM-DD"),
        (field("date", minimum=5, maximum="2001-01-01"), "`minimum` must be a date as YYYY-MM-DD"),
        (field("string"), "a string needs a non-empty list `constraints.enum`; free text is never modelled"),
        (field("string", enum=[]), "non-empty list `constraints.enum`"),
        (field("string", enum="ab"), "non-empty list `constraints.enum`"),
        (field("string", enum=["a", 1.5]), "every level of `enum` must be a string"),
        (field("string", enum=["a", True]), "every level of `enum` must be a string"),
        (field("string", enum=["a", "b", "a"]), "levels declared twice: a"),
        (field("string", enum=["1", 1]), "levels declared twice: 1"),
        (field("string", enum=["a", ""]), "also listed in missingValues"),
        (field("string", enum=["a", "b\nc"]), "control character"),
        (field("integer", enum=["01", "02"]), 'codes such as "01" need the type string'),
        (field("string", enum=[str(i) for i in range(MAX_LEVELS + 1)]), "101 levels; at most 100 are allowed"),
        (field("string", enum=["a", "b"], minimum=1), "minimum apply to numbers, integers and dates"),
        (field("string", enum=["a", "b"], cohortium__scale="log"), "cohortium:scale applies to numbers"),
        (field("boolean", cohortium__scale="log"), "cohortium:scale applies to numbers"),
        (field("boolean", trueValues="yes"), "non-empty lists of strings"),
        (field("boolean", trueValues=[]), "non-empty lists of strings"),
        (field("boolean", trueValues=["x"], falseValues=["x"]), "must not overlap"),
        (field("boolean", trueValues=["x"], falseValues=[""]), "must not overlap"),
        (field("boolean", enum=["0", "1"]), "a boolean cannot have an enum"),
        (field("number", enum=[1, 2]), "a number cannot have an enum; use a string or an integer"),
        (field("number", minimum=0, maximum=1, cohortium__scale="cubic"), "cohortium:scale is 'cubic'"),
        (field("number", minimum=-1, maximum=1, cohortium__scale="log"), "a log scale needs"),
        (field("date", minimum="2000-01-01", maximum="2001-01-01", cohortium__scale="log"), "a log scale needs"),
        (field("number", minimum=0, maximum=1, cohortium__identifier=True), "identifiers are never modelled"),
        (field("number", minimum=0, maximum=1, cohortium__identifier="no"), "identifier must be true or false"),
        (field("string", enum=["a", "b"], unique=True), "a unique column is an identifier"),
        (field("string", enum=["a", "b"], required="yes"), "`required` must be true or false"),
        (field("number", minimum=0, maximum=1, minimun=3), "unknown key 'minimun'"),
        (field("number", minimum=0, maximum=1, decimalChar=","), "decimalChar ',' is not supported; expected '.'"),
        (field("number", minimum=0, maximum=1, groupChar=","), "groupChar ',' is not supported; leave it out"),
        (field("number", minimum=0, maximum=1, bareNumber=False), "bareNumber False is not supported"),
        (field("number", minimum=0, maximum=1, missingValues=["-9"]), "leave it out"),
        (field("date", minimum="2000-01-01", maximum="2001-01-01", format="%d.%m.%Y"), "expected 'default'"),
        (field("datetime", minimum=0, maximum=1), "type 'datetime' is not supported"),
        (field(["string"], enum=["a"]), "is not supported; use number"),  # type: ignore[arg-type]
        (field(), "no type is declared"),
        ({"name": "x", "type": "boolean", "constraints": ["enum"]}, "`constraints` must be an object"),
        ({"name": "x", "type": "string", "constraints": {"enum": ["a"], "pattern": "a"}}, "constraint 'pattern'"),
        (field("boolean", name=" x"), "leading or trailing blanks"),
        (field("boolean", name="x\ty"), "control characters"),
        ({"type": "boolean"}, "field 1: needs a non-empty string `name`"),
        ({"name": 3, "type": "boolean"}, "field 1: needs a non-empty string `name`"),
        ("age", "field 1: needs a non-empty string `name`"),
    ],
)
def test_each_fault_of_a_field_is_named(bad: Any, expected: str) -> None:
    problems = problems_of(bad)
    assert len(problems) == 1
    assert expected in problems[0]
    if isinstance(bad, dict) and isinstance(bad.get("name"), str):
        assert f"column {bad['name']!r}: " in problems[0]


def test_exactly_the_largest_number_of_levels_is_accepted() -> None:
    assert len(parse_schema(descriptor(field("string", enum=[str(i) for i in range(MAX_LEVELS)]))).columns) == 1


def test_both_missing_bounds_are_reported() -> None:
    assert [p.split("`")[1] for p in problems_of(field("number"))] == ["constraints.minimum", "constraints.maximum"]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"cohortium:target": "gone"}, "cohortium:target 'gone' is not a column"),
        ({"cohortium:target": ["sex"]}, "is not a column"),
        ({"cohortium:target": "age"}, "cohortium:target 'age' must have two or more categories"),
        ({"cohortium:target": "one"}, "cohortium:target 'one' must have two or more categories"),
        ({"cohortium:targets": "sex"}, "unknown key 'cohortium:targets'"),
        ({"missingValues": []}, "missingValues must be a non-empty list of strings"),
        ({"missingValues": "NA"}, "missingValues must be"),
        ({"missingValues": [-9]}, "missingValues must be"),
        ({"note": math.inf}, "JSON cannot carry"),
        ({"note": "\ud800"}, "JSON cannot carry"),
    ],
)
def test_faults_of_the_whole_schema_are_named(more: dict[str, Any], expected: str) -> None:
    problems = problems_of(AGE, SEX, field("string", "one", enum=["only"]), **more)
    assert len(problems) == 1
    assert expected in problems[0]


def test_boolean_and_categorical_targets_are_accepted() -> None:
    for target in ("sex", "died"):
        schema = parse_schema(descriptor(SEX, field("boolean", "died"), **{"cohortium:target": target}))
        assert schema.target == target


def test_duplicate_columns_are_named_once_with_their_count() -> None:
    assert problems_of(AGE, SEX, AGE, AGE) == ["column 'age' is declared 3 times; names must be unique"]


def test_all_problems_are_shown_together() -> None:
    with pytest.raises(SchemaError) as caught:
        parse_schema(
            descriptor(AGE, AGE, field("string"), field("number", "y"), **{"cohortium:target": "z"}), source="S"
        )
    text = str(caught.value)
    assert text.startswith("S: 5 problems\n")
    assert all(name in text for name in ("'age'", "'x'", "`constraints.minimum`", "`constraints.maximum`", "'z'"))
    assert "How to mend it" in text and caught.value.exit_code == ExitCode.SCHEMA


@pytest.mark.parametrize("bad", [None, 3, "text", [], {}, {"fields": {}}, {"fields": []}, {"fields": "age"}])
def test_no_fields(bad: Any) -> None:
    with pytest.raises(SchemaError, match="no fields found"):
        parse_schema(bad)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "not valid JSON at line 1, column 1"),
        ('{"fields": [\n  {"name": "a",}\n]}', "not valid JSON at line 2"),
        (b'{"title": "\xe9"}', "not UTF-8"),
        ('{"fields": [{"name": "a", "type": "number", "constraints": {"minimum": NaN}}]}', "NaN is not a JSON number"),
        ('{"fields": [], "fields": []}', "the key 'fields' occurs twice"),
        ("[" * 100_000, "nested too deeply"),
        ("[1, 2]", "no fields found"),
        ('{"fields": [], "title": "x"}', "no fields found"),
    ],
)
def test_files_that_are_no_schema(tmp_path: Path, content: str | bytes, expected: str) -> None:
    path = write(tmp_path / "schema.json", content)
    with pytest.raises(SchemaError) as caught:
        load_schema(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_schema_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="cannot be read"):
        load_schema(tmp_path / "none.json")
    with pytest.raises(SchemaError, match="cannot be read"):
        load_schema(tmp_path)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = write(tmp_path / "schema.json", b"\xef\xbb\xbf" + json.dumps(descriptor(AGE)).encode())
    assert load_schema(path).digest == parse_schema(descriptor(AGE)).digest


def test_frictionless_has_the_last_word(tmp_path: Path) -> None:
    path = write(tmp_path / "schema.json", json.dumps(descriptor(AGE | {"example": []}, SEX | {"title": 5})))
    with pytest.raises(SchemaError, match="title"):
        load_schema(path)


@given(st.dates())
def test_dates_count_days_since_1970(day: Any) -> None:
    assert parse_date(day.isoformat()) == day.toordinal() - 719163


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=4), st.lists, max_leaves=4))
def test_no_field_value_crashes_the_check(value: Any) -> None:
    for key in ("name", "type", "constraints", "trueValues", "cohortium:scale", "title", "format"):
        problems_of(AGE | {key: value})
    for key in ("minimum", "maximum", "enum", "required", "unique"):
        problems_of(AGE | {"constraints": {"minimum": 0, "maximum": 1, key: value}})
    problems_of(AGE, **{"cohortium:target": value})
    problems_of(AGE, missingValues=value)
