from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import optimize

from common.anchor.cells import TableCells
from common.anchor.features import FeatureMap
from common.anchor.marginals import MarginalStatistics
from common.anchor.moments import moment_vector, unpack
from server.anchor.repair import project_to_simplex, repair_marginals, repair_moments
from tests.common.anchor.anchored import SCHEMA, levels_of, patients

CELLS = TableCells(SCHEMA, "dead")
STATISTICS = MarginalStatistics(CELLS)
LEVELS = levels_of(patients(4000, 0))
EXACT = STATISTICS.vector(LEVELS)
TRUE = [np.bincount(CELLS.of(LEVELS)[:, j], minlength=size) / 4000 for j, size in enumerate(CELLS.sizes)]


@given(arrays(np.float64, 6, elements=st.floats(-50, 50)), st.floats(0.1, 100))
def test_the_simplex_projection_is_the_nearest_point(values: np.ndarray, total: float) -> None:
    found = project_to_simplex(values, total)
    assert found.min() >= 0 and found.sum() == pytest.approx(total)
    # The optimality condition: one level is taken from every entry that stays positive, more from the others.
    level = (values - found)[found > 0]
    assert np.ptp(level) < 1e-9 * (1 + abs(level[0])) + 1e-9
    assert np.all(values[found == 0] <= level[0] + 1e-9 * (1 + abs(level[0])))


def test_without_noise_the_marginals_are_the_counts() -> None:
    for found, true in zip(repair_marginals(STATISTICS, EXACT, 0.0, 4000), TRUE, strict=True):
        assert np.abs(found - true).max() < 1e-6 + 1e-3 / 4000 * len(true) + 1e-3 / 4000


@pytest.mark.parametrize("noise", [20.0, 100.0, 1000.0])
def test_with_noise_they_are_probabilities_and_nearer_than_the_raw_ones(noise: float) -> None:
    rng = np.random.default_rng(0)
    noised = EXACT + noise * rng.standard_normal(STATISTICS.size)
    repaired = repair_marginals(STATISTICS, noised, noise, 4000)
    raw = repair_marginals(STATISTICS, noised, 0.0, 4000)  # as if nothing were known of the noise
    for found in repaired:
        assert found.min() > 0 and found.sum() == pytest.approx(1.0)

    def distance(parts: list[np.ndarray]) -> float:
        return float(np.mean([np.abs(np.cumsum(p - t)).max() for p, t in zip(parts, TRUE, strict=True)]))

    assert distance(repaired) <= distance(raw) + 1e-9


def test_moments_are_shrunk_towards_nothing_between_columns_only() -> None:
    features = FeatureMap(CELLS, TRUE)
    exact = unpack(moment_vector(features, LEVELS), features.size)
    assert np.allclose(repair_moments(features, exact, 0.0, 4000), exact / 4000)
    rng, noise = np.random.default_rng(1), 0.2 * 4000
    draw = np.triu(rng.standard_normal(exact.shape), 1)
    noised = exact + noise * (draw + draw.T)
    found = repair_moments(features, noised, noise, 4000)
    same = features.owner[:, None] == features.owner[None, :]
    assert np.allclose(found[same], noised[same] / 4000)
    error, raw = np.square(found - exact / 4000)[~same].mean(), np.square(noised - exact)[~same].mean() / 4000**2
    assert error < 0.5 * raw and np.all(np.abs(found[~same]) <= np.abs(noised[~same]) / 4000 + 1e-12)


def test_shrinkage_is_the_posterior_mean_of_the_mixture() -> None:
    """Against a numerical posterior of the same prior, for one value."""
    from server.anchor import repair

    rng = np.random.default_rng(2)
    truth = np.where(rng.random(3000) < 0.3, rng.normal(0, 1.0, 3000), 0.0)
    noise = 0.3
    values = truth + noise * rng.standard_normal(3000)
    found = repair._shrunk(values, noise)

    def loss(parameters: np.ndarray) -> float:
        share, spread = 1 / (1 + np.exp(-parameters[0])), np.exp(parameters[1])
        return float(np.square(posterior(values, share, spread, noise) - truth).mean())

    best = optimize.minimize(loss, [-1.0, 0.0], method="Nelder-Mead").fun
    assert np.square(found - truth).mean() < 1.05 * best


def posterior(values: np.ndarray, share: float, spread: float, noise: float) -> np.ndarray:
    from scipy.stats import norm

    slab = share * norm.pdf(values, 0, np.hypot(noise, spread))
    odds = slab / (slab + (1 - share) * norm.pdf(values, 0, noise))
    return odds * values * spread**2 / (spread**2 + noise**2)
