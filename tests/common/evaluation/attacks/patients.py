"""A simulated population of mixed, correlated, partially missing records, and cohorts that leak in known ways."""

import numpy as np

from common.encoding.number import from_unit, to_unit
from common.schema import Schema, parse_schema
from common.table import Table

SCHEMA = parse_schema(
    {
        "fields": [
            {"name": "age", "type": "number", "constraints": {"minimum": 0, "maximum": 100, "required": True}},
            {"name": "height", "type": "number", "constraints": {"minimum": 100, "maximum": 220}},
            {
                "name": "crea",
                "type": "number",
                "constraints": {"minimum": 0, "maximum": 50},
                "cohortium:scale": "log",
            },
            {"name": "heart rate", "type": "integer", "constraints": {"minimum": 20, "maximum": 220}},
            {"name": "glucose", "type": "number", "constraints": {"minimum": 0, "maximum": 700}},
            {"name": "stage", "type": "string", "constraints": {"enum": ["I", "II", "III", "IV"]}},
            {"name": "ward == 'x' & `q`", "type": "string", "constraints": {"enum": ["a", "b", "c"]}},
            {
                "name": "admitted",
                "type": "date",
                "constraints": {"minimum": "2019-01-01", "maximum": "2022-12-31"},
            },
            {"name": "died", "type": "boolean", "constraints": {"required": True}},
        ],
        "cohortium:target": "died",
    }
)


def population(rows: int, seed: int, schema: Schema = SCHEMA) -> Table:
    """Independent patients: one latent severity behind every column, missing where nullable at about one in ten."""
    rng = np.random.default_rng(seed)
    severity = rng.normal(size=rows)
    values = np.empty((rows, len(schema.columns)))
    for j, column in enumerate(schema.columns):
        score = 0.6 * severity + 0.8 * rng.normal(size=rows)
        if column.is_numeric:
            values[:, j] = round_as_declared(from_unit(np.tanh(score / 2), column), column.kind)
        else:
            cuts = np.linspace(-1, 1, len(column.levels) + 1)[1:-1]
            values[:, j] = np.searchsorted(cuts, score)
        if column.nullable:
            values[rng.random(rows) < 0.1, j] = np.nan
    return Table(schema, values)


def round_as_declared(values: np.ndarray, kind: str) -> np.ndarray:
    return np.round(values, 1 if kind == "number" else 0)


def jittered(table: Table, seed: int, spread: float) -> Table:
    """Every number moved by a normal amount, `spread` in shares of the declared range."""
    rng = np.random.default_rng(seed)
    values = table.values.copy()
    for j, column in enumerate(table.schema.columns):
        if column.is_numeric:
            moved = to_unit(values[:, j], column) + rng.normal(0, 2 * spread, len(values))
            values[:, j] = round_as_declared(from_unit(moved, column), column.kind)
    return Table(table.schema, values)


def resampled(table: Table, rows: int, seed: int) -> Table:
    return Table(table.schema, table.values[np.random.default_rng(seed).integers(len(table), size=rows)])


def with_rows(table: Table, planted: Table) -> Table:
    """The table with its first rows replaced."""
    values = table.values.copy()
    values[: len(planted)] = planted.values
    return Table(table.schema, values)


def head(table: Table, rows: int) -> Table:
    return Table(table.schema, table.values[:rows])


def columns_of(*fields: dict) -> Schema:
    return parse_schema({"fields": list(fields)})


def levels(name: str, *enum: str, required: bool = True) -> dict:
    return {"name": name, "type": "string", "constraints": {"enum": list(enum), "required": required}}


def number(name: str, low: float = 0, high: float = 1, required: bool = True) -> dict:
    return {"name": name, "type": "number", "constraints": {"minimum": low, "maximum": high, "required": required}}
