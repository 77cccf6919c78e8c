import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.evaluation.audit import (
    audit_scores,
    declared_guesses,
    epsilon_bound,
    p_value,
    strongest,
)

STRICT = 0.001  # 99.9 %, so that a tight mechanism does not fail one run in twenty


@st.composite
def counts(draw: st.DrawFn, most: int = 300) -> tuple[int, int, int]:
    """Slots, guesses and right guesses of a possible audit."""
    slots = draw(st.integers(1, most))
    guesses = draw(st.integers(1, slots))
    return slots, guesses, draw(st.integers(0, guesses))


def exact_p_value(slots: int, guesses: int, correct: int, odds: Fraction, delta: Fraction) -> Fraction:
    """The theorem in rational numbers, term by term; e^ε = odds."""
    accuracy = odds / (1 + odds)
    mass = {
        w: math.comb(guesses, w) * accuracy**w * (1 - accuracy) ** (guesses - w) if 0 <= w <= guesses else Fraction(0)
        for w in range(-slots, guesses + 1)
    }
    beta = sum((mass[w] for w in range(correct, guesses + 1)), Fraction(0))
    alpha = max(
        sum((mass[w] for w in range(correct - i, correct)), Fraction(0)) / i
        for i in range(1, slots + 1)
        if correct - i >= -slots
    )
    return min(Fraction(1), beta + 2 * slots * delta * alpha)


@pytest.mark.parametrize(("canaries", "largest"), [(100, 3.49), (1000, 5.81)])
def test_the_largest_value_that_canaries_can_show(canaries: int, largest: float) -> None:
    bound = epsilon_bound(canaries, canaries, canaries)
    assert bound.epsilon == bound.reachable == pytest.approx(largest, abs=0.005)
    accuracy = 0.05 ** (1 / canaries)  # all right with probability 5 %
    assert bound.epsilon == pytest.approx(math.log(accuracy / (1 - accuracy)), rel=1e-6)
    assert epsilon_bound(canaries, canaries, canaries - 1).epsilon < bound.epsilon
    assert epsilon_bound(canaries, canaries, canaries - 1).reachable == bound.reachable


@settings(max_examples=60, deadline=None)
@given(counts(40), st.integers(1, 60), st.integers(1, 20), st.integers(0, 80))
def test_the_p_value_is_the_theorem_in_exact_arithmetic(
    audit: tuple[int, int, int], numerator: int, denominator: int, thousandths: int
) -> None:
    slots, guesses, correct = audit
    odds = max(Fraction(1), Fraction(numerator, denominator))
    delta = Fraction(thousandths, 1000) / (2 * slots * 80) * 1000  # 2 m δ from 0 to 1
    ours = p_value(slots, guesses, correct, math.log(odds), float(delta))
    assert ours == pytest.approx(float(exact_p_value(slots, guesses, correct, odds, delta)), rel=1e-9, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(counts(), st.sampled_from([0.0, 1e-5, 1e-3]), st.sampled_from([0.05, 0.01, STRICT]))
def test_the_bound_is_where_a_scan_of_the_p_value_crosses_the_level(
    audit: tuple[int, int, int], delta: float, level: float
) -> None:
    slots, guesses, correct = audit
    bound = epsilon_bound(slots, guesses, correct, delta=delta, level=level).epsilon
    grid = np.linspace(0.0, 12.0, 601)
    refuted = np.array([p_value(slots, guesses, correct, float(e), delta) < level for e in grid])
    crossing = int(refuted.argmin())
    assert not refuted[crossing:].any()  # an interval: what is refuted for one ε is refuted for every smaller one
    if crossing == 0:
        assert bound == 0.0
    else:
        assert grid[crossing - 1] <= bound <= grid[crossing]


@settings(max_examples=60, deadline=None)
@given(counts(), st.sampled_from([0.0, 1e-5, 1e-3]))
def test_more_right_guesses_never_show_less(audit: tuple[int, int, int], delta: float) -> None:
    slots, guesses, correct = audit
    bound = epsilon_bound(slots, guesses, correct, delta=delta)
    assert 0 <= bound.epsilon <= bound.reachable
    if correct < guesses:
        assert bound.epsilon <= epsilon_bound(slots, guesses, correct + 1, delta=delta).epsilon
    stricter = epsilon_bound(slots, guesses, correct, delta=delta, level=STRICT)
    more_delta = epsilon_bound(slots, guesses, correct, delta=delta + 1e-4)
    assert stricter.epsilon <= bound.epsilon and more_delta.epsilon <= bound.epsilon


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0, 3.0, 6.0])
@pytest.mark.parametrize(("slots", "guesses"), [(50, 50), (200, 40), (400, 400)])
@pytest.mark.parametrize("level", [0.05, STRICT])
def test_randomised_response_is_overestimated_no_more_often_than_the_level(
    epsilon: float, slots: int, guesses: int, level: float
) -> None:
    """Every guess right with probability e^ε / (1 + e^ε): the tightest ε-DP mechanism. No simulation: the exact sum."""
    wrong = [epsilon_bound(slots, guesses, v, level=level).epsilon > epsilon for v in range(guesses + 1)]
    probability = stats.binom.pmf(np.arange(guesses + 1), guesses, 1 / (1 + math.exp(-epsilon)))[wrong].sum()
    assert probability <= level
    if guesses == 400 and 0 < epsilon <= 3 and level == 0.05:
        # and the bound is no idle 0: its median is not far below the truth
        median = int(stats.binom.ppf(0.5, guesses, 1 / (1 + math.exp(-epsilon))))
        assert epsilon_bound(slots, guesses, median, level=level).epsilon > 0.8 * epsilon - 0.15


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 1e-3), (1.0, 4e-4), (2.0, 1e-4)])
def test_a_mechanism_that_needs_its_delta_is_covered_by_the_delta_term(epsilon: float, delta: float) -> None:
    """With probability δ it tells all coins, else it answers like randomised response: (ε, δ)-DP.

    At level δ the pure bound is wrong too often, the bound with the term is not.
    """
    slots, level = 100, delta
    accuracy = 1 / (1 + math.exp(-epsilon))
    mass = (1 - delta) * stats.binom.pmf(np.arange(slots + 1), slots, accuracy)
    mass[slots] += delta

    def failure(assumed: float) -> float:
        bounds = [epsilon_bound(slots, slots, v, delta=assumed, level=level).epsilon for v in range(slots + 1)]
        return float(mass[[bound > epsilon for bound in bounds]].sum())

    assert failure(delta) <= level < failure(0.0)


def test_simulated_randomised_response_through_scores_and_several_numbers_of_guesses() -> None:
    """An attacker who is surer of some slots than of others, against one ε for all of them."""
    random, epsilon, slots, wrong = np.random.default_rng(0), 1.0, 120, 0
    for _ in range(400):
        coins = 2 * random.integers(0, 2, slots) - 1
        own = random.uniform(0, epsilon, slots)  # slot i answers with its own ε_i <= ε, which the attacker knows
        truthful = random.random(slots) < 1 / (1 + np.exp(-own))
        bounds = audit_scores(np.where(truthful, coins, -coins) * own, coins, declared_guesses(slots), level=0.05)
        wrong += strongest(bounds).epsilon > epsilon
    assert wrong <= stats.binom.ppf(1 - 1e-6, 400, 0.05)


def test_guesses_are_the_surest_slots_and_share_the_level() -> None:
    coins = np.array([1, -1, 1, -1, 1])
    scores = np.array([0.1, -5.0, 3.0, 2.0, 0.0])  # the third surest, of slot 3, is wrong
    found = audit_scores(scores, coins, (5, 3, 2), level=0.06)
    assert [(bound.slots, bound.guesses, bound.correct) for bound in found] == [(5, 5, 4), (5, 3, 2), (5, 2, 2)]
    assert {bound.level for bound in found} == {0.02}
    assert found[0] == epsilon_bound(5, 5, 4, level=0.02)


def test_the_strongest_bound_is_the_largest_and_else_the_one_that_could_say_most() -> None:
    bounds = [epsilon_bound(100, 100, 60), epsilon_bound(100, 20, 20), epsilon_bound(100, 50, 30)]
    assert strongest(bounds).guesses == 20
    nothing = [epsilon_bound(100, 20, 5), epsilon_bound(100, 100, 40)]
    assert strongest(nothing).guesses == 100 and strongest(nothing).epsilon == 0.0


@pytest.mark.parametrize("slots", [10, 11, 200])
def test_the_declared_numbers_of_guesses(slots: int) -> None:
    found = declared_guesses(slots)
    assert found[0] == slots and len(set(found)) == 3 and all(1 <= number <= slots for number in found)


@pytest.mark.parametrize(
    ("slots", "guesses", "correct", "delta", "level"),
    [
        pytest.param(10, 11, 5, 0.0, 0.05, id="more guesses than slots"),
        pytest.param(10, 5, 6, 0.0, 0.05, id="more right than guessed"),
        pytest.param(10, 0, 0, 0.0, 0.05, id="no guess"),
        pytest.param(10, 5, -1, 0.0, 0.05, id="negative"),
        pytest.param(10, 5, 5, 0.06, 0.05, id="2 m delta above 1"),
        pytest.param(10, 5, 5, 0.0, 1.0, id="level of 1"),
    ],
)
def test_numbers_that_belong_to_no_audit_are_refused(
    slots: int, guesses: int, correct: int, delta: float, level: float
) -> None:
    with pytest.raises(ValueError, match=r"expected|delta|level"):
        epsilon_bound(slots, guesses, correct, delta=delta, level=level)


@pytest.mark.parametrize(
    ("scores", "coins", "guesses"),
    [
        ([1.0, 2.0], [1, 0], (2,)),
        ([1.0, 2.0], [1], (1,)),
        ([1.0, math.nan], [1, -1], (2,)),
        ([1.0, 2.0], [1, -1], ()),
        ([1.0, 2.0], [1, -1], (2, 2)),
        ([1.0, 2.0], [1, -1], (3,)),
    ],
)
def test_scores_that_belong_to_no_audit_are_refused(
    scores: list[float], coins: list[int], guesses: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"score|guesses"):
        audit_scores(np.array(scores), np.array(coins), guesses)
