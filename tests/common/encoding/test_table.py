import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.encoding import TableEncoding, encode_column
from common.encoding.base import UNOBSERVED
from common.schema import Schema, parse_schema
from common.table import Table

LAST = float(np.nextafter(1.0, 0.0))
SCHEMA = parse_schema(
    {
        "fields": [
            {"name": "age", "type": "number", "constraints": {"minimum": 18, "maximum": 99}},
            {"name": "ward", "type": "string", "constraints": {"enum": ["a", "b", "c"]}},
            {
                "name": "crp",
                "type": "number",
                "cohortium:scale": "log",
                "constraints": {"minimum": 0, "maximum": 500, "required": True},
            },
            {"name": "parity", "type": "integer", "constraints": {"minimum": 0, "maximum": 12}},
            {"name": "died", "type": "boolean", "constraints": {"required": True}},
            {"name": "day", "type": "date", "constraints": {"minimum": "2020-01-01", "maximum": "2023-12-31"}},
        ]
    }
)


def random_table(schema: Schema, rows: int, rng: np.random.Generator, missing: float = 0.2) -> Table:
    values = np.empty((rows, len(schema.columns)))
    for j, column in enumerate(schema.columns):
        if column.kind == "number":
            values[:, j] = rng.uniform(column.minimum, column.maximum, rows)
        elif column.is_numeric:
            values[:, j] = rng.integers(int(column.minimum), int(column.maximum) + 1, rows)
        else:
            values[:, j] = rng.integers(0, len(column.levels), rows)
        if column.nullable:
            values[rng.random(rows) < missing, j] = math.nan
    return Table(schema, values)


def test_layout_is_the_columns_side_by_side() -> None:
    table = random_table(SCHEMA, 50, np.random.default_rng(0))
    encoding = TableEncoding(SCHEMA)
    encoded = encoding.encode(table)
    assert len(encoded) == 50 and encoded.inputs.dtype == torch.float32 and encoded.levels.dtype == torch.int64
    # age 3, ward 4, crp 1, parity 3, died 2, day 3 inputs; age, crp, parity, day bins; flags of the nullable ones.
    assert encoding.input_width == encoded.inputs.shape[1] == 16
    assert len(encoding.blocks) == encoded.levels.shape[1] == 2 + 1 + 1 + 2 + 1 + 2
    # Every column's slice is what its own encoding gives.
    start = 0
    for j, column in enumerate(SCHEMA.columns):
        own = encode_column(column).inputs(table.values[:, j])
        np.testing.assert_array_equal(encoded.inputs[:, start : start + own.shape[1]].numpy(), own)
        start += own.shape[1]
    sizes = torch.tensor([block.size for block in encoding.blocks])
    assert (encoded.levels < sizes).all() and (encoded.levels >= UNOBSERVED).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_round_trip_of_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = random_table(SCHEMA, 30, rng)
    encoding = TableEncoding(SCHEMA)
    back = encoding.decode(encoding.encode(table).levels.numpy(), rng.random((30, len(SCHEMA.columns))))
    np.testing.assert_array_equal(np.isnan(back.values), np.isnan(table.values))
    for name in ("ward", "parity", "died"):
        np.testing.assert_array_equal(back[name], table[name])
    assert np.nanmax(np.abs(back["age"] - table["age"])) <= 81 / 64 + 0.01
    known = ~np.isnan(table["day"])
    assert (np.abs(back["day"] - table["day"])[known] <= 1461 / 200 + 1).all()
    assert (np.abs(np.log1p(back["crp"] / 5) - np.log1p(table["crp"] / 5)) <= math.log(101) / 64 + 0.02).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.5, LAST]))
def test_any_levels_give_valid_rows(seed: int, uniform: float) -> None:
    encoding = TableEncoding(SCHEMA)
    rng = np.random.default_rng(seed)
    levels = np.column_stack([rng.integers(0, block.size, 40) for block in encoding.blocks])
    table = encoding.decode(levels, np.full((40, len(SCHEMA.columns)), uniform))
    for j, column in enumerate(SCHEMA.columns):
        values = table.values[:, j]
        known = values[~np.isnan(values)]
        assert column.nullable or len(known) == 40
        if column.kind != "number":
            assert (known == np.floor(known)).all()
        low, high = (column.minimum, column.maximum) if column.is_numeric else (0, len(column.levels) - 1)
        assert (known >= low).all() and (known <= high).all()


def test_diameter_of_the_whole_table_is_reached_and_never_exceeded() -> None:
    encoding = TableEncoding(SCHEMA)
    # privacy.md, section 2: 2 for a number, nullable with flag and missing at 0, and √2 for categories.
    assert encoding.diameter == pytest.approx(math.sqrt(4 + 2 + 4 + 4 + 2 + 4))
    lowest = [c.minimum if c.is_numeric else 0.0 for c in SCHEMA.columns]
    highest = [c.maximum if c.is_numeric else 1.0 for c in SCHEMA.columns]
    random = random_table(SCHEMA, 300, np.random.default_rng(1), missing=0.5).values
    inputs = encoding.encode(Table(SCHEMA, np.vstack([lowest, highest, random]))).inputs.double()
    distances = torch.cdist(inputs, inputs, compute_mode="donot_use_mm_for_euclid_dist")
    assert float(distances.max()) <= encoding.diameter * (1 + 1e-12)
    assert float(distances[0, 1]) == pytest.approx(encoding.diameter)


def test_the_encoding_is_a_function_of_the_schema_alone() -> None:
    table = random_table(SCHEMA, 20, np.random.default_rng(2))
    again = TableEncoding(parse_schema(dict(SCHEMA.descriptor)))
    one, two = TableEncoding(SCHEMA).encode(table), again.encode(Table(again.schema, table.values[:5]))
    assert torch.equal(one.inputs[:5], two.inputs) and torch.equal(one.levels[:5], two.levels)
    moved = one.to(torch.device("cpu"))
    assert torch.equal(moved.inputs, one.inputs) and torch.equal(moved.levels, one.levels)
