from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from common.errors import DataError
from common.evaluation.attacks.scores import (
    ScoreCounts,
    auroc,
    calibrated_edges,
    histogram,
    mann_whitney,
    true_positives,
)

EDGES = (0.25, 0.5, 0.75)


def of(train: np.ndarray, control: np.ndarray, edges: tuple[float, ...] = EDGES) -> ScoreCounts:
    return histogram("membership_distance", "test", edges, train, control)


scores = st.lists(st.sampled_from([0.0, 0.2, 0.25, 0.3, 0.5, 0.74, 0.75, 1.0]), min_size=1, max_size=40).map(np.array)


@given(scores, scores)
def test_every_patient_falls_into_one_bin(train: np.ndarray, control: np.ndarray) -> None:
    found = of(train, control)
    assert sum(found.train) == train.size and sum(found.control) == control.size
    expected = [sum(1 for x in train if low <= x < high) for low, high in zip((-1, *EDGES), (*EDGES, 2), strict=True)]
    assert list(found.train) == expected


@given(scores, scores)
def test_auroc_is_sklearn_s_of_the_bins(train: np.ndarray, control: np.ndarray) -> None:
    bins = np.digitize(np.concatenate([train, control]), EDGES)
    member = np.repeat([1, 0], [train.size, control.size])
    found = auroc(of(train, control))
    assert found.value == pytest.approx(float(roc_auc_score(member, bins)))
    assert 0 <= found.low <= found.value <= found.high <= 1


@given(scores, scores)
def test_mann_whitney_is_what_scipy_computes(train: np.ndarray, control: np.ndarray) -> None:
    a, b = np.digitize(train, EDGES), np.digitize(control, EDGES)
    found = mann_whitney(of(train, control))
    if np.unique(np.concatenate([a, b])).size == 1:
        assert found == 1
    else:
        expected = stats.mannwhitneyu(a, b, alternative="greater", method="asymptotic", use_continuity=False)
        assert found == pytest.approx(float(expected.pvalue), abs=1e-12)


def test_the_interval_of_auroc_covers_what_it_promises() -> None:
    rng = np.random.default_rng(1)
    edges = tuple(np.linspace(-3, 4, 200).tolist())
    true = float(stats.norm.cdf(0.8 / np.sqrt(2)))
    trials = 500
    intervals = [auroc(of(rng.normal(0.8, 1, 80), rng.normal(0, 1, 60), edges)) for _ in range(trials)]
    covered = sum(i.low <= true <= i.high for i in intervals) / trials
    assert 0.91 <= covered <= 0.98


def test_perfect_separation_keeps_an_interval() -> None:
    found = auroc(ScoreCounts("a", "s", EDGES, (0, 0, 0, 30), (30, 0, 0, 0)))
    assert (found.value, found.high) == (1.0, 1.0)
    assert 0.8 < found.low < 0.99
    worst = auroc(ScoreCounts("a", "s", EDGES, (30, 0, 0, 0), (0, 0, 0, 30)))
    assert (worst.value, worst.low) == (0.0, 0.0)
    assert worst.high == pytest.approx(1 - found.low, abs=1e-6)


def test_true_positives_keep_the_false_positive_rate() -> None:
    found = true_positives(ScoreCounts("a", "s", EDGES, (10, 10, 30, 50), (50, 40, 6, 4)), 0.05)
    assert found.threshold == 0.75
    assert found.true_positive_rate is not None and found.true_positive_rate.value == 0.5
    assert found.false_positive_rate is not None and found.false_positive_rate.value == 0.04
    # Ten of a hundred above 0.5: (1 + 10)/101 is more than a tenth.
    assert true_positives(ScoreCounts("a", "s", EDGES, (10, 10, 30, 50), (50, 40, 6, 4)), 0.10).threshold == 0.75
    assert true_positives(ScoreCounts("a", "s", EDGES, (10, 10, 30, 50), (50, 41, 5, 4)), 0.10).threshold == 0.5


def test_no_bin_may_qualify() -> None:
    found = true_positives(ScoreCounts("a", "s", EDGES, (0, 0, 0, 50), (50, 0, 0, 50)), 0.05)
    assert found.possible and found.threshold is None
    assert found.true_positive_rate is not None and found.true_positive_rate.value == 0
    assert found.p_value == 1


def test_few_control_patients_cannot_show_a_small_rate() -> None:
    counts = ScoreCounts("a", "s", EDGES, (0, 0, 0, 50), (98, 0, 0, 0))
    assert not true_positives(counts, 0.01).possible
    assert true_positives(replace(counts, control=(99, 0, 0, 0)), 0.01).possible


@pytest.mark.parametrize("edges", [EDGES, tuple(np.linspace(0.01, 0.99, 99).tolist())])
def test_p_values_hold_where_nothing_leaks(edges: tuple[float, ...]) -> None:
    rng = np.random.default_rng(2)
    trials = 500
    small = {"mann_whitney": 0, "true_positives": 0}
    for _ in range(trials):
        counts = of(rng.random(150), rng.random(100), edges)
        p = true_positives(counts, 0.1).p_value
        assert p is not None
        small["true_positives"] += p <= 0.05
        small["mann_whitney"] += mann_whitney(counts) <= 0.05
    # 0.05 and 3 standard errors.
    assert all(hits / trials <= 0.08 for hits in small.values()), small


def test_p_values_are_small_where_members_score_higher() -> None:
    rng = np.random.default_rng(3)
    counts = of(rng.beta(8, 1, 300), rng.random(300), tuple(np.linspace(0.02, 0.98, 49).tolist()))
    p = true_positives(counts, 0.1).p_value
    assert p is not None and p < 1e-3
    assert mann_whitney(counts) < 1e-10


def test_histograms_of_the_same_bins_add_up() -> None:
    a, b = (ScoreCounts("a", "s", EDGES, (1, 2, 3, i), (4, 3, 2, i)) for i in (1, 5))
    assert a + b == sum([a, b]) == ScoreCounts("a", "s", EDGES, (2, 4, 6, 6), (8, 6, 4, 6))
    for other in (replace(b, attack="b"), replace(b, setting="t"), replace(b, edges=(0.2, 0.5, 0.75))):
        with pytest.raises(DataError, match="cannot be added"):
            _ = a + other


@pytest.mark.parametrize(
    ("edges", "train", "control"),
    [
        ((0.5, 0.25), (1, 1, 1), (1, 1, 1)),
        ((0.5, 0.5), (1, 1, 1), (1, 1, 1)),
        ((0.5,), (1, 1, 1), (1, 1)),
        ((0.5,), (1, -1), (1, 1)),
        ((0.5,), (1, 1), (0, 0)),
    ],
)
def test_impossible_histograms_are_refused(
    edges: tuple[float, ...], train: tuple[int, ...], control: tuple[int, ...]
) -> None:
    with pytest.raises(DataError):
        ScoreCounts("a", "s", edges, train, control)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50).map(np.array))
def test_bins_reach_from_end_to_end_whatever_they_are_calibrated_on(calibration: np.ndarray) -> None:
    edges = calibrated_edges(calibration)
    assert list(edges) == sorted(set(edges)) and edges[0] > 0 and edges[-1] < 1
    assert max(np.diff([0, *edges, 1])) <= 0.0201


def test_bins_lose_little_of_auroc() -> None:
    rng = np.random.default_rng(4)
    train, control = rng.normal(0.5, 0.02, 3000), rng.normal(0.49, 0.02, 3000)
    edges = calibrated_edges(rng.normal(0.5, 0.03, 1000))
    raw = roc_auc_score(np.repeat([1, 0], 3000), np.concatenate([train, control]))
    assert auroc(of(train, control, edges)).value == pytest.approx(float(raw), abs=0.003)
