import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.encoding import encode_column
from common.encoding.categorical import CategoricalEncoding
from common.schema import MAX_LEVELS, Column


def categorical(size: int, required: bool = True) -> Column:
    return Column("x", "categorical", required=required, levels=tuple(f"level {i}" for i in range(size)))


columns = st.builds(categorical, st.integers(1, MAX_LEVELS), st.booleans())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_round_trip_is_exact(data: st.DataObject) -> None:
    column = data.draw(columns)
    encoding = CategoricalEncoding(column)
    known = st.integers(0, len(column.levels) - 1).map(float)
    values = np.array(data.draw(st.lists(known, min_size=1, max_size=30)) + [math.nan] * column.nullable)
    levels = encoding.levels(values)
    assert levels.shape == (len(values), 1) and levels.dtype == np.int64
    np.testing.assert_array_equal(encoding.decode(levels, np.full(len(values), 0.999)), values)


@settings(max_examples=60, deadline=None)
@given(columns)
def test_every_level_of_the_block_is_a_declared_category_or_missing(column: Column) -> None:
    encoding = CategoricalEncoding(column)
    (block,) = encoding.blocks
    assert block.basis is None and block.size == block.parameters == len(column.levels) + column.nullable
    decoded = encoding.decode(np.arange(block.size)[:, None], np.zeros(block.size))
    expected = [*range(len(column.levels)), *[math.nan] * column.nullable]
    np.testing.assert_array_equal(decoded, expected)


@settings(max_examples=60, deadline=None)
@given(columns)
def test_inputs_are_one_hot_and_within_the_declared_diameter(column: Column) -> None:
    encoding = encode_column(column)
    values = np.array([*range(len(column.levels)), *[math.nan] * column.nullable], dtype=np.float64)
    inputs = encoding.inputs(values)
    np.testing.assert_array_equal(inputs, np.eye(encoding.input_width))
    assert inputs.dtype == np.float32
    distances = np.linalg.norm(inputs[:, None].astype(np.float64) - inputs[None], axis=-1)
    assert distances.max() <= encoding.diameter
    assert encoding.diameter == (pytest.approx(math.sqrt(2)) if encoding.input_width > 1 else 0.0)


def test_missingness_appears_at_its_rate() -> None:
    encoding = CategoricalEncoding(categorical(3, required=False))
    values = np.where(np.arange(100) % 5 == 0, math.nan, np.arange(100) % 3)
    assert (encoding.levels(values)[:, 0] == 3).mean() == 0.2
    assert encoding.inputs(values)[:, 3].mean() == pytest.approx(0.2)
