from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.arrow import to_arrow
from common.errors import DataError
from common.evaluation.fidelity import compare, kolmogorov_smirnov, total_variation
from common.schema import Schema, parse_schema
from common.table import Table


def number(name: str, low: float = 0, high: float = 10, kind: str = "number") -> dict:
    return {"name": name, "type": kind, "constraints": {"minimum": low, "maximum": high}}


def levels(name: str, *enum: str) -> dict:
    return {"name": name, "type": "string", "constraints": {"enum": list(enum)}}


DATE = {"name": "day", "type": "date", "constraints": {"minimum": "2020-01-01", "maximum": "2021-01-01"}}
MIXED = parse_schema(
    {
        "fields": [
            number("x"),
            number("n", kind="integer"),
            DATE,
            levels("c", "p", "q", "r"),
            {"name": "b", "type": "boolean"},
        ]
    }
)


def mixed_table(rows: int, seed: int, missing: float = 0.2) -> Table:
    rng = np.random.default_rng(seed)
    n = rng.integers(0, 11, rows).astype(float)
    values = np.column_stack(
        [
            np.clip(n + rng.normal(0, 2, rows), 0, 10),
            n,
            18262 + rng.integers(0, 367, rows),
            rng.integers(0, 3, rows),
            n + rng.normal(0, 3, rows) > 5,
        ]
    ).astype(float)
    values[rng.random(values.shape) < missing] = np.nan
    return Table(MIXED, values)


def one_column(field: dict, *values: float) -> Table:
    return Table(parse_schema({"fields": [field]}), np.array(values, dtype=float)[:, None])


def ks_of_scipy(a: np.ndarray, b: np.ndarray) -> float:
    result: Any = stats.ks_2samp(a, b, method="exact")
    return float(result.statistic)


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    result: Any = stats.pearsonr(a, b)
    return float(result.statistic)


samples = st.lists(st.integers(-5, 5).map(float) | st.floats(-1e6, 1e6), min_size=1, max_size=40).map(np.array)


@pytest.mark.filterwarnings("ignore:ks_2samp")  # about its p-value, which is not used
@given(samples, samples)
def test_ks_is_what_scipy_computes(a: np.ndarray, b: np.ndarray) -> None:
    assert kolmogorov_smirnov(a, b) == pytest.approx(ks_of_scipy(a, b), abs=1e-12)


codes = st.lists(st.sampled_from([0.0, 1.0, 2.0, float("nan")]), min_size=1, max_size=40).map(np.array)


@given(codes, codes)
def test_tv_counts_missing_as_a_level(a: np.ndarray, b: np.ndarray) -> None:
    p, q = (Counter("missing" if np.isnan(x) else str(x) for x in side) for side in (a, b))
    expected = sum(abs(p[k] / a.size - q[k] / b.size) for k in set(p) | set(q)) / 2
    assert total_variation(a, b, 3) == pytest.approx(expected, abs=1e-12)
    # A level declared but seen on neither side changes nothing.
    assert total_variation(a, b, 7) == pytest.approx(expected, abs=1e-12)


def test_each_kind_of_column_gets_its_distance() -> None:
    a, b = mixed_table(300, 1), mixed_table(200, 2)
    found = compare(a, b)
    assert list(found.ks) == ["x", "n", "day"]
    assert list(found.tv) == ["c", "b"]
    assert list(found.missingness) == ["x", "n", "day", "c", "b"]
    for name in found.ks:
        x, y = a[name], b[name]
        assert found.ks[name] == pytest.approx(ks_of_scipy(x[~np.isnan(x)], y[~np.isnan(y)]))
    for name, value in found.missingness.items():
        assert value == pytest.approx(abs(np.isnan(a[name]).sum() / 300 - np.isnan(b[name]).sum() / 200))
    assert found.ks_mean == pytest.approx(sum(v for v in found.ks.values() if v is not None) / 3)
    assert found.tv_mean == pytest.approx((found.tv["c"] + found.tv["b"]) / 2)
    assert found.missingness_mean == pytest.approx(sum(found.missingness.values()) / 5)
    assert found.skipped == ()


def correlations_the_slow_way(table: Table) -> dict[tuple[str, str], float]:
    """Pearson correlations of pairs of named features through pandas and scipy, one pair at a time."""
    frame = to_arrow(table).to_pandas()
    features: dict[tuple[str, str], np.ndarray] = {}
    for column in table.schema.columns:
        if column.is_numeric:
            values = table[column.name]
            features[(column.name, "")] = np.where(np.isnan(values), np.nanmedian(values), values)
        else:
            text = frame[column.name].astype("string").str.lower()
            for level in column.levels:
                features[(column.name, level)] = text.eq(level).fillna(False).to_numpy(dtype=float)
    return {(f"{a}", f"{b}"): pearson(features[a], features[b]) for a, b in combinations(features, 2) if a[0] != b[0]}


def test_correlation_difference_agrees_with_a_loop_over_pairs() -> None:
    a, b = mixed_table(300, 3), mixed_table(250, 4)
    slow_a, slow_b = correlations_the_slow_way(a), correlations_the_slow_way(b)
    found = compare(a, b)
    # 3 numeric features, 3 levels, 2 levels: 28 pairs less 3 within c and 1 within b.
    assert found.correlation_pairs == len(slow_a) == 24
    assert found.correlation_difference == pytest.approx(np.mean([abs(slow_a[k] - slow_b[k]) for k in slow_a]))


def test_a_reversed_relation_has_the_largest_correlation_difference() -> None:
    schema = parse_schema({"fields": [number("x"), number("y")]})
    x = np.arange(11.0)
    found = compare(Table(schema, np.column_stack([x, x])), Table(schema, np.column_stack([x, 10 - x])))
    assert found.correlation_difference == pytest.approx(2.0)
    assert found.ks == {"x": 0.0, "y": 0.0}


@pytest.mark.parametrize("scale", [1e-200, 1e-12, 1e15])
def test_correlations_survive_extreme_units(scale: float) -> None:
    schema = parse_schema({"fields": [number("x", 0, 1e15), number("y", 0, 1e15)]})
    rng = np.random.default_rng(0)
    a, b = (rng.random((40, 2)) for _ in range(2))
    expected = abs(pearson(a[:, 0], a[:, 1]) - pearson(b[:, 0], b[:, 1]))
    found = compare(Table(schema, a * scale), Table(schema, b * scale))
    assert found.correlation_difference == pytest.approx(expected)


@pytest.mark.parametrize("side", ["synthetic", "real"])
@pytest.mark.parametrize("column", ["x", "c"])
def test_a_constant_on_either_side_is_left_out_of_correlations_only(side: str, column: str) -> None:
    a, b = mixed_table(200, 5, missing=0), mixed_table(200, 6, missing=0)
    values = a.values.copy()
    # 0.1 + 0.1 + ... does not average to 0.1: a constant must be recognised by its range, not its variance.
    values[:, MIXED.index(column)] = 0.1 if column == "x" else 1.0
    constant = Table(MIXED, values)
    found = compare(constant, b) if side == "synthetic" else compare(b, constant)
    kept = 7 if column == "x" else 5  # of 8 features; c has three levels, all constant
    within = 4 if column == "x" else 1
    assert found.correlation_pairs == kept * (kept - 1) // 2 - within
    assert found.correlation_difference is not None and np.isfinite(found.correlation_difference)
    assert (found.ks if column == "x" else found.tv)[column] is not None


def test_a_column_unknown_on_one_side_is_skipped_and_named() -> None:
    a, b = mixed_table(100, 7), mixed_table(100, 8)
    b.values[:, MIXED.index("x")] = np.nan
    found = compare(a, b)
    assert found.ks["x"] is None
    assert found.skipped == ("x",)
    ks_n, ks_day = found.ks["n"], found.ks["day"]
    assert ks_n is not None and ks_day is not None
    assert found.ks_mean == pytest.approx((ks_n + ks_day) / 2)
    assert found.missingness["x"] == pytest.approx(1 - np.isnan(a["x"]).mean())


def test_nothing_to_average_is_none() -> None:
    only_numbers = one_column(number("x"), 1, 2), one_column(number("x"), 2, 3)
    found = compare(*only_numbers)
    assert (found.tv_mean, found.correlation_difference, found.correlation_pairs) == (None, None, 0)
    only_levels = one_column(levels("c", "p", "q"), 0, 1, 1), one_column(levels("c", "p", "q"), 0, 0, np.nan)
    found = compare(*only_levels)
    assert (found.ks_mean, found.correlation_difference, found.correlation_pairs) == (None, None, 0)
    unknown = one_column(number("x"), np.nan), one_column(number("x"), np.nan)
    assert compare(*unknown).ks_mean is None


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 10**6), st.floats(0, 1))
def test_distances_are_symmetric_bounded_and_zero_for_equals(n: int, m: int, seed: int, missing: float) -> None:
    a, b = mixed_table(n, seed, missing), mixed_table(m, seed + 1, missing)
    forth, back = compare(a, b), compare(b, a)
    assert forth.ks == back.ks and forth.tv == back.tv and forth.missingness == back.missingness
    distances = [*forth.ks.values(), *forth.tv.values(), *forth.missingness.values()]
    assert all(0 <= d <= 1 + 1e-12 for d in distances if d is not None)
    if forth.correlation_difference is not None:
        assert 0 <= forth.correlation_difference <= 2 + 1e-12
        assert back.correlation_difference == pytest.approx(forth.correlation_difference)
    same = compare(a, Table(MIXED, a.values[::-1].copy()))
    known = [d for d in [*same.ks.values(), *same.tv.values(), *same.missingness.values()] if d is not None]
    assert max(known) == pytest.approx(0, abs=1e-12)
    assert same.correlation_difference is None or same.correlation_difference == pytest.approx(0, abs=1e-9)


def empty(schema: Schema) -> Table:
    return Table(schema, np.empty((0, len(schema.columns))))


def test_an_empty_table_is_refused() -> None:
    full = mixed_table(5, 0)
    with pytest.raises(DataError, match="the synthetic table has no rows"):
        compare(empty(MIXED), full)
    with pytest.raises(DataError, match="the real table has no rows"):
        compare(full, empty(MIXED))


def test_tables_of_different_schemas_are_refused() -> None:
    with pytest.raises(DataError, match="different schemas"):
        compare(one_column(number("x", high=10), 1), one_column(number("x", high=11), 1))
