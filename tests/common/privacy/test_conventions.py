import math

import numpy as np
import pytest
from dp_accounting import (
    GaussianDpEvent,
    NeighboringRelation,
    PoissonSampledDpEvent,
    SampledWithoutReplacementDpEvent,
    SelfComposedDpEvent,
    UnsupportedEventError,
)
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy import stats

from common.privacy.conventions import (
    LARGEST_MULTIPLIER,
    Mechanism,
    OneOfManyGaussian,
    PlainGaussian,
    PoissonGaussian,
    gaussian_pld,
    grid_step,
    pld_epsilon,
    poisson_pld,
    rdp_curve,
    rdp_epsilon,
    replace_multiplier,
    sampling_rate,
    shift,
    simplified,
)
from common.privacy.gaussian import gaussian_epsilon

DELTA = 1e-5
REPLACE = NeighboringRelation.REPLACE_ONE
ADD_REMOVE = NeighboringRelation.ADD_OR_REMOVE_ONE


def within(value: float) -> object:
    return pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize("relation", list(NeighboringRelation))
def test_the_trap_rdp_ignores_the_relation(relation: NeighboringRelation) -> None:
    assert RdpAccountant(neighboring_relation=relation).compose(GaussianDpEvent(1.0)).get_epsilon(DELTA) == within(
        4.7285
    )


def test_the_trap_pld_doubles_the_shift() -> None:
    assert PLDAccountant(REPLACE).compose(GaussianDpEvent(1.0)).get_epsilon(DELTA) == within(9.9973)
    assert RdpAccountant().compose(GaussianDpEvent(0.5)).get_epsilon(DELTA) == within(10.7255)


def test_the_trap_which_accountant_refuses_what() -> None:
    poisson = PoissonSampledDpEvent(0.1, GaussianDpEvent(1.0))
    with pytest.raises(UnsupportedEventError):
        RdpAccountant(neighboring_relation=REPLACE).compose(poisson)
    with pytest.raises(UnsupportedEventError):
        PLDAccountant(REPLACE).compose(SampledWithoutReplacementDpEvent(100, 1, GaussianDpEvent(1.0)))


def test_our_units_agree_between_accountants() -> None:
    exact = gaussian_epsilon(DELTA, 1.0)
    assert exact == within(4.3772)
    assert pld_epsilon(gaussian_pld(1.0, 1e-4), DELTA, 1) == pytest.approx(exact, abs=1e-5)
    assert rdp_epsilon([(PlainGaussian(1.0), 1)], DELTA) == within(4.7285)
    # z in add/remove units is z/2 in ours; sampling with probability 1 shows it.
    assert pld_epsilon(poisson_pld(1.0, 1.0, 1e-4), DELTA, 1) == within(9.9973)
    assert pld_epsilon(gaussian_pld(replace_multiplier(1.0), 1e-4), DELTA, 1) == within(9.9973)
    assert rdp_epsilon([(PlainGaussian(replace_multiplier(1.0)), 1)], DELTA) == within(10.7255)


def test_poisson_to_the_digits_of_the_design() -> None:
    assert pld_epsilon(poisson_pld(0.1, 1.0, 1e-4).self_compose(100), DELTA, 100) == within(10.5164)
    hundred = SelfComposedDpEvent(PoissonSampledDpEvent(0.1, GaussianDpEvent(1.0)), 100)
    assert PLDAccountant(ADD_REMOVE).compose(hundred).get_epsilon(DELTA) == within(7.0466)
    assert RdpAccountant(neighboring_relation=ADD_REMOVE).compose(hundred).get_epsilon(DELTA) == within(7.9039)


def hockey_stick(upper: np.ndarray, lower: np.ndarray, cell: float, epsilon: float) -> float:
    return float(np.maximum(upper - math.exp(epsilon) * lower, 0).sum() * cell)


@pytest.mark.parametrize("z", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_the_pld_dominates_every_replacement_of_clipped_gradients(rate: float, z: float) -> None:
    x = np.linspace(-1 - 12 * z, 1 + 12 * z, 20_001)
    cell = x[1] - x[0]
    pld = poisson_pld(rate, z, 1e-3)

    def density(gradient: float) -> np.ndarray:
        return (1 - rate) * stats.norm.pdf(x, 0, z) + rate * stats.norm.pdf(x, gradient, z)

    for gradient in (-1.0, -0.3, 0.0, 1.0):
        for other in (-1.0, 0.0, 0.6, 1.0):
            for epsilon in (0.0, 0.2, 1.0, 3.0):
                measured = hockey_stick(density(gradient), density(other), cell, epsilon)
                assert measured <= pld.get_delta_for_epsilon(epsilon) + 1e-6  # the quadrature's error
    extreme = hockey_stick(density(1.0), density(-1.0), cell, 0.2)
    assert pld.get_delta_for_epsilon(0.2) == pytest.approx(extreme, abs=1e-5)


def test_the_pld_dominates_gradients_at_an_angle() -> None:
    z, rate = 0.8, 0.3
    axis = np.linspace(-8, 8, 641)
    cell = (axis[1] - axis[0]) ** 2
    first, second = np.meshgrid(axis, axis)

    def density(angle: float) -> np.ndarray:
        centre = stats.norm.pdf(first, 0, z) * stats.norm.pdf(second, 0, z)
        moved = stats.norm.pdf(first, math.cos(angle), z) * stats.norm.pdf(second, math.sin(angle), z)
        return (1 - rate) * centre + rate * moved

    pld = poisson_pld(rate, z, 1e-3)
    for angle in (0.5, 1.5, 2.5):
        for epsilon in (0.0, 0.5, 1.5):
            assert hockey_stick(density(0), density(angle), cell, epsilon) <= pld.get_delta_for_epsilon(epsilon)


def test_certain_sampling_is_no_sampling() -> None:
    assert simplified(PoissonGaussian(1.0, 3.0)) == PlainGaussian(1.5)
    assert simplified(OneOfManyGaussian(1, 3.0)) == PlainGaussian(3.0)
    for kept in (PoissonGaussian(0.5, 3.0), OneOfManyGaussian(2, 3.0), PlainGaussian(3.0)):
        assert simplified(kept) == kept
    assert simplified(PoissonGaussian(0.5, 1e300)) == PoissonGaussian(0.5, LARGEST_MULTIPLIER)


def test_shift_and_rate() -> None:
    assert shift(PlainGaussian(0.5)) == shift(OneOfManyGaussian(9, 0.5)) == 2
    assert shift(PoissonGaussian(0.5, 0.5)) == 4 and shift(PlainGaussian(0)) == math.inf
    assert sampling_rate(PoissonGaussian(0.2, 1)) == 0.2
    assert sampling_rate(OneOfManyGaussian(4, 1)) == 0.25 and sampling_rate(PlainGaussian(1)) == 1


def test_rdp_has_nothing_to_say_about_poisson_sampling() -> None:
    assert rdp_curve(PoissonGaussian(0.1, 1.0)) is None
    assert rdp_epsilon([(PlainGaussian(1.0), 1), (PoissonGaussian(0.1, 1.0), 1)], DELTA) == math.inf


def test_the_transform_allowance_covers_many_compositions() -> None:
    # A million compositions of ν = 1000 are exactly ν = 1; the grid may only add.
    composed = pld_epsilon(gaussian_pld(1000.0, 1e-4).self_compose(10**6), DELTA, 10**6)
    assert gaussian_epsilon(DELTA, 1.0) <= composed <= 1.02 * gaussian_epsilon(DELTA, 1.0)
    assert pld_epsilon(gaussian_pld(1.0, 1e-2), 1e-14, 1) == math.inf
    assert pld_epsilon(gaussian_pld(1.0, 1e-2), 1e-9, 10**6) == math.inf


@pytest.mark.parametrize(
    ("composition", "expected"),
    [
        ([(PoissonGaussian(0.1, 1.0), 100)], 1e-4),
        ([(OneOfManyGaussian(100_000, 1.0), 100_000)], 1e-5),
        ([(PoissonGaussian(0.1, 0.05), 100)], 1e-2),
        ([(PoissonGaussian(0.1, 0.0), 1)], None),
        ([(PoissonGaussian(0.5, 0.002), 10**6)], None),
    ],
)
def test_the_grid_follows_the_composition(composition: list[tuple[Mechanism, int]], expected: float | None) -> None:
    step = grid_step(composition)
    assert step is expected is None or (step is not None and expected is not None and 0.2 <= step / expected <= 5)
