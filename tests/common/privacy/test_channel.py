import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.privacy.channel import (
    calibrate_latent_noise,
    channel_sensitivity,
    cohort_epsilon,
    cohort_epsilon_rdp,
    effective_noise_factor,
    effective_noise_multiplier,
    latent_noise_multiplier,
    metric_renyi,
    one_of_many_delta,
    one_of_many_pld,
)
from common.privacy.gaussian import gaussian_delta, gaussian_epsilon

DELTA = 1e-5
EPSILONS = (-1.0, -0.1, 0.0, 0.05, 0.3, 1.0, 2.5)


def hockey_stick(upper: np.ndarray, lower: np.ndarray, cell: float, epsilon: float) -> float:
    return float(np.maximum(upper - math.exp(epsilon) * lower, 0).sum() * cell)


@pytest.mark.parametrize(
    ("patients", "rows", "noise", "rdp", "pld"),
    [
        (1000, 1000, 0.5, 5.1281, 3.286),
        (1000, 1000, 0.7, 1.8226, 0.632),
        (1000, 1000, 1.0, 0.7033, 0.180),
        (5000, 1000, 0.5, 3.1283, 1.120),
        (300, 300, 1.0, 0.9553, 0.372),
    ],
)
def test_t5_to_the_digits_of_the_design(patients: int, rows: int, noise: float, rdp: float, pld: float) -> None:
    assert cohort_epsilon(rows, patients, noise, DELTA) == pytest.approx(pld, abs=5e-4)
    assert cohort_epsilon_rdp(rows, patients, noise, DELTA) == pytest.approx(rdp, abs=5e-5)


def test_sensitivity_is_the_smaller_of_radius_and_encoder() -> None:
    assert channel_sensitivity(3.0, 4.0, 10.0) == 6.0
    assert channel_sensitivity(3.0, 0.5, 10.0) == 5.0
    assert channel_sensitivity(math.inf, 0.5, 10.0) == 5.0
    for arguments in ((0.0, 1.0, 1.0), (1.0, -1.0, 1.0), (1.0, 1.0, math.nan), (1.0, 1.0, math.inf)):
        with pytest.raises(ValueError, match="must be positive"):
            channel_sensitivity(*arguments)


@pytest.mark.parametrize("radius", [0.5, 2.0])
def test_t3_by_brute_force(radius: float) -> None:
    # An encoder of modulus 4 on inputs in [-1, 1], projected to the ball: no pair of inputs exceeds the claim.
    noise = 0.9
    sensitivity = channel_sensitivity(radius, 4.0, 2.0)
    multiplier = latent_noise_multiplier(noise, sensitivity)
    z = np.linspace(-12, 12, 20_001)
    codes = [float(np.clip(4 * math.sin(x), -radius, radius)) for x in np.linspace(-1, 1, 9)]
    densities = [stats.norm.pdf(z, code, noise) for code in codes]
    for epsilon in EPSILONS:
        claimed = float(gaussian_delta(epsilon, multiplier))
        measured = [hockey_stick(p, q, z[1] - z[0], epsilon) for p in densities for q in densities]
        assert max(measured) <= claimed + 1e-6  # the quadrature's error
        if radius == 0.5:
            assert max(measured) == pytest.approx(claimed, abs=1e-6)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6), st.floats(0.05, 3), st.floats(0.05, 3))
@settings(deadline=None)
def test_t4_is_exact_for_linear_decoders_of_any_shape(
    outputs: int, latent: int, seed: int, latent_noise: float, observation_noise: float
) -> None:
    generator = np.random.default_rng(seed)
    decoder = generator.normal(size=(outputs, latent))
    _, singular, right = np.linalg.svd(decoder)
    sensitivity = 1.7
    covariance = latent_noise**2 * decoder @ decoder.T + observation_noise**2 * np.eye(outputs)

    def distance(direction: np.ndarray) -> float:
        moved = decoder @ direction * sensitivity
        return math.sqrt(moved @ np.linalg.solve(covariance, moved))

    claimed = 1 / effective_noise_multiplier(latent_noise, observation_noise, float(singular[0]), sensitivity)
    assert distance(right[0]) == pytest.approx(claimed, rel=1e-9)
    other = generator.normal(size=latent)
    assert distance(other / np.linalg.norm(other)) <= claimed * (1 + 1e-9)
    # A larger declared bound is only more careful.
    assert claimed <= 1 / effective_noise_multiplier(latent_noise, observation_noise, 2 * float(singular[0]), 1.7)


@pytest.mark.parametrize(
    "decoder",
    [
        lambda z: 2.0 * np.sin(z),
        lambda z: 2.0 * np.abs(z),
        lambda z: np.where(z > 0, 2.0, -0.5) * z,
        lambda z: 2.0 * np.clip(z, -0.3, 0.8),
    ],
)
@pytest.mark.parametrize(("latent_noise", "observation_noise"), [(0.3, 1.0), (0.7, 0.4), (1.0, 3.0)])
def test_t4_dominates_nonlinear_decoders(
    decoder: Callable[[np.ndarray], np.ndarray], latent_noise: float, observation_noise: float
) -> None:
    sensitivity, span = 1.5, 1.5
    reach = 2 * (span + 9 * latent_noise) + 9 * observation_noise
    x = np.linspace(-reach, reach, 3_001)
    quantile = np.linspace(-9, 9, 1_201)
    mass = stats.norm.pdf(quantile)
    mass /= mass.sum()

    def density(code: float) -> np.ndarray:
        return stats.norm.pdf(x[:, None], decoder(code + latent_noise * quantile), observation_noise) @ mass

    multiplier = effective_noise_multiplier(latent_noise, observation_noise, 2.0, sensitivity)
    for code in (-1.5, -0.75, 0.0):
        pair = density(code), density(code + sensitivity)
        for upper, lower in (pair, pair[::-1]):
            for epsilon in (0.0, 0.3, 1.0, 2.5):
                measured = hockey_stick(upper, lower, x[1] - x[0], epsilon)
                assert measured <= float(gaussian_delta(epsilon, multiplier)) + 1e-7


def test_the_effective_noise_factor_of_the_design() -> None:
    assert effective_noise_factor(1.0, 0.2, 8.0) == pytest.approx(1.0003, abs=5e-5)
    assert effective_noise_factor(0.5, 4.0, 8.0) == pytest.approx(math.sqrt(2))
    assert effective_noise_factor(0.0, 1.0, 8.0) == math.inf and effective_noise_factor(0.0, 0.0, 8.0) == 1.0
    ratio = effective_noise_multiplier(0.7, 2.0, 5.0, 3.0) / latent_noise_multiplier(0.7, 3.0)
    assert ratio == pytest.approx(effective_noise_factor(0.7, 2.0, 5.0))


def row_density(x: np.ndarray, table: list[float], noise: float) -> np.ndarray:
    return np.mean([stats.norm.pdf(x, code, noise) for code in table], axis=0)


def neighbours(patients: int) -> list[tuple[list[float], list[float]]]:
    """Slot 0 changes from 0 to 1; all others equal the one, the other, either end or spread."""
    rest = patients - 1
    others = [[0.0] * rest, [1.0] * rest, [k % 2 for k in range(rest)], list(np.linspace(0, 1, rest))]
    return [([0.0, *other], [1.0, *other]) for other in others]


@pytest.mark.parametrize("noise", [0.4, 1.0])
@pytest.mark.parametrize("patients", [2, 3, 5])
def test_t5_against_brute_force_mixtures_one_row(patients: int, noise: float) -> None:
    x = np.linspace(-12 * noise, 1 + 12 * noise, 20_001)
    worst = dict.fromkeys(EPSILONS, 0.0)
    for table, other in neighbours(patients):
        densities = row_density(x, table, noise), row_density(x, other, noise)
        for upper, lower in (densities, densities[::-1]):
            for epsilon in EPSILONS:
                worst[epsilon] = max(worst[epsilon], hockey_stick(upper, lower, x[1] - x[0], epsilon))
    pld = one_of_many_pld(patients, noise, 1e-3, 1)
    for epsilon, measured in worst.items():
        claimed = float(one_of_many_delta(epsilon, patients, noise))
        # The tables with all others equal attain the profile: for one row it cannot be improved.
        assert measured == pytest.approx(claimed, abs=2e-6)
        assert claimed - 1e-12 <= pld.get_delta_for_epsilon(epsilon) <= claimed + 1e-4


@pytest.mark.parametrize(("patients", "noise"), [(2, 0.6), (3, 1.0), (4, 0.5)])
def test_t5_against_brute_force_mixtures_two_rows(patients: int, noise: float) -> None:
    x = np.linspace(-9 * noise, 1 + 9 * noise, 1_201)
    cell = (x[1] - x[0]) ** 2
    pld = one_of_many_pld(patients, noise, 1e-3, 2).self_compose(2)
    for table, other in neighbours(patients):
        first, second = row_density(x, table, noise), row_density(x, other, noise)
        for upper, lower in ((first, second), (second, first)):
            for epsilon in (0.0, 0.2, 0.7, 1.5, 3.0):
                measured = hockey_stick(np.outer(upper, upper), np.outer(lower, lower), cell, epsilon)
                assert measured <= pld.get_delta_for_epsilon(epsilon) + 1e-7


def test_t5_profile_is_one_of_a_pair_of_distributions() -> None:
    gamma = np.linspace(1e-3, 6, 4_001)
    profile = one_of_many_delta(np.log(gamma), 7, 0.8)
    assert np.all(np.diff(profile) <= 1e-12) and np.all(np.diff(profile, 2) >= -1e-12)
    assert np.all(profile >= np.maximum(1 - gamma, 0) - 1e-12)
    assert float(one_of_many_delta(0.9999999, 50, 0.8)) == pytest.approx(float(one_of_many_delta(1.0, 50, 0.8)))


def test_one_patient_is_no_sampling() -> None:
    assert cohort_epsilon(9, 1, 3.0, DELTA) == gaussian_epsilon(DELTA, 1.0)
    assert float(one_of_many_delta(0.7, 1, 0.8)) == pytest.approx(float(gaussian_delta(0.7, 0.8)))


@pytest.mark.parametrize("patients", [2, 30, 1000])
@pytest.mark.parametrize("noise", [0.3, 3.0, 100.0])
def test_the_cross_check_is_never_below_the_primary(patients: int, noise: float) -> None:
    for rows in (1, 300):
        assert cohort_epsilon_rdp(rows, patients, noise, DELTA) >= cohort_epsilon(rows, patients, noise, DELTA)


@pytest.mark.parametrize("patients", [2, 100])
@pytest.mark.parametrize("order", [1.5, 4.0, 16.0])
def test_metric_privacy_holds_where_t5_with_a_distance_does_not(patients: int, order: float) -> None:
    # All others are far away: they hide nothing of the difference between two near contents of one slot.
    noise, distance = 1.0, 1.0
    x = np.linspace(-45, 20, 200_001)
    far = stats.norm.pdf(x, -30, noise) * (patients - 1) / patients
    upper = far + stats.norm.pdf(x, distance, noise) / patients
    lower = far + stats.norm.pdf(x, 0.0, noise) / patients
    inside = lower > 0
    moment = np.sum(np.exp(order * np.log(upper[inside]) + (1 - order) * np.log(lower[inside]))) * (x[1] - x[0])
    measured = math.log(moment) / (order - 1)
    assert measured <= metric_renyi(order, 1, patients, distance, noise) + 1e-9
    assert measured == pytest.approx(metric_renyi(order, 1, patients, distance, noise), rel=1e-3)
    assert metric_renyi(order, 7, patients, distance, noise) == pytest.approx(
        7 * metric_renyi(order, 1, patients, distance, noise)
    )
    if patients == 100:
        # T5 with the distance in the place of Δ would claim less than what is measured, by orders of magnitude.
        epsilon = 0.5
        violated = hockey_stick(upper, lower, x[1] - x[0], epsilon)
        assert violated > 100 * float(one_of_many_delta(epsilon, patients, noise / distance))


def test_metric_privacy_limits() -> None:
    assert metric_renyi(2.0, 5, 10, 0.0, 1.0) == 0.0
    assert metric_renyi(2.0, 5, 10, 1.0, 0.0) == math.inf and metric_renyi(2.0, 5, 10, 0.0, 0.0) == 0.0
    assert metric_renyi(3.0, 1, 1, 1.0, 2.0) == pytest.approx(3 / 8)
    assert metric_renyi(50.0, 1, 10, 100.0, 1.0) == pytest.approx(50 * 100**2 / 2 - math.log(10) / 49)
    with pytest.raises(ValueError, match="order"):
        metric_renyi(1.0, 1, 1, 1.0, 1.0)


@given(st.floats(0.8, 4), st.floats(1.05, 2), st.integers(20, 300), st.integers(1, 40), st.sampled_from([1e-4, 1e-6]))
@settings(deadline=None, max_examples=10)
def test_t5_is_monotone(noise: float, factor: float, patients: int, rows: int, delta: float) -> None:
    epsilon = cohort_epsilon(rows, patients, noise, delta)
    assert cohort_epsilon(rows, patients, noise * factor, delta) <= epsilon
    assert cohort_epsilon(2 * rows, patients, noise, delta) >= epsilon
    assert cohort_epsilon(rows, 2 * patients, noise, delta) <= epsilon
    assert cohort_epsilon(rows, patients, noise, 10 * delta) <= epsilon


@pytest.mark.parametrize(("epsilon", "patients", "rows"), [(1.0, 50, 20), (5.0, 1, 30)])
def test_calibration_reaches_its_target_and_no_more(epsilon: float, patients: int, rows: int) -> None:
    sensitivity = 6.0
    latent_noise = calibrate_latent_noise(epsilon, DELTA, patients, rows, sensitivity)
    assert cohort_epsilon(rows, patients, latent_noise / sensitivity, DELTA) <= epsilon
    assert cohort_epsilon(rows, patients, 0.999 * latent_noise / sensitivity, DELTA) > epsilon


@pytest.mark.parametrize(
    ("epsilon", "delta", "sensitivity"), [(0, 1e-5, 1), (math.inf, 1e-5, 1), (1, 0, 1), (1, 1e-5, 0)]
)
def test_calibration_refuses_impossible_targets(epsilon: float, delta: float, sensitivity: float) -> None:
    with pytest.raises(ValueError, match="calibration"):
        calibrate_latent_noise(epsilon, delta, 10, 10, sensitivity)


def test_no_noise_is_infinite() -> None:
    assert cohort_epsilon(10, 10, 0.0, DELTA) == math.inf
    with pytest.raises(ValueError, match="no latent noise"):
        calibrate_latent_noise(1.0, 1e-14, 100, 10, 1.0)
