import math

import numpy as np
import pytest
from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from common.privacy.gaussian import (
    SMALLEST_MULTIPLIER,
    composed_noise_multiplier,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_noise_multiplier,
)

multipliers = st.floats(0.05, 50)
epsilons = st.floats(0.01, 20)
deltas = st.floats(1e-12, 0.1)


@pytest.mark.parametrize(("epsilon", "expected"), [(1, 3.7306), (3, 1.3906), (10, 0.4999)])
def test_calibration_to_the_digits_of_the_design(epsilon: float, expected: float) -> None:
    assert gaussian_noise_multiplier(epsilon, 1e-5) == pytest.approx(expected, abs=5e-5)


def test_exact_epsilon_to_the_digits_of_the_design() -> None:
    assert gaussian_epsilon(1e-5, 1.0) == pytest.approx(4.3772, abs=5e-5)


@pytest.mark.parametrize(("epsilon", "noise"), [(10, 6.3), (3, 17.6), (1, 47)])
def test_update_noise_for_forty_rounds(epsilon: float, noise: float) -> None:
    # ν = z/2 a round, and forty rounds divide it by √40.
    z = 2 * math.sqrt(40) * gaussian_noise_multiplier(epsilon, 1e-5)
    assert z == pytest.approx(noise, rel=0.01)


def test_update_noise_of_one_is_useless() -> None:
    assert gaussian_epsilon(1e-5, 0.5) == pytest.approx(10, abs=0.01)
    assert gaussian_epsilon(1e-5, composed_noise_multiplier([(0.5, 40)])) == pytest.approx(133, abs=0.5)


@pytest.mark.parametrize("noise", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("epsilon", [-1.5, 0.0, 0.7, 3.0])
def test_delta_equals_the_integral_of_its_definition(noise: float, epsilon: float) -> None:
    def positive_part(x: float) -> float:
        return max(float(stats.norm.pdf(x, 1, noise)) - math.exp(epsilon) * float(stats.norm.pdf(x, 0, noise)), 0.0)

    kink = 0.5 + epsilon * noise**2
    span = 12 * noise + abs(kink) + 1
    expected = integrate.quad(positive_part, -span, span, points=[kink], limit=400)[0]
    assert float(gaussian_delta(epsilon, noise)) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@given(multipliers, epsilons)
@settings(deadline=None)
def test_delta_equals_dp_accountings(noise: float, epsilon: float) -> None:
    expected = GaussianPrivacyLoss(noise).get_delta_for_epsilon(epsilon)
    assert float(gaussian_delta(epsilon, noise)) == pytest.approx(expected, rel=1e-6, abs=1e-14)


@given(multipliers, deltas)
@settings(deadline=None)
def test_epsilon_is_sufficient_and_tight(noise: float, delta: float) -> None:
    epsilon = gaussian_epsilon(delta, noise)
    assert float(gaussian_delta(epsilon, noise)) <= delta
    if epsilon > 1e-6:
        assert float(gaussian_delta(epsilon * (1 - 1e-6), noise)) >= delta


@given(epsilons, deltas)
@settings(deadline=None)
def test_calibrated_noise_is_sufficient_and_tight(epsilon: float, delta: float) -> None:
    noise = gaussian_noise_multiplier(epsilon, delta)
    assert gaussian_epsilon(delta, noise) <= epsilon
    assert gaussian_epsilon(delta, noise * 0.999) > epsilon


@given(multipliers, multipliers, deltas, deltas)
@settings(deadline=None)
def test_monotone(first: float, second: float, delta: float, other: float) -> None:
    less, more = sorted((first, second))
    assert gaussian_epsilon(delta, less) >= gaussian_epsilon(delta, more)
    small, large = sorted((delta, other))
    assert gaussian_epsilon(small, less) >= gaussian_epsilon(large, less)
    assert np.all(np.diff(gaussian_delta(np.linspace(-3, 30, 200), less)) <= 1e-15)


@given(st.lists(st.tuples(st.floats(0.1, 10), st.integers(1, 50)), min_size=1, max_size=6))
def test_composition_adds_inverse_squares(parts: list[tuple[float, int]]) -> None:
    expected = sum(count / noise**2 for noise, count in parts) ** -0.5
    assert composed_noise_multiplier(parts) == pytest.approx(expected)
    assert composed_noise_multiplier(parts[::-1]) == composed_noise_multiplier(parts)


def test_limits() -> None:
    assert gaussian_epsilon(1e-5, 0.0) == gaussian_epsilon(1e-5, SMALLEST_MULTIPLIER / 2) == math.inf
    assert gaussian_epsilon(0.0, 1.0) == math.inf and gaussian_epsilon(1.0, 1.0) == 0.0
    assert gaussian_epsilon(1e-5, 1e9) == gaussian_epsilon(1e-5, math.inf) == 0.0
    assert math.isfinite(gaussian_epsilon(1e-5, SMALLEST_MULTIPLIER))
    assert composed_noise_multiplier([]) == math.inf
    assert composed_noise_multiplier([(0.0, 1), (1.0, 2)]) == 0.0
    assert composed_noise_multiplier([(1e-200, 1)]) == 0.0


@pytest.mark.parametrize("noise", [-1.0, math.nan])
def test_a_multiplier_that_is_none_is_refused(noise: float) -> None:
    with pytest.raises(ValueError, match="noise multiplier"):
        gaussian_epsilon(1e-5, noise)
    with pytest.raises(ValueError, match="noise multiplier"):
        composed_noise_multiplier([(noise, 1)])


@pytest.mark.parametrize(("epsilon", "delta"), [(0, 1e-5), (-1, 1e-5), (1, 0), (1, 1), (math.nan, 1e-5)])
def test_calibration_refuses_impossible_targets(epsilon: float, delta: float) -> None:
    with pytest.raises(ValueError, match="calibration"):
        gaussian_noise_multiplier(epsilon, delta)
