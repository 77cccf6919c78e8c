"""The least noise multiplier that reaches a target ε, on a ladder of fixed rungs, with few evaluations.

A rung is 10^(k/2000): neighbours differ by 0.12 %, far less than what any choice of batch, clip or radius changes, and
a result cannot depend on the last digits of a Fourier transform.
"""

from __future__ import annotations

import math
from collections.abc import Callable

RUNGS = 2000
LOWEST, HIGHEST = -RUNGS, 5 * RUNGS
SMALLEST_MULTIPLIER, LARGEST_MULTIPLIER = 10.0 ** (LOWEST / RUNGS), 10.0 ** (HIGHEST / RUNGS)
_MOST_INTERPOLATIONS = 12


def multiplier_at(rung: int) -> float:
    """The noise multiplier of a rung."""
    return 10.0 ** (rung / RUNGS)


def nearest_rung(multiplier: float) -> int:
    """The rung nearest to a multiplier, inside the ladder."""
    return min(max(round(RUNGS * math.log10(max(multiplier, 1e-300))), LOWEST), HIGHEST - 1)


def least_multiplier(epsilon_of: Callable[[float], float], epsilon: float, guess: float, slope: float) -> float | None:
    """The lowest rung whose ε is at most `epsilon`; None if even the highest one's, 10^5, is above it.

    `epsilon_of` falls with the multiplier. `guess` and `slope` (about -d log ε / d log multiplier) only decide how many
    evaluations it takes; both may be poor.
    """

    def excess(rung: int) -> float:
        """log(ε / target), at most 0 where the noise suffices."""
        return math.log(max(epsilon_of(multiplier_at(rung)), 1e-300) / epsilon)

    # Invariant: `high` suffices and `low` does not, the ends of the ladder by assumption, checked at the end.
    low, high = LOWEST - 1, HIGHEST
    at_low = at_high = math.nan
    rung = nearest_rung(guess)
    evaluations = 0
    while high - low > 1:
        value = excess(rung)
        evaluations += 1
        if value <= 0:
            high, at_high = rung, value
        else:
            low, at_low = rung, value
        if evaluations > _MOST_INTERPOLATIONS or math.isinf(value):
            rung = (low + high) // 2
        elif math.isnan(at_low) or math.isnan(at_high):
            # Only one side is known: go to where the slope leads, and a little beyond unless it is near.
            step = value * RUNGS / math.log(10) / slope
            beyond = 1.1 * step + math.copysign(1, step) if abs(step) > 2 else step
            rung += math.ceil(beyond) if step > 0 else min(math.floor(beyond), -1)
        else:
            rung = low + math.ceil((high - low) * at_low / (at_low - at_high))
        rung = min(max(rung, low + 1), high - 1)
    if high == HIGHEST and excess(high) > 0:
        return None
    return multiplier_at(high)
