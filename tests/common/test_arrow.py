import datetime
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from common.arrow import arrow_schema, text_schema, to_arrow, to_text
from common.schema import MAX_LEVELS, Schema, parse_schema
from common.table import Table

FIELDS: list[dict[str, Any]] = [
    {"name": "age", "type": "number", "constraints": {"minimum": -5, "maximum": 1e15}},
    {"name": "parity", "type": "integer", "constraints": {"minimum": -3, "maximum": 10**15}},
    {"name": "ward", "type": "string", "constraints": {"enum": ["01", "1", 'a "b", c'], "required": True}},
    {"name": "died", "type": "boolean", "trueValues": ["yes", "1"], "falseValues": ["no", "0"]},
    {"name": "day", "type": "date", "constraints": {"minimum": "1900-01-01", "maximum": "2100-01-01"}},
]
NAN = math.nan
DAY = (datetime.date(2010, 5, 6) - datetime.date(1970, 1, 1)).days
VALUES = np.array([[40.25, 2, 0, 1, DAY], [NAN, NAN, 2, NAN, NAN], [1e15, 1e15, 1, 0, -25567]])


def schema_of(*missing: str, fields: list[dict[str, Any]] = FIELDS) -> Schema:
    return parse_schema({"fields": fields, "missingValues": list(missing)})


def test_types_and_nullability() -> None:
    found = arrow_schema(schema_of(""))
    category = pa.dictionary(pa.int8(), pa.string())
    assert [(f.name, f.type, f.nullable) for f in found] == [
        ("age", pa.float64(), True),
        ("parity", pa.int64(), True),
        ("ward", category, False),
        ("died", pa.bool_(), True),
        ("day", pa.date32(), True),
    ]


def test_values_with_types_and_nulls() -> None:
    table = to_arrow(Table(schema_of(""), VALUES))
    table.validate(full=True)
    assert table.to_pydict() == {
        "age": [40.25, None, 1e15],
        "parity": [2, None, 10**15],
        "ward": ["01", 'a "b", c', "1"],
        "died": [True, None, False],
        "day": [datetime.date(2010, 5, 6), None, datetime.date(1900, 1, 1)],
    }
    assert table["ward"].combine_chunks().dictionary.to_pylist() == ["01", "1", 'a "b", c']


def test_a_category_of_the_most_levels_fits_its_index() -> None:
    levels = [f"level {i}" for i in range(MAX_LEVELS)]
    schema = schema_of("", fields=[{"name": "x", "type": "string", "constraints": {"enum": levels}}])
    table = to_arrow(Table(schema, np.append(np.arange(MAX_LEVELS), NAN)[:, None]))
    assert table["x"].to_pylist() == [*levels, None]


def test_text_spells_booleans_in_the_schemas_words_and_dates_as_iso() -> None:
    schema = schema_of("", "NA")
    text = to_text(to_arrow(Table(schema, VALUES)), schema)
    assert text.schema == text_schema(schema)
    assert [f.type for f in text.schema] == [pa.float64(), pa.int64(), pa.string(), pa.string(), pa.string()]
    assert text.to_pydict() == {
        "age": [40.25, None, 1e15],
        "parity": [2, None, 10**15],
        "ward": ["01", 'a "b", c', "1"],
        "died": ["yes", None, "no"],
        "day": ["2010-05-06", None, "1900-01-01"],
    }


def test_where_nothing_does_not_mean_missing_the_first_mark_is_written() -> None:
    schema = schema_of("-9", "NA")
    text = to_text(to_arrow(Table(schema, VALUES)), schema)
    assert {f.type for f in text.schema} == {pa.string()} and text.schema == text_schema(schema)
    assert [column[1] for column in text.to_pydict().values()] == ["-9", "-9", 'a "b", c', "-9", "-9"]
    assert [float(cell) for cell in text["age"].to_pylist()] == [40.25, -9, 1e15]
    assert [int(cell) for cell in text["parity"].to_pylist()] == [2, -9, 10**15]


@pytest.mark.parametrize("missing", ["", "NA"])
def test_a_single_column_never_writes_a_blank_line_as_null(missing: str) -> None:
    schema = schema_of(missing, fields=FIELDS[:1])
    text = to_text(to_arrow(Table(schema, VALUES[:, :1])), schema)
    assert text["age"].null_count == 0 and text["age"].to_pylist()[1] == missing


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int) -> None:
    schema = schema_of("")
    table = to_arrow(Table(schema, VALUES[:rows]))
    assert table.num_rows == rows and table.schema == arrow_schema(schema)
    assert to_text(table, schema).num_rows == rows


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field["name"])
def test_a_column_without_any_value_keeps_its_type(field: dict[str, Any]) -> None:
    optional = {**field, "constraints": {**field.get("constraints", {}), "required": False}}
    schema = schema_of("", fields=[optional, {**FIELDS[0], "name": "other"}])
    table = to_arrow(Table(schema, np.array([[NAN, 0.0], [NAN, 1.0]])))
    assert table[0].null_count == 2 and table.schema == arrow_schema(schema)
    assert to_text(table, schema)[0].null_count == 2
