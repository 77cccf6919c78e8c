"""A lower bound on ε from one run: Steinke, Nasr, Jagielski 2023, arXiv:2305.08846, in its replace-one form.

**Game.** m slots of one site are fixed before data are read. Slot i holds row c_i if a fair coin S_i is +1 and row c_i'
if it is -1; both rows are known, the coins are independent and nobody sees them. The mechanism runs once. An attacker
sees what his adversary sees, and says +1, -1 or 0 (abstains) of every slot: r guesses, v of them correct.

**Theorem** (theirs, 5.2). If S ↦ output is (ε, δ)-DP in every single coin, then P[v or more correct] ≤ β + 2 m δ α,
β = P[W ≥ v], α = max over 1 ≤ i ≤ m of P[v > W ≥ v - i] / i, W ~ Binomial(r, e^ε / (e^ε + 1)).

**Why the paired form obeys the same bound.** Theirs includes a row or leaves it out; the proof only uses that changing
one coin changes the input to a neighbour. Here changing coin i replaces the content of slot i and nothing else, which
is exactly the neighbouring relation of this product (replace one patient slot; the number of patients stays). So for a
mechanism that is (ε, δ)-DP under replace-one, S ↦ output is (ε, δ)-DP in every coin, and the theorem applies as it is.
For δ = 0 in full: fix the output t and the coins before i. By Bayes with fair coins, and with sums over the coins s
behind i, P[S_i = 1 | t, S_<i] / P[S_i = -1 | t, S_<i] = Σ P[t | S_<i, 1, s] / Σ P[t | S_<i, -1, s]. Every pair of terms
has a ratio in [e^-ε, e^ε], and so has the quotient of the sums. A guess, being a function of t, is thus correct with
probability at most e^ε / (e^ε + 1) whatever the coins before it were, and v is stochastically at most W.
A bound under replace-one must not be compared with an ε of add-or-remove, and the other way round.

Whatever the attacker's guesses are, they must be a function of the output and the two rows of every slot, not of the
coins. r is declared, or chosen among a few declared numbers with the level divided by how many there are.

No lower bound is evidence of privacy: a poor attack gives 0 for a mechanism that publishes its input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

CONFIDENCE = 0.95
LARGEST = 700.0  # e^ε would overflow beyond it; no number of slots reaches it
TOLERANCE = 1e-10


@dataclass(frozen=True)
class Bound:
    """What r guesses on m slots refute: the mechanism is not (ε', δ)-DP for any ε' below `epsilon`.

    `level` is the probability of being wrong that the bound allows itself; `reachable` is what `epsilon` would have
    been with every guess right: the largest value this test could have given.
    """

    slots: int
    guesses: int
    correct: int
    delta: float
    level: float
    epsilon: float
    reachable: float


def p_value(slots: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """β + 2 m δ α: at most this probability of `correct` or more right guesses under (epsilon, delta)-DP.

    `ValueError` for numbers that belong to no audit, among them 2 m δ > 1: up to there every term of α's maximum is an
    increasing function of ε together with β (its derivative is r b(v-1) (1 - 2mδ/i) + r b(v-i-1) 2mδ/i ≥ 0, where b are
    probabilities of Binomial(r - 1, ·)), so that the refuted ε are an interval.
    """
    _check(slots, guesses, correct, delta)
    if not 0 <= epsilon <= LARGEST:
        raise ValueError(f"epsilon must lie in [0, {LARGEST:g}], not {epsilon!r}")
    if correct == 0:
        return 1.0
    accuracy = float(special.expit(epsilon))
    beta = float(special.bdtrc(correct - 1, guesses, accuracy))  # P[W > correct - 1]
    if delta == 0:
        return beta
    # W < 0 never happens, so no i beyond v adds probability, and dividing by it only makes the term smaller.
    below = np.cumsum(stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, accuracy))
    alpha = float(np.max(below / np.arange(1, correct + 1)))
    return min(1.0, beta + 2.0 * slots * delta * alpha)


def epsilon_bound(
    slots: int, guesses: int, correct: int, *, delta: float = 0.0, level: float = 1.0 - CONFIDENCE
) -> Bound:
    """The largest ε that `correct` of `guesses` refute at `level`, 0 if none; `ValueError` as `p_value`."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), not {level!r}")
    return Bound(
        slots,
        guesses,
        correct,
        delta,
        level,
        _refuted(slots, guesses, correct, delta, level),
        _refuted(slots, guesses, guesses, delta, level),
    )


def _refuted(slots: int, guesses: int, correct: int, delta: float, level: float) -> float:
    if p_value(slots, guesses, correct, 0.0, delta) >= level:
        return 0.0
    low, high = 0.0, 1.0
    while p_value(slots, guesses, correct, high, delta) < level:
        low, high = high, 2.0 * high
    while high - low > TOLERANCE * high:
        middle = (low + high) / 2.0
        if p_value(slots, guesses, correct, middle, delta) < level:
            low = middle
        else:
            high = middle
    return low


def audit_scores(
    scores: np.ndarray,
    coins: np.ndarray,
    guesses: Sequence[int],
    *,
    delta: float = 0.0,
    level: float = 1.0 - CONFIDENCE,
) -> tuple[Bound, ...]:
    """One bound for every declared number of guesses; together they are wrong with probability at most `level`.

    `scores` (m,) are an attacker's: positive where he believes in c_i, large where he is sure; `coins` (m,) are +1 or
    -1. With r guesses he speaks of the r slots with the largest |score|, of equal ones the first, and says +1 of a
    score of 0. Each bound has `level` / len(guesses) (Bonferroni).
    """
    if scores.shape != coins.shape or scores.ndim != 1 or not np.isin(coins, (-1, 1)).all():
        raise ValueError("scores and coins must be vectors of equal length, coins of +1 and -1")
    if np.isnan(scores).any():
        raise ValueError("a score is not a number")
    if not guesses or len(set(guesses)) != len(guesses):
        raise ValueError(f"declare one or more different numbers of guesses (found {list(guesses)})")
    right = (np.where(scores >= 0, 1, -1) == coins)[np.argsort(-np.abs(scores), kind="stable")]
    share = level / len(guesses)
    return tuple(
        epsilon_bound(len(coins), number, int(right[:number].sum()), delta=delta, level=share) for number in guesses
    )


def strongest(bounds: Sequence[Bound]) -> Bound:
    """The bound to print of several that hold together: the largest ε; of equal ones the one that could reach most."""
    return max(bounds, key=lambda bound: (bound.epsilon, bound.reachable))


def declared_guesses(slots: int) -> tuple[int, ...]:
    """All slots, half and a fifth of them: numbers of guesses that depend on nothing that the run shows."""
    return tuple(sorted({slots, math.ceil(slots / 2), math.ceil(slots / 5)}, reverse=True))


def _check(slots: int, guesses: int, correct: int, delta: float) -> None:
    if not 0 <= correct <= guesses <= slots or guesses < 1:
        raise ValueError(f"expected correct <= guesses <= slots and one guess, found {correct}, {guesses}, {slots}")
    if not 0 <= delta < 1 or 2 * slots * delta > 1:
        raise ValueError(f"delta = {delta!r} is too large for {slots} slots: 2 m delta must not exceed 1")
