from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.anchor.cells import TableCells
from common.anchor.features import CURVATURE_WEIGHT, RADIUS_FACTOR, TARGET_WEIGHT, FeatureMap, Kind, column_features
from tests.common.anchor.anchored import SCHEMA, corners, levels_of, patients

CELLS = TableCells(SCHEMA, "dead")


def marginals_of(rows: int = 4000) -> list[np.ndarray]:
    cells = CELLS.of(levels_of(patients(rows, 0)))
    return [np.bincount(cells[:, j], minlength=size) / rows for j, size in enumerate(CELLS.sizes)]


def test_features_have_mean_zero_and_about_unit_variance_over_their_marginals() -> None:
    features = FeatureMap(CELLS, marginals_of())
    for column, marginal in zip(features.columns, marginals_of(), strict=True):
        mean = marginal @ column.table
        variance = marginal @ np.square(column.table) / np.square(column.weights)
        assert np.allclose(mean, 0, atol=1e-9)
        assert np.all(variance < 1.0 + 1e-9) and np.all(variance > 0.3)


def test_what_each_column_says() -> None:
    kinds = [column.kinds for column in FeatureMap(CELLS, marginals_of()).columns]
    assert kinds[0] == (Kind.LEVEL,)
    assert kinds[1] == (Kind.RANK, Kind.CURVATURE)
    assert kinds[2] == (Kind.MISSING, Kind.RANK, Kind.CURVATURE)
    assert kinds[3] == (Kind.LEVEL,) * 3
    assert kinds[4] == (Kind.MISSING, Kind.LEVEL)


def test_the_target_is_heavier_and_curvature_lighter() -> None:
    features = FeatureMap(CELLS, marginals_of())
    assert features.weights[0] == TARGET_WEIGHT and features.weights[2] == CURVATURE_WEIGHT
    plain = FeatureMap(TableCells(SCHEMA, None), marginals_of())
    assert plain.weights.max() == 1.0 and plain.radius < features.radius


def test_the_radius_follows_from_the_marginals_alone() -> None:
    marginals = marginals_of()
    features = FeatureMap(CELLS, marginals)
    rng = np.random.default_rng(0)
    drawn = np.column_stack([rng.choice(len(m), 20_000, p=m) for m in marginals])
    rows = np.hstack([column.table[drawn[:, j]] for j, column in enumerate(features.columns)])
    assert features.radius**2 == pytest.approx(RADIUS_FACTOR * np.square(rows).sum(axis=1).mean(), rel=0.02)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.booleans())
def test_no_row_is_longer_than_the_radius_whatever_the_marginals_are(seed: int, sharp: bool) -> None:
    """Also for marginals that a hostile coordinator would send: one cell with everything, cells with nothing."""
    rng = np.random.default_rng(seed)
    marginals = []
    for size in CELLS.sizes:
        marginal = np.eye(size)[rng.integers(size)] if sharp else rng.dirichlet(np.full(size, 0.05))
        marginals.append(marginal)
    features = FeatureMap(CELLS, marginals)
    rows = features.of(CELLS.of(levels_of(corners())))
    assert np.isfinite(rows).all() and np.isfinite(features.radius)
    assert np.linalg.norm(rows, axis=1).max() <= features.radius


def test_a_row_that_is_not_finite_counts_as_zero() -> None:
    features = FeatureMap(CELLS, marginals_of())
    features.columns[1].table[:] = np.inf
    assert not features.of(CELLS.of(levels_of(patients(5, 0)))).any()


def test_many_levels_have_few_features() -> None:
    from common.anchor.cells import ColumnCells

    column = ColumnCells("icd", 90, False, False, 0)
    found = column_features(column, np.full(90, 1 / 90), 1.0)
    assert len(found.kinds) == 12 and len(found.order) == 90
