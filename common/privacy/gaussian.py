"""The analytic Gaussian mechanism (Balle, Wang 2018, Theorem 8): δ, ε and noise from one exact formula.

Units: ν is the noise multiplier in replace units, noise standard deviation over the largest L2 shift that replacing one
patient causes. For a shift of 1 and noise ν,
δ(ε) = Φ(1/(2ν) − εν) − e^ε Φ(−1/(2ν) − εν).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Below this multiplier ε exceeds 1/(2ν²) = 500,000: calling it infinite loses no statement, and no search diverges.
SMALLEST_MULTIPLIER = 1e-3
# dp_accounting's searches stop within 1e-12 (absolute) on either side; results are moved by more than that.
_SEARCH_SLACK = 1e-11
# Larger than what `_SEARCH_SLACK` adds to ε, so that a calibrated ν keeps its target when it is accounted.
_CALIBRATION_SLACK = 1e-8


def gaussian_delta(epsilon: ArrayLike, noise_multiplier: float) -> NDArray[np.float64]:
    """δ(ε, ν): the hockey-stick divergence at e^ε of two unit-variance normals 1/ν apart, for any real ε.

    `noise_multiplier` is ν in replace units, positive. Computed in logarithms, so small values keep their digits.
    """
    from scipy.special import log_ndtr  # as in conventions.py: where it is needed

    eps = np.asarray(epsilon, dtype=np.float64)
    half = 0.5 / noise_multiplier
    upper = log_ndtr(half - eps * noise_multiplier)
    lower = log_ndtr(-half - eps * noise_multiplier)
    return np.exp(upper) * -np.expm1(np.minimum(eps + lower - upper, 0.0))


def gaussian_epsilon(delta: float, noise_multiplier: float) -> float:
    """ε(δ, ν), rounded up: infinity for δ ≤ 0 or ν below `SMALLEST_MULTIPLIER`. ν in replace units."""
    _check(noise_multiplier)
    if delta >= 1:
        return 0.0
    if delta <= 0 or noise_multiplier < SMALLEST_MULTIPLIER:
        return math.inf
    from dp_accounting import get_epsilon_gaussian

    epsilon = float(get_epsilon_gaussian(noise_multiplier, delta))
    return 0.0 if epsilon == 0 else epsilon * (1 + _SEARCH_SLACK) + _SEARCH_SLACK


def gaussian_noise_multiplier(epsilon: float, delta: float) -> float:
    """The smallest ν in replace units, rounded up, for which one release is (ε, δ)-DP; `ValueError` if none is."""
    if not (epsilon > 0 and 0 < delta < 1):
        raise ValueError(f"calibration needs epsilon > 0 and 0 < delta < 1, got {epsilon!r} and {delta!r}")
    from dp_accounting import get_sigma_gaussian

    return max(float(get_sigma_gaussian(epsilon, delta)) * (1 + _CALIBRATION_SLACK), SMALLEST_MULTIPLIER)


def composed_noise_multiplier(multipliers: Iterable[tuple[float, int]]) -> float:
    """ν of a composition, 1/ν² = Σ count/νᵢ², also when later releases depend on earlier ones; infinity for none.

    Gaussian mechanisms compose exactly (Dong, Roth, Su 2022, Corollary 3.3). Replace units.
    """
    terms = []
    for multiplier, count in multipliers:
        _check(multiplier)
        if multiplier == 0:
            return 0.0
        terms.append(count / multiplier / multiplier if multiplier > 1e-150 else math.inf)
    total = math.fsum(terms)
    return math.inf if total == 0 else 1.0 / math.sqrt(total)


def _check(noise_multiplier: float) -> None:
    if not noise_multiplier >= 0:
        raise ValueError(f"a noise multiplier is a number, at least 0, got {noise_multiplier!r}")
