import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.encoding import encode_column
from common.encoding.base import UNOBSERVED
from common.encoding.number import BINS, DEGREE, LOG_OFFSET, NumberEncoding, from_unit, polynomial_basis, to_unit
from common.schema import MAX_BOUND, Column, Scale

LAST = float(np.nextafter(1.0, 0.0))
EXTREME = [
    (0.0, 1e-9),
    (-1e-9, 1e-9),
    (0.0, 1e12),
    (-1e12, -1.0),
    (-MAX_BOUND, MAX_BOUND),
    (5.0, 5.0 + 1e-9),
    (0.0, 1e-310),
    (-0.1, 0.2),
]
SCALES: list[Scale] = ["linear", "log"]


def number(low: float, high: float, scale: Scale = "linear", required: bool = True) -> Column:
    return Column("x", "number", required=required, minimum=low, maximum=high, scale=scale)


@st.composite
def columns(draw: st.DrawFn, required: bool | None = None) -> Column:
    low = draw(st.floats(-1e12, 1e12, allow_subnormal=False))
    span = 10.0 ** draw(st.floats(-9, 12))
    high = low + span
    if high - low < 1e-10 * abs(low) or high <= low:  # a range of a handful of floats has no bins to speak of
        high = low + max(span, 1e-6 * abs(low))
    scale: Scale = draw(st.sampled_from(SCALES))
    return number(low, high, scale, draw(st.booleans()) if required is None else required)


def inside(column: Column) -> st.SearchStrategy[list[float]]:
    return st.lists(
        st.one_of(
            st.sampled_from([column.minimum, column.maximum]),
            st.floats(column.minimum, column.maximum, allow_subnormal=False),
        ),
        min_size=1,
        max_size=20,
    )


def slow_unit(value: float, column: Column) -> float:
    """The declared map in plain Python: -1 at the minimum, 1 at the maximum, log(1 + share/offset) in between."""
    share = (value - column.minimum) / (column.maximum - column.minimum)
    if column.scale == "log":
        share = math.log(1 + share / LOG_OFFSET) / math.log(1 + 1 / LOG_OFFSET)
    return 2 * share - 1


def spacing(column: Column) -> float:
    return float(np.spacing(max(abs(column.minimum), abs(column.maximum))))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_to_unit_is_the_declared_map_and_from_unit_inverts_it(data: st.DataObject) -> None:
    column = data.draw(columns())
    values = np.sort(np.array(data.draw(inside(column))))
    unit = to_unit(values, column)
    np.testing.assert_allclose(unit, [slow_unit(v, column) for v in values], atol=1e-12)
    assert (np.diff(unit) >= 0).all() and (np.abs(unit) <= 1.0 + 1e-12).all()
    tolerance = 1e-12 * (column.maximum - column.minimum) + 4 * spacing(column)
    np.testing.assert_allclose(from_unit(unit, column), values, rtol=0, atol=tolerance)


@settings(max_examples=60, deadline=None)
@given(columns(), st.lists(st.floats(-1, 1), min_size=2, max_size=20))
def test_from_unit_is_monotone_and_inside_the_bounds(column: Column, points: list[float]) -> None:
    values = from_unit(np.sort(np.array(points)), column)
    assert (np.diff(values) >= 0).all()
    assert column.minimum <= values.min() and values.max() <= column.maximum
    assert from_unit(np.array([-1.0, -7.0]), column).tolist() == [column.minimum] * 2


@pytest.mark.parametrize("scale", SCALES)
def test_both_scales_map_zero_minimum_half_way_and_maximum(scale: Scale) -> None:
    column = number(0.0, 100.0, scale)
    assert to_unit(np.array([0.0, 100.0]), column).tolist() == [-1.0, 1.0]
    # Half-way on the log scale: 1 + x/1 = √101.
    middle = 50.0 if scale == "linear" else math.sqrt(101.0) - 1.0
    assert to_unit(np.array([middle]), column)[0] == pytest.approx(0.0, abs=1e-12)
    assert from_unit(np.zeros(1), column)[0] == pytest.approx(middle)
    assert to_unit(np.array([-5.0, 1e9, math.nan]), column)[:2].tolist() == [-1.0, 1.0]
    assert np.isnan(to_unit(np.array([math.nan]), column)).all()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_every_value_falls_into_exactly_one_bin_whose_edges_contain_it(data: st.DataObject) -> None:
    column = data.draw(columns(required=True))
    encoding = NumberEncoding(column)
    edges = encoding.edges
    assert edges[0] == column.minimum and edges[-1] == column.maximum and len(edges) == BINS + 1
    assert (np.diff(edges) > 0).all()
    values = np.array([*data.draw(inside(column)), *edges.tolist()])
    bins = encoding.levels(values)[:, 0]
    for value, found in zip(values, bins, strict=True):
        owners = [i for i in range(BINS) if edges[i] <= value and (value < edges[i + 1] or (i == BINS - 1))]
        assert owners == [found]


@pytest.mark.parametrize(("low", "high"), [(-1.9, 7.78), (-0.15, 1.0), (-8.0, 0.6)])
def test_the_outer_edges_are_the_declared_bounds_where_rounding_misses_them(low: float, high: float) -> None:
    assert low + (high - low) != high, "an example of what it is about"
    edges = NumberEncoding(number(low, high)).edges
    assert (edges[0], edges[-1]) == (low, high)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_round_trip_to_within_one_bin(data: st.DataObject) -> None:
    column = data.draw(columns())
    encoding = NumberEncoding(column)
    values = np.array(data.draw(inside(column)))
    if column.nullable:
        values = np.append(values, math.nan)
    uniform = np.array(data.draw(st.lists(st.floats(0, LAST), min_size=len(values), max_size=len(values))))
    decoded = encoding.decode(encoding.levels(values), uniform)
    np.testing.assert_array_equal(np.isnan(decoded), np.isnan(values))
    # One bin in the mapped range, measured by the independent map; rounding gets a ten-thousandth of the range.
    for value, back in zip(values[~np.isnan(values)], decoded[~np.isnan(values)], strict=True):
        slack = 1.01e-4 * (column.maximum - column.minimum) + 4 * spacing(column)
        reach = 2.0 / BINS * 1.0001 + 1e-9
        low = from_unit(np.array([slow_unit(float(value), column) - reach]), column)[0] - slack
        high = from_unit(np.array([slow_unit(float(value), column) + reach]), column)[0] + slack
        assert low <= back <= high


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("low", "high"), EXTREME)
def test_bounds_hold_for_every_level_and_uniform(low: float, high: float, scale: Scale) -> None:
    encoding = NumberEncoding(number(low, high, scale, required=False))
    uniform = np.array([0.0, 5e-324, 2.0**-53, 0.5, 1.0 - 2.0**-24, LAST])
    levels = np.array([(b, 0) for b in range(BINS) for _ in uniform])
    values = encoding.decode(levels, np.tile(uniform, BINS))
    assert np.isfinite(values).all() and low <= values.min() and values.max() <= high
    assert (np.diff(values.reshape(BINS, -1), axis=0) >= 0).all(), "bins are in order"
    assert values.max() > (low + high) / 2 > values.min()


@settings(max_examples=100, deadline=None)
@given(st.data())
@example(None)
def test_bounds_hold_for_any_levels_and_uniform(data: st.DataObject | None) -> None:
    if data is None:  # whatever the range and digits, the last bin's end is not above the maximum
        column, bins, share = number(0.0, 0.123456789), [BINS - 1], [LAST]
    else:
        column = data.draw(columns(required=True))
        bins = data.draw(st.lists(st.integers(0, BINS - 1), min_size=1, max_size=20))
        share = data.draw(st.lists(st.floats(0, LAST), min_size=len(bins), max_size=len(bins)))
    values = NumberEncoding(column).decode(np.array(bins)[:, None], np.array(share))
    assert (column.minimum <= values).all() and (values <= column.maximum).all()


def test_values_do_not_pile_up_on_an_edge_of_their_bin() -> None:
    encoding = NumberEncoding(number(0.0, 64.0))
    values = encoding.decode(np.full((1000, 1), 10), (np.arange(1000) + 0.5) / 1000)
    # Bin 10 of 64 over [0, 64] is [10, 11]; uniform shares give uniform values, to two digits and more.
    np.testing.assert_allclose(values, 10 + (np.arange(1000) + 0.5) / 1000, atol=0.01)
    assert len(np.unique(values)) >= 100


@pytest.mark.parametrize("low", [0.0, -3.0])
def test_declared_range_decides_the_digits(low: float) -> None:
    values = NumberEncoding(number(low, low + 1000.0)).decode(np.arange(BINS)[:, None], np.full(BINS, 1 / 3))
    np.testing.assert_allclose(values * 10, np.round(values * 10), atol=1e-9)
    assert (np.abs(values - np.round(values)) > 1e-6).any()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_distance_of_inputs_never_exceeds_the_declared_diameter(data: st.DataObject) -> None:
    column = data.draw(columns())
    encoding = encode_column(column)
    values = np.array([column.minimum, column.maximum, *data.draw(inside(column)), *[math.nan] * column.nullable])
    inputs = encoding.inputs(values).astype(np.float64)
    assert inputs.shape == (len(values), encoding.input_width)
    distances = np.linalg.norm(inputs[:, None] - inputs[None], axis=-1)
    assert distances.max() <= encoding.diameter
    assert distances.max() == pytest.approx(2.0, abs=1e-6), "and the declared diameter is reached"


def test_inputs_and_levels_of_missing_values() -> None:
    encoding = NumberEncoding(number(0.0, 10.0, required=False))
    values = np.array([0.0, math.nan, 10.0, 2.5])
    np.testing.assert_allclose(encoding.inputs(values), [[-1, 1, 0], [0, 0, 1], [1, 1, 0], [-0.5, 1, 0]], atol=1e-7)
    np.testing.assert_array_equal(encoding.levels(values), [[0, 0], [UNOBSERVED, 1], [BINS - 1, 0], [16, 0]])
    # Whatever bin was drawn for a value drawn as missing, it stays missing.
    assert np.isnan(encoding.decode(np.array([[5, 1], [-1, 1]]), np.zeros(2))).all()


def test_missingness_appears_at_its_rate() -> None:
    rng = np.random.default_rng(0)
    values = np.where(rng.random(1000) < 0.3, math.nan, rng.uniform(0, 10, 1000))
    encoding = NumberEncoding(number(0.0, 10.0, required=False))
    rate = np.isnan(values).mean()
    assert encoding.levels(values)[:, 1].mean() == rate
    assert (encoding.levels(values)[:, 0] == UNOBSERVED).mean() == rate
    assert encoding.inputs(values)[:, 2].mean() == pytest.approx(rate)
    np.testing.assert_array_equal(encoding.inputs(values)[:, 1:].sum(axis=1), 1.0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.integers(1, 8))
def test_basis_is_legendre_by_recurrence_and_in_the_unit_interval(points: list[float], degree: int) -> None:
    x = np.array(points)
    basis = polynomial_basis(x, degree)
    assert basis.shape == (len(x), min(degree, len(x) - 1))
    assert (np.abs(basis) <= 1.0 + 1e-15).all()
    before, now = np.ones_like(x), x
    for k in range(1, basis.shape[1] + 1):
        np.testing.assert_allclose(basis[:, k - 1], now, atol=1e-12)
        before, now = now, ((2 * k + 1) * x * now - k * before) / (k + 1)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("low", "high"), EXTREME)
def test_blocks_of_a_number(low: float, high: float, scale: Scale) -> None:
    bins, flag = NumberEncoding(number(low, high, scale, required=False)).blocks
    assert bins.basis is not None and bins.basis.shape == (BINS, DEGREE) and (np.abs(bins.basis) <= 1).all()
    assert (flag.size, flag.basis, flag.parameters, bins.parameters) == (2, None, 2, DEGREE)
    if high - low > 1e-300:  # among subnormal numbers the centres carry few digits
        # Centres are even on the scale, so that the basis is the same for every range.
        centres = (np.arange(BINS) + 0.5) * 2 / BINS - 1
        np.testing.assert_allclose(bins.basis[:, 0], centres, atol=2e-5)
