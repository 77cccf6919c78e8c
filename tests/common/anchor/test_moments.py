from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import optimize

from common.anchor.cells import TableCells
from common.anchor.features import FeatureMap
from common.anchor.moments import moment_sensitivity, moment_size, moment_vector, pack, unpack
from common.table import Table
from tests.common.anchor.anchored import SCHEMA, corners, levels_of, patients
from tests.common.anchor.test_features import marginals_of

FEATURES = FeatureMap(TableCells(SCHEMA, "dead"), marginals_of())


def test_the_vector_is_the_matrix() -> None:
    levels = levels_of(patients(20_000, 1))  # more than one chunk
    rows = FEATURES.of(FEATURES.cells.of(levels))
    vector = moment_vector(FEATURES, levels)
    assert len(vector) == moment_size(FEATURES.size)
    assert np.allclose(unpack(vector, FEATURES.size), rows.T @ rows)


@given(arrays(np.float64, (5, 5), elements=st.floats(-10, 10)))
def test_packing_keeps_the_norm_and_everything_else(matrix: np.ndarray) -> None:
    matrix = matrix + matrix.T
    assert np.allclose(unpack(pack(matrix), 5), matrix)
    assert np.linalg.norm(pack(matrix)) == pytest.approx(np.linalg.norm(matrix), abs=1e-9)


def test_the_sensitivity_is_reached_by_orthogonal_rows_and_never_exceeded() -> None:
    """By search: no two rows of length at most R are further apart than √2 R²."""
    radius, rng = 2.5, np.random.default_rng(0)

    def apart(flat: np.ndarray) -> float:
        a, b = flat[:4], flat[4:]
        a, b = (x * min(1.0, radius / max(float(np.linalg.norm(x)), 1e-12)) for x in (a, b))
        return -float(np.linalg.norm(np.outer(a, a) - np.outer(b, b)))

    best = min(optimize.minimize(apart, rng.normal(size=8) * 3).fun for _ in range(20))
    assert -best <= moment_sensitivity(radius) * (1 + 1e-12)
    assert -best == pytest.approx(moment_sensitivity(radius), rel=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 2**31))
def test_no_neighbouring_tables_differ_by_more(one: int, other: int) -> None:
    table, rng = patients(20, one), np.random.default_rng(other)
    pool = corners().values if other % 2 else patients(50, other).values
    neighbour = table.values.copy()
    neighbour[rng.integers(20)] = pool[rng.integers(len(pool))]
    moved = moment_vector(FEATURES, levels_of(table)) - moment_vector(FEATURES, levels_of(Table(SCHEMA, neighbour)))
    assert np.linalg.norm(moved) <= moment_sensitivity(FEATURES.radius)
    assert math.isfinite(float(np.linalg.norm(moved)))
