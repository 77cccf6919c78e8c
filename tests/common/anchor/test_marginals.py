from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import idct

from common.anchor.cells import TableCells
from common.anchor.marginals import MarginalStatistics
from common.table import Table
from tests.common.anchor.anchored import SCHEMA, corners, levels_of, patients

STATISTICS = MarginalStatistics(TableCells(SCHEMA, "dead"))


def test_counts_can_be_read_from_the_values() -> None:
    """The transform loses nothing but what the public number of patients gives."""
    table = patients(300, 0)
    parts = STATISTICS.split(STATISTICS.vector(levels_of(table)))
    cells = STATISTICS.cells.of(levels_of(table))
    for j, (statistic, part) in enumerate(zip(STATISTICS.columns, parts, strict=True)):
        counts = np.bincount(cells[:, j], minlength=statistic.column.size)
        if statistic.smooth:
            known = statistic.column.known
            total = counts[:known].sum()
            coefficients = np.concatenate([[total / math.sqrt(known)], part[: known - 1] / statistic.weights])
            assert np.allclose(np.asarray(idct(coefficients, norm="ortho")), counts[:known], atol=1e-9)
            assert np.array_equal(part[known - 1 :], counts[known:])
        else:
            assert np.array_equal(part, counts)


def test_the_sensitivity_is_what_replacing_one_patient_can_do() -> None:
    """By brute force over every pair of cells of every column: reached and never exceeded."""
    worst = 0.0
    for statistic in STATISTICS.columns:
        vectors = [statistic.values(row) for row in np.eye(statistic.column.size)]
        worst += max(float(np.square(a - b).sum()) for a, b in itertools.combinations(vectors, 2))
    assert math.isclose(STATISTICS.sensitivity, math.sqrt(worst), rel_tol=1e-9)
    assert STATISTICS.sensitivity <= math.sqrt(4.0 * len(STATISTICS.columns))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 2**31))
def test_no_neighbouring_tables_differ_by_more(one: int, other: int) -> None:
    table, rng = patients(20, one), np.random.default_rng(other)
    extreme = corners().values
    neighbour = table.values.copy()
    pool = extreme if other % 2 else patients(50, other).values
    neighbour[rng.integers(20)] = pool[rng.integers(len(pool))]
    moved = STATISTICS.vector(levels_of(table)) - STATISTICS.vector(levels_of(Table(SCHEMA, neighbour)))
    assert np.linalg.norm(moved) <= STATISTICS.sensitivity


def test_smooth_coefficients_are_heavier_than_rough_ones() -> None:
    age = STATISTICS.columns[1]
    assert age.smooth and np.all(np.diff(age.weights) < 0)
    lengths = [np.linalg.norm(age.values(row)) for row in np.eye(age.column.size)]
    assert max(lengths) <= 1 + 1e-12 and max(lengths) > 1 - 1e-9
