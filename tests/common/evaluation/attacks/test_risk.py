from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from common.evaluation.attacks.counts import AttackCounts
from common.evaluation.attacks.risk import difference, excess, fisher, risk, wilson


def counts(
    successes: int, guesses: int, control_successes: int, control_guesses: int, baseline: int = 0
) -> AttackCounts:
    return AttackCounts(
        "linkability", None, guesses, successes, control_guesses, control_successes, guesses, baseline, "k=1"
    )


pairs = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(pairs, st.sampled_from([0.9, 0.95, 0.999]))
def test_wilson_is_what_scipy_computes(pair: tuple[int, int], confidence: float) -> None:
    found = wilson(*pair, confidence)
    expected: Any = stats.binomtest(*pair).proportion_ci(confidence, method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert found.low <= found.value <= found.high


@given(pairs, pairs)
def test_fisher_is_what_scipy_computes(a: tuple[int, int], b: tuple[int, int]) -> None:
    table = [[a[0], a[1] - a[0]], [b[0], b[1] - b[0]]]
    expected: Any = stats.fisher_exact(table, alternative="greater")
    assert fisher(counts(*a, *b)) == pytest.approx(float(expected.pvalue), rel=1e-6, abs=1e-12)


def test_difference_is_newcombe_s_published_example() -> None:
    found = difference(counts(56, 70, 48, 80))
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


@given(pairs, pairs)
def test_excess_is_propagated_from_the_wilson_intervals(a: tuple[int, int], b: tuple[int, int]) -> None:
    found = excess(counts(*a, *b))
    if b[0] == b[1]:
        assert found is None
        return
    assert found is not None
    (m, dm), (c, dc) = (
        ((i.low + i.high) / 2, (i.high - i.low) / 2)
        for i in (stats.binomtest(*pair).proportion_ci(0.95, method="wilson") for pair in (a, b))
    )
    assert found.value == pytest.approx((m - c) / (1 - c), abs=1e-9)
    # The derivatives by finite differences instead of by formula.
    h = 1e-6
    slopes = [
        ((m + h - c) / (1 - c) - (m - h - c) / (1 - c)) / (2 * h),
        ((m - c - h) / (1 - c - h) - (m - c + h) / (1 - c + h)) / (2 * h),
    ]
    half = np.hypot(slopes[0] * dm, slopes[1] * dc)
    assert found.low == pytest.approx(found.value - half, rel=1e-4)
    assert found.high == pytest.approx(min(1, found.value + half), rel=1e-4)


def test_intervals_cover_what_they_promise() -> None:
    rng = np.random.default_rng(1)
    p, q, trials = 0.30, 0.22, 2000
    drawn = zip(rng.binomial(400, p, trials).tolist(), rng.binomial(200, q, trials).tolist(), strict=True)
    covered = {"difference": 0, "excess": 0}
    for a, b in drawn:
        c = counts(a, 400, b, 200)
        gap, more = difference(c), excess(c)
        assert more is not None
        covered["difference"] += gap.low <= p - q <= gap.high
        covered["excess"] += more.low <= (p - q) / (1 - q) <= more.high
    # 0.95 ± 4 standard errors.
    assert all(0.93 <= hits / trials <= 0.97 for hits in covered.values()), covered


def test_a_leak_is_called_a_leak() -> None:
    found = risk(counts(60, 1000, 10, 1000, baseline=5))
    assert found.p_value is not None and found.p_value < 1e-6
    assert not found.weaker_than_baseline
    assert found.excess is not None and found.excess.low > 0
    assert "learned from were attacked more successfully" in found.reading


def test_an_attack_below_the_baseline_says_nothing() -> None:
    found = risk(counts(10, 1000, 10, 1000, baseline=40))
    assert found.weaker_than_baseline
    assert "says nothing about privacy" in found.reading
    # A difference between train and control counts whatever the baseline does.
    assert "attacked more successfully" in risk(counts(60, 1000, 10, 1000, baseline=100)).reading


def test_no_difference_is_reported_with_what_may_have_gone_unnoticed() -> None:
    found = risk(counts(100, 1000, 100, 1000, baseline=10))
    assert f"{found.difference.high:.2%}" in found.reading
    assert "privacy" not in found.reading.replace("no evidence of privacy", "")


def test_a_control_that_always_succeeds_leaves_no_excess() -> None:
    found = risk(counts(40, 40, 40, 40, baseline=10))
    assert found.excess is None
    assert found.p_value == 1


def test_predicates_have_no_exact_test() -> None:
    found = risk(replace(counts(600, 1000, 100, 1000), attack="singling_out_multivariate"))
    assert found.p_value is None
    assert "too narrow" in found.reading


def test_finding_no_copy_is_no_failed_attack() -> None:
    found = risk(replace(counts(0, 1000, 0, 1000), attack="copies_exact"))
    assert found.reading.startswith("No copy was found")


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, float("nan")])
def test_a_confidence_that_is_none_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence"):
        wilson(1, 2, confidence)
