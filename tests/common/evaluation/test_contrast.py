"""Two noised histograms: against scikit-learn without noise; unbiased, and intervals that cover, with it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from common.evaluation.contrast import (
    FALSE_POSITIVES,
    Sides,
    auroc_between,
    find,
    rate_difference,
    rate_of,
    true_positive_rate,
)

FIT = np.array([0.02, 0.05, 0.08, 0.1, 0.12, 0.13, 0.12, 0.12, 0.1, 0.07, 0.05, 0.04])
HOLDOUT = np.array([0.04, 0.07, 0.1, 0.12, 0.13, 0.13, 0.12, 0.1, 0.08, 0.06, 0.03, 0.02])
PATIENTS, CONTROL = 2000, 500
counts = st.lists(st.integers(0, 40), min_size=5, max_size=5).filter(lambda found: sum(found) > 0)


@given(fit=counts, holdout=counts)
def test_without_noise_the_numbers_are_those_of_the_scores(fit: list[int], holdout: list[int]) -> None:
    members = np.repeat(np.arange(5), fit)
    others = np.repeat(np.arange(5), holdout)
    truth = np.repeat([True, False], [len(members), len(others)])
    scores = np.concatenate([members, others])
    shares = np.array(fit) / sum(fit), np.array(holdout) / sum(holdout)
    assert auroc_between(*shares) == pytest.approx(roc_auc_score(truth, scores))
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    # Where the curve rises without a false positive, the threshold may lie above or below the rise.
    ends = [np.interp(FALSE_POSITIVES + step, false, true) for step in (-1e-9, 1e-9)]
    assert min(ends) - 1e-6 <= true_positive_rate(*shares) <= max(ends) + 1e-6
    assert rate_difference(3)(*shares) == pytest.approx((members >= 3).mean() - (others >= 3).mean())


def drawn(rng: np.random.Generator, fit: np.ndarray, holdout: np.ndarray, sigma: tuple[float, float]) -> Sides:
    parts = [rng.multinomial(n, p).astype(float) for n, p in ((PATIENTS, fit), (CONTROL, holdout))]
    noised = [part + s * rng.standard_normal(part.shape) for part, s in zip(parts, sigma, strict=True)]
    return Sides(noised[0], noised[1], PATIENTS, CONTROL, *sigma)


@pytest.mark.parametrize("sigma", [(0.0, 0.0), (15.0, 12.0)])
@pytest.mark.parametrize("name", ["auroc", "true_positive_rate", "rate", "difference"])
def test_intervals_cover_the_truth(sigma: tuple[float, float], name: str) -> None:
    statistic, linear, within = {
        "auroc": (auroc_between, True, (0.0, 1.0)),
        "true_positive_rate": (true_positive_rate, False, (0.0, 1.0)),
        "rate": (rate_of(11), True, (0.0, 1.0)),
        "difference": (rate_difference(10), True, (-1.0, 1.0)),
    }[name]
    truth, rng = float(statistic(FIT, HOLDOUT)), np.random.default_rng(3)
    found = [
        find(drawn(rng, FIT, HOLDOUT, sigma), statistic, 0.0, rng, linear=linear, within=within) for _ in range(100)
    ]
    covered = sum(each.low <= truth <= each.high for each in found)
    assert covered >= 85  # 95 expected; fewer than 85 once in 100,000 times
    assert all(each.low <= each.value <= each.high for each in found)


def test_noise_does_not_shift_an_area_or_a_rate() -> None:
    rng, sigma = np.random.default_rng(4), (40.0, 30.0)
    exact = Sides(FIT * PATIENTS, HOLDOUT * CONTROL, PATIENTS, CONTROL)
    for statistic, within in ((auroc_between, (-9.0, 9.0)), (rate_difference(11), (-9.0, 9.0))):
        truth = float(statistic(FIT, HOLDOUT))
        values = []
        for _ in range(100):
            fit, holdout = (
                part + s * rng.standard_normal(12) for part, s in zip((exact.fit, exact.holdout), sigma, strict=True)
            )
            noised = Sides(fit, holdout, PATIENTS, CONTROL, *sigma)
            values.append(find(noised, statistic, 0.0, rng, within=within).value)
        assert abs(np.mean(values) - truth) < 4 * np.std(values) / 10


def test_what_chance_gives_is_exceeded_as_often_as_it_says() -> None:
    """Both groups from one distribution: 5 % outside, and the groups' true difference is outside nearly always."""
    rng = np.random.default_rng(5)
    apart = []
    for fit in (HOLDOUT, FIT):
        found = [find(drawn(rng, fit, HOLDOUT, (8.0, 6.0)), auroc_between, 0.5, rng) for _ in range(100)]
        apart.append(sum(not each.chance_low <= each.value <= each.chance_high for each in found))
    assert apart[0] <= 14 and apart[1] >= 50  # 5 expected; more than 14 once in 10,000 times


def test_impossible_noise_does_not_make_an_interval_narrow() -> None:
    """A rate of nothing, noised to far below 0: its interval begins at 0 and is as wide as the noise says."""
    fit = np.array([2000.0, -60.0])
    found = find(
        Sides(fit, np.array([500.0, 0.0]), PATIENTS, CONTROL, 30.0, 30.0), rate_of(1), 0.0, np.random.default_rng(6)
    )
    assert found.value == found.low == 0 and found.high > 0.015
