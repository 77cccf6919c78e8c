import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from common.errors import StudyError
from common.privacy.noise import add_noise
from common.privacy.update import project_update, update_norm
from common.privacy.update_noise import assess_update_noise, largest_noisy_norm, require_useful_noise
from common.study import Study

PATIENTS = {f"site{i}": 100 for i in range(5)}


def study(noise: float, **privacy: object) -> Study:
    return Study.model_validate(
        {
            "study": {"name": "s", "schema": "s.json"},
            "training": {"rounds": 40},
            "privacy": {"update_noise": noise} | privacy,
        }
    )


@pytest.mark.parametrize(("noise", "epsilon"), [(6.3, 10.0), (17.6, 3.0), (47.0, 1.0), (1.0, 133.0)])
def test_epsilon_of_forty_rounds_is_that_of_the_design(noise: float, epsilon: float) -> None:
    # The numbers of privacy.md, section 3, which are rounded to the digits given there.
    assert assess_update_noise(noise, 40, 1e-5, 1, [1.0]).epsilon == pytest.approx(epsilon, rel=0.012)


def test_noise_of_one_round_at_multiplier_one_is_epsilon_ten() -> None:
    assert assess_update_noise(1.0, 1, 1e-5, 1, [1.0]).epsilon == pytest.approx(9.997, abs=1e-3)


def test_noise_to_signal_is_the_ratio_of_two_walks() -> None:
    # Independently: add up 25 rounds of noise of three sites and compare with 25 updates of full length.
    random, weights, radius, size, rounds, noise = np.random.default_rng(0), [0.5, 0.3, 0.2], 0.7, 4000, 25, 0.4
    walk = sum(w * noise * radius * random.standard_normal((rounds, size)).sum(axis=0) for w in weights)
    expected = float(np.linalg.norm(walk)) / (rounds * radius)
    assert assess_update_noise(noise, rounds, 1e-5, size, weights).noise_to_signal == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("noise", "words"), [(0.1, "ε ="), (6.3, "times as far"), (1.0, "ε =")])
def test_useless_noise_is_refused_with_its_numbers(noise: float, words: str) -> None:
    with pytest.raises(StudyError, match=words) as caught:
        require_useful_noise(study(noise), 39_000, PATIENTS)
    assert f"update_noise = {noise:g}" in str(caught.value) and "5 sites" in str(caught.value)
    require_useful_noise(study(noise, accept_useless_noise=True), 39_000, PATIENTS)


def test_no_noise_and_useful_noise_are_accepted() -> None:
    require_useful_noise(study(0.0), 39_000, PATIENTS)
    # Thousands of sites and a tiny decoder: what the mechanism was made for.
    require_useful_noise(study(6.3), 200, {f"site{i}": 100 for i in range(5000)})


@given(st.integers(1, 400), st.floats(0.01, 50), st.floats(0.01, 10), st.integers(0, 2**32))
def test_a_noisy_update_stays_below_the_largest_noisy_norm(size: int, noise: float, radius: float, seed: int) -> None:
    update = project_update({"a": torch.ones(size)}, radius)
    noisy = add_noise(update, noise * radius, seed)
    assert noisy["a"].dtype == torch.float32 and noisy["a"].shape == (size,)
    assert update_norm(noisy) <= largest_noisy_norm(radius, noise, size)
    assert largest_noisy_norm(radius, 0.0, size) == radius


def test_noise_of_the_operating_system_is_normal_and_independent() -> None:
    zeros = {"a": torch.zeros(100, 200), "b": torch.zeros(20_000)}
    first, second = add_noise(zeros, 2.0, None), add_noise(zeros, 2.0, None)
    samples = [array.double().numpy().ravel() / 2 for draw in (first, second) for array in draw.values()]
    for sample in samples:
        assert stats.kstest(sample, "norm").pvalue > 1e-6
        assert abs(np.mean(sample)) < 6 / math.sqrt(sample.size)
    for i, sample in enumerate(samples):
        for other in samples[:i]:
            assert abs(np.corrcoef(sample, other)[0, 1]) < 6 / math.sqrt(sample.size)
