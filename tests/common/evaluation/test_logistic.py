from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.linear_model import LogisticRegression

from common.evaluation.auroc import auroc_estimate, delong
from common.evaluation.logistic import RIDGE, fit_logistic


def drawn(rows: int, seed: int, slopes: tuple[float, ...] = (1.0, -0.5, 0.0)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rows, len(slopes)))
    chance = 1 / (1 + np.exp(-(0.4 + features @ np.array(slopes))))
    return features, (rng.random(rows) < chance).astype(float)


def test_the_maximum_is_that_of_scikit_learn_without_penalty() -> None:
    features, outcomes = drawn(400, 0)
    found = fit_logistic(features, outcomes)
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(features, outcomes)
    assert found.coefficients == pytest.approx([*model.intercept_, *model.coef_[0]], abs=1e-5)
    assert found.ridge == 0


def test_standard_errors_are_those_of_the_curvature_by_finite_differences() -> None:
    features, outcomes = drawn(300, 1)
    design = np.column_stack([np.ones(300), features])

    def loss(beta: np.ndarray) -> float:
        chance = 1 / (1 + np.exp(-design @ beta))
        return -float(np.sum(np.log(np.where(outcomes == 1, chance, 1 - chance))))

    found = fit_logistic(features, outcomes)
    size, at = 1e-3, found.coefficients
    steps = size * np.eye(4)
    curvature = np.array(
        [[loss(at + a + b) - loss(at + a - b) - loss(at - a + b) + loss(at - a - b) for b in steps] for a in steps]
    ) / (4 * size**2)
    assert found.errors == pytest.approx(np.sqrt(np.diag(np.linalg.inv(curvature))), rel=1e-4)


def test_nominal_intervals_cover_the_truth_as_often_as_they_say() -> None:
    hits = 0
    for seed in range(300):
        fit = fit_logistic(*drawn(250, 1000 + seed))
        hits += int(np.sum(np.abs(fit.coefficients[1:] - [1.0, -0.5, 0.0]) < 1.96 * fit.errors[1:]))
    assert stats.binomtest(hits, 900, 0.95).pvalue > 1e-4


def test_the_ridge_is_that_of_scikit_learn() -> None:
    features, outcomes = drawn(60, 2)
    model = LogisticRegression(C=0.5, tol=1e-10, max_iter=1000).fit(features, outcomes)
    found = fit_logistic(features, outcomes, ridge=2.0)
    assert found.coefficients == pytest.approx([*model.intercept_, *model.coef_[0]], abs=1e-5)


def test_an_offset_is_a_feature_with_the_coefficient_one() -> None:
    features, outcomes = drawn(5000, 3)
    whole = fit_logistic(features, outcomes)
    part = fit_logistic(features[:, 1:], outcomes, offset=whole.coefficients[1] * features[:, 0])
    assert part.coefficients == pytest.approx(np.delete(whole.coefficients, 1), abs=1e-4)


def test_what_has_no_finite_maximum_is_refused_and_shrunk() -> None:
    x = np.linspace(-1, 1, 40)[:, None]
    separated = (x[:, 0] > 0).astype(float)
    with pytest.raises(np.linalg.LinAlgError, match="separation"):
        fit_logistic(x, separated)
    shrunk = fit_logistic(x, separated, ridge=RIDGE)
    assert shrunk.ridge > 0 and np.isfinite(shrunk.errors).all() and shrunk.coefficients[1] > 1
    with pytest.raises(np.linalg.LinAlgError):
        fit_logistic(np.hstack([x, 2 * x]), np.tile([0.0, 1.0], 20))
    with pytest.raises(np.linalg.LinAlgError, match="one outcome class"):
        fit_logistic(x, np.ones(40), ridge=RIDGE)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=25), st.lists(st.integers(0, 4), min_size=2, max_size=25))
def test_delong_is_the_mann_whitney_statistic(yes: list[int], no: list[int]) -> None:
    scores = np.array([*yes, *no], dtype=float)
    positive = np.arange(len(scores)) < len(yes)
    test: Any = stats.mannwhitneyu(yes, no)
    value, variance = delong(positive, scores)
    assert value == pytest.approx(test.statistic / (len(yes) * len(no)))
    # The variance from its definition: of each row, the share of the other class that it beats.
    beats = [[(a > b) + (a == b) / 2 for b in no] for a in yes]
    above, below = np.mean(beats, axis=1), np.mean(beats, axis=0)
    assert variance == pytest.approx(above.var(ddof=1) / len(yes) + below.var(ddof=1) / len(no))


def test_delong_intervals_cover_the_true_auroc() -> None:
    truth, hits = stats.norm.cdf(1 / 2**0.5), 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        positive = np.arange(100) < 40
        found = auroc_estimate(*delong(positive, rng.normal(size=100) + positive))
        hits += found.low <= truth <= found.high
    assert 0.91 < hits / 400 < 0.98


def test_an_auroc_without_one_of_the_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="rows with the level"):
        delong(np.zeros(3, dtype=bool), np.arange(3.0))
