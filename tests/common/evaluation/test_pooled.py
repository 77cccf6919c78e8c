"""What pooled counts say: against scikit-learn, against exact tables, and what noise does to the intervals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from common.evaluation.counts import CountPlan, CountTable
from common.evaluation.pooled import PooledCounts, auroc, auroc_of, calibration, distance, pool, repaired, share

KEY = ("utility", "m", "1")


def pooled(table: np.ndarray, deviation: float = 0.0) -> PooledCounts:
    return PooledCounts({KEY: table}, {KEY: deviation}, {KEY: int(table.sum())}, {KEY: 1})


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=4, max_size=80))
def test_auroc_of_a_table_is_that_of_its_binned_scores(rows: list[tuple[int, bool]]) -> None:
    bins, outcomes = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    table = np.zeros((6, 3))
    np.add.at(table, (bins, outcomes.astype(int)), 1)
    if outcomes.all() or not outcomes.any():
        assert auroc_of(table) is None
    else:
        assert auroc_of(table) == pytest.approx(roc_auc_score(outcomes, bins))


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=12), st.floats(1, 100))
def test_repaired_counts_are_the_nearest_ones(counts: list[float], total: float) -> None:
    found = repaired(np.array(counts), total)
    assert found.min() >= 0 and found.sum() == pytest.approx(total)
    # The projection onto a convex set: the residual makes no acute angle with any other point of it.
    residual = np.array(counts) - found
    for corner in total * np.eye(len(counts)):
        assert residual @ (corner - found) <= 1e-6 * (1 + abs(residual).max() * total)


def test_intervals_cover_the_truth_and_widen_with_noise() -> None:
    rng = np.random.default_rng(5)
    truth = np.outer(np.ones(6), [60.0, 0.0, 5.0]) + np.column_stack(
        [np.zeros(6), np.linspace(10, 110, 6), np.zeros(6)]
    )
    exact = auroc_of(truth)
    assert exact is not None
    widths = []
    for sigma in (0.0, 12.0):
        covered, width = 0, 0.0
        for _ in range(60):
            sample = rng.multinomial(int(truth.sum()), truth.ravel() / truth.sum()).reshape(truth.shape).astype(float)
            sample += sigma * rng.standard_normal(truth.shape)
            found = auroc(PooledCounts({KEY: sample}, {KEY: sigma}, {KEY: int(truth.sum())}, {KEY: 1}), KEY, rng)
            assert found.low is not None and found.high is not None
            covered += found.low <= exact <= found.high
            width += found.high - found.low
        widths.append(width)
        assert covered >= 48  # 57 expected; fewer than 48 happens less than once in 10,000
    assert widths[1] > 1.5 * widths[0]


def test_a_distance_under_chance_says_nothing_and_a_large_one_is_above() -> None:
    rng = np.random.default_rng(6)
    cohort = np.array([400.0, 300.0, 300.0])
    same, other = np.array([200.0, 150.0, 150.0]), np.array([50.0, 225.0, 225.0])
    for table, above in ((same, False), (other, True)):
        for sigma in (0.0, 8.0):
            found = distance(pooled(table, sigma), KEY, cohort, rng)
            assert found.value is not None and found.chance is not None
            assert (found.value > found.chance) is above


def test_calibration_counts_known_outcomes_only() -> None:
    table = np.array([[30.0, 10.0, 60.0], [5.0, 15.0, 0.0]])
    assert calibration(pooled(table), KEY) == [(40.0, 0.25), (20.0, 0.75)]


def test_share_is_among_the_named_cells() -> None:
    found = share(pooled(np.array([30.0, 10.0, 60.0])), KEY, 1, (0, 1), np.random.default_rng(0))
    assert found.value == pytest.approx(0.25) and found.low is not None and found.low < 0.25


def test_sites_add_up_and_a_site_with_hidden_cells_is_left_out() -> None:
    plan = CountPlan((CountTable(("a",), "everyone", (2,), 1.0), CountTable(("b",), "holdout", (2,), 1.0)))
    answers = {"x": np.array([1.0, 2.0, 3.0, 4.0]), "y": np.array([10.0, 20.0, np.nan, np.nan])}
    people = {"x": {"everyone": 3, "holdout": 7}, "y": {"everyone": 30, "holdout": 9}}
    found = pool(plan, answers, people, plan.deviations(1.0))
    assert found.counts["a",].tolist() == [11.0, 22.0] and found.counts["b",].tolist() == [3.0, 4.0]
    assert (found.patients["a",], found.patients["b",], found.sites["b",]) == (33, 7, 1)
    assert found.deviation["a",] == pytest.approx(np.sqrt(2) * found.deviation["b",])


def test_nothing_is_estimated_from_nobody() -> None:
    empty = PooledCounts({KEY: np.zeros((3, 3))}, {KEY: 0.0}, {KEY: 0}, {KEY: 0})
    rng = np.random.default_rng(0)
    assert auroc(empty, KEY, rng).value is None
    assert distance(empty, KEY, np.ones((3, 3)), rng).value is None
