import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.evaluation.attacks import gower
from common.schema import Column
from common.table import Table
from tests.common.evaluation.attacks.patients import SCHEMA, head, population


def share(x: float, column: Column) -> float:
    if column.scale == "log":
        offset = 0.01 * (column.maximum - column.minimum)
        return float(np.log((x - column.minimum + offset) / offset) / np.log(101))
    return (x - column.minimum) / (column.maximum - column.minimum)


def by_hand(a: np.ndarray, b: np.ndarray, columns: range | list[int]) -> float:
    """The sum of contributions of two rows, one cell at a time."""
    total = 0.0
    for j in columns:
        column = SCHEMA.columns[j]
        if np.isnan(a[j]) or np.isnan(b[j]):
            total += float(np.isnan(a[j]) != np.isnan(b[j]))
        elif column.is_numeric:
            total += abs(share(a[j], column) - share(b[j], column))
        else:
            total += float(a[j] != b[j])
    return total


def matrix(a: Table, b: Table, columns: range | list[int]) -> np.ndarray:
    return np.array([[by_hand(x, y, columns) for y in b.values] for x in a.values])


ALL = range(len(SCHEMA.columns))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6), st.sampled_from([1, 7, 1 << 19]))
def test_distances_are_those_computed_cell_by_cell(n: int, m: int, seed: int, block: int) -> None:
    a, b = population(n, seed), population(m, seed + 1)
    before, gower.BLOCK = gower.BLOCK, block
    try:
        found = np.concatenate([each.total.copy() for each in gower.blocks(a, b)])
        parts = np.concatenate([each.part(2).astype(float) for each in gower.blocks(a, b)])
        least = gower.nearest(a, b)
    finally:
        gower.BLOCK = before
    assert found == pytest.approx(matrix(a, b, ALL), abs=1e-5)
    assert parts == pytest.approx(matrix(a, b, [2]), abs=1e-6)
    assert least == pytest.approx(matrix(a, b, ALL).min(axis=1) / len(ALL), abs=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_it_is_a_metric(seed: int) -> None:
    table = population(12, seed)
    d = next(iter(gower.blocks(table, table))).total
    assert np.all(np.diag(d) == 0)
    assert d == pytest.approx(d.T)
    assert np.all(d[:, None, :] <= d[:, :, None] + d[None, :, :] + 1e-5)


def test_neighbours_are_the_nearest_rows_nearest_first() -> None:
    a, b, columns = population(30, 1), population(50, 2), [0, 1, 4, 5]
    exact = matrix(a, b, columns)
    for k in (1, 4):
        found = gower.neighbours(a, b, columns, k)
        assert found.shape == (30, k)
        assert all(len(set(row)) == k for row in found.tolist())
        assert np.take_along_axis(exact, found, axis=1) == pytest.approx(np.sort(exact, axis=1)[:, :k], abs=1e-5)


def test_the_nearest_other_row_is_not_the_row_itself() -> None:
    table = population(40, 3)
    exact = matrix(table, table, ALL)
    np.fill_diagonal(exact, np.inf)
    chosen = np.array([5, 0, 39])
    assert gower.nearest_other(table, chosen) == pytest.approx(exact[chosen].min(axis=1) / len(ALL), abs=1e-6)


def test_an_equal_row_is_at_distance_zero_exactly() -> None:
    table = population(200, 4)
    assert np.all(gower.nearest(head(table, 50), table) == 0)
