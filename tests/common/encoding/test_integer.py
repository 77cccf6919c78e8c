import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.encoding import encode_column
from common.encoding.base import UNOBSERVED
from common.encoding.integer import MAX_LEVELS, IntegerEncoding
from common.schema import Column, Scale

LAST = float(np.nextafter(1.0, 0.0))
SCALES: list[Scale] = ["linear", "log"]


def integer(low: int, high: int, scale: Scale = "linear", required: bool = True) -> Column:
    return Column("x", "integer", required=required, minimum=low, maximum=high, scale=scale)


@st.composite
def columns(draw: st.DrawFn, most: int) -> Column:
    low = draw(st.integers(-(10**12), 10**12))
    count = draw(st.one_of(st.integers(1, min(most, 1000)), st.integers(1, most)))
    return integer(low, low + count, draw(st.sampled_from(SCALES)), draw(st.booleans()))


def inside(column: Column) -> st.SearchStrategy[list[float]]:
    return st.lists(st.integers(int(column.minimum), int(column.maximum)).map(float), min_size=1, max_size=20)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_round_trip_is_exact_up_to_max_levels(data: st.DataObject) -> None:
    column = data.draw(columns(MAX_LEVELS - 1))
    encoding = IntegerEncoding(column)
    assert encoding.blocks[0].size == column.maximum - column.minimum + 1
    values = np.array([*data.draw(inside(column)), column.minimum, column.maximum, *[math.nan] * column.nullable])
    uniform = np.array(data.draw(st.lists(st.floats(0, LAST), min_size=len(values), max_size=len(values))))
    np.testing.assert_array_equal(encoding.decode(encoding.levels(values), uniform), values)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_round_trip_of_wide_ranges_stays_in_the_bin(data: st.DataObject) -> None:
    column = data.draw(columns(10**12))
    encoding = IntegerEncoding(column)
    values = np.array(data.draw(inside(column)))
    levels = encoding.levels(values)
    uniform = np.array(data.draw(st.lists(st.floats(0, LAST), min_size=len(values), max_size=len(values))))
    decoded = encoding.decode(levels, uniform)
    assert (decoded == np.floor(decoded)).all()
    assert (column.minimum <= decoded).all() and (decoded <= column.maximum).all()
    np.testing.assert_array_equal(encoding.levels(decoded), levels)
    for value, back, bin_ in zip(values, decoded, levels[:, 0], strict=True):
        assert encoding.edges[bin_] < value < encoding.edges[bin_ + 1]
        assert encoding.edges[bin_] < back < encoding.edges[bin_ + 1]


@settings(max_examples=100, deadline=None)
@given(columns(10**12))
def test_bins_partition_the_integers_of_the_range(column: Column) -> None:
    encoding = IntegerEncoding(column)
    assert encoding.blocks[0].size <= MAX_LEVELS
    # Every bin holds a whole number, the next one starts where it ends, and together they hold the whole range.
    assert encoding.first[0] == column.minimum and (encoding.count >= 1).all()
    np.testing.assert_array_equal(encoding.first[1:], encoding.first[:-1] + encoding.count[:-1])
    assert encoding.first[-1] + encoding.count[-1] - 1 == column.maximum
    np.testing.assert_array_equal(encoding.edges[:-1], encoding.first - 0.5)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("high", [1, 7, MAX_LEVELS - 1, MAX_LEVELS, 2 * MAX_LEVELS, 5000])
def test_every_integer_of_a_bin_is_reached_equally_often(high: int, scale: Scale) -> None:
    encoding = IntegerEncoding(integer(0, high, scale))
    owner = encoding.levels(np.arange(high + 1.0))[:, 0]
    assert (np.diff(owner) >= 0).all() and set(owner.tolist()) == set(range(encoding.blocks[0].size))
    for bin_ in range(0, encoding.blocks[0].size, 7):
        members = np.flatnonzero(owner == bin_)
        uniform = (np.arange(20 * len(members)) + 0.5) / (20 * len(members))
        found = encoding.decode(np.full((len(uniform), 1), bin_), uniform)
        np.testing.assert_array_equal(found, np.repeat(members, 20))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3, 5), (0, 10**12), (-(10**12), 10**12), (10**15 - 999, 10**15), (-(10**15), 10**15)]
)
def test_bounds_hold_for_every_level_and_uniform(low: int, high: int, scale: Scale) -> None:
    encoding = IntegerEncoding(integer(low, high, scale))
    size = encoding.blocks[0].size
    uniform = np.array([0.0, 5e-324, 0.5, 1.0 - 2.0**-24, LAST])
    values = encoding.decode(np.repeat(np.arange(size), len(uniform))[:, None], np.tile(uniform, size))
    assert (values == np.floor(values)).all() and (np.diff(values) >= 0).all()
    assert (values.min(), values.max()) == (low, high)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_distance_of_inputs_never_exceeds_the_declared_diameter(data: st.DataObject) -> None:
    column = data.draw(columns(10**9))
    encoding = encode_column(column)
    values = np.array([column.minimum, column.maximum, *data.draw(inside(column)), *[math.nan] * column.nullable])
    inputs = encoding.inputs(values).astype(np.float64)
    distances = np.linalg.norm(inputs[:, None] - inputs[None], axis=-1)
    assert inputs.shape[1] == encoding.input_width
    assert distances.max() <= encoding.diameter and distances.max() == pytest.approx(2.0, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(columns(10**12))
def test_basis_entries(column: Column) -> None:
    block = IntegerEncoding(column).blocks[0]
    assert block.basis is not None and len(block.basis) == block.size
    assert 1 <= block.parameters <= block.size - 1 or block.size == 1
    assert (np.abs(block.basis) <= 1).all()
    assert (np.diff(block.basis[:, 0]) > 0).all(), "the first polynomial tells every level apart"


def test_missing_values() -> None:
    encoding = IntegerEncoding(integer(1, 3, required=False))
    values = np.array([1.0, math.nan, 3.0, math.nan])
    np.testing.assert_array_equal(encoding.levels(values), [[0, 0], [UNOBSERVED, 1], [2, 0], [UNOBSERVED, 1]])
    assert encoding.inputs(values)[:, 2].mean() == 0.5
