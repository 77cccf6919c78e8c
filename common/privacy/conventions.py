"""The one place that owns units, neighbouring relations and conversions between accountants (privacy.md, section 4).

Our relation is always replace-one: the content of one patient slot changes, the number of patients is public. The
trap this module exists for (dp_accounting 0.6): the same `GaussianDpEvent(1.0)` means a shift of one noise standard
deviation to the RDP accountant under every relation, and a shift of two to the PLD accountant under REPLACE_ONE, as PLD
reads the multiplier in add/remove units. RDP refuses Poisson sampling under REPLACE_ONE; PLD has no sampling without
replacement. So every mechanism is first written in *our* units (the frozen values below), and only the functions here
translate them for an accountant.

dp_accounting takes a second to import, which a site that adds no noise, or finds its numbers in its memory, need not
wait for: it is imported where it is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from dp_accounting import DpEvent
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

UNIT = "one patient"
RELATION = "replacing the content of one patient slot at one site; patient numbers are public"


@dataclass(frozen=True, order=True)
class PlainGaussian:
    """A Gaussian mechanism; `noise_multiplier` ν in replace units."""

    noise_multiplier: float


@dataclass(frozen=True, order=True)
class PoissonGaussian:
    """A sum over a Poisson sample, clipped and noised; `add_remove_multiplier` is noise over the clipping norm."""

    sampling_probability: float
    add_remove_multiplier: float


@dataclass(frozen=True, order=True)
class OneOfManyGaussian:
    """A Gaussian mechanism on one patient drawn uniformly from `patients`; ν in replace units."""

    patients: int
    noise_multiplier: float


Mechanism = PlainGaussian | PoissonGaussian | OneOfManyGaussian


def replace_multiplier(add_remove_multiplier: float) -> float:
    """Noise over clipping norm, in replace units: replacing one patient moves a clipped sum by up to twice the norm."""
    return add_remove_multiplier / 2.0


# A larger multiplier is counted as this one, which only raises ε and spares every accountant an overflow.
LARGEST_MULTIPLIER = 1e6


def simplified(mechanism: Mechanism) -> Mechanism:
    """The same mechanism without sampling where sampling is certain, so that the exact formula applies.

    Multipliers above `LARGEST_MULTIPLIER` are lowered to it.
    """
    if isinstance(mechanism, PoissonGaussian):
        multiplier = min(mechanism.add_remove_multiplier, LARGEST_MULTIPLIER)
        if mechanism.sampling_probability == 1:
            return PlainGaussian(replace_multiplier(multiplier))
        return PoissonGaussian(mechanism.sampling_probability, multiplier)
    multiplier = min(mechanism.noise_multiplier, LARGEST_MULTIPLIER)
    if isinstance(mechanism, OneOfManyGaussian) and mechanism.patients > 1:
        return OneOfManyGaussian(mechanism.patients, multiplier)
    return PlainGaussian(multiplier)


def shift(mechanism: Mechanism) -> float:
    """The largest shift in noise standard deviations under replace-one; infinity without noise."""
    if isinstance(mechanism, PoissonGaussian):
        multiplier = replace_multiplier(mechanism.add_remove_multiplier)
    else:
        multiplier = mechanism.noise_multiplier
    return math.inf if multiplier == 0 else 1.0 / multiplier


def sampling_rate(mechanism: Mechanism) -> float:
    """The probability that a given patient takes part in one application."""
    if isinstance(mechanism, PoissonGaussian):
        return mechanism.sampling_probability
    return 1.0 / mechanism.patients if isinstance(mechanism, OneOfManyGaussian) else 1.0


def gaussian_pld(noise_multiplier: float, step: float) -> PrivacyLossDistribution:
    """PLD of a Gaussian mechanism, ν in replace units, on a grid of `step` nats; pessimistic.

    The shift is in ν already, so the library's relation that does not double it is the right one; its result is
    symmetric and composes with replace-one PLDs.
    """
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier,
        value_discretization_interval=step,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
    )


def poisson_pld(sampling_probability: float, add_remove_multiplier: float, step: float) -> PrivacyLossDistribution:
    """PLD of one Poisson-sampled Gaussian step under replace-one, on a grid of `step` nats; pessimistic.

    The dominating pair is (1−q)N(0) + qN(±1) (Doroshenko et al. 2022): REPLACE_ONE wants add/remove units.
    """
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        add_remove_multiplier,
        sampling_prob=sampling_probability,
        value_discretization_interval=step,
        neighboring_relation=NeighboringRelation.REPLACE_ONE,
    )


@lru_cache(maxsize=256)
def rdp_curve(mechanism: Mechanism) -> tuple[float, ...] | None:
    """Rényi divergences of one application at dp_accounting's default orders; None where RDP has no valid bound.

    There is none for Poisson sampling under replace-one.
    """
    if isinstance(mechanism, PoissonGaussian):
        return None
    from dp_accounting import GaussianDpEvent, NeighboringRelation, SampledWithoutReplacementDpEvent
    from dp_accounting.rdp import RdpAccountant

    event: DpEvent = GaussianDpEvent(mechanism.noise_multiplier)
    if isinstance(mechanism, OneOfManyGaussian):
        event = SampledWithoutReplacementDpEvent(mechanism.patients, 1, event)
    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    curve = tuple(float(value) for value in accountant.compose(event).rdp)
    # dp_accounting reads a negative value as ε = 0; it is a numerical failure, and no bound.
    return None if any(not value >= 0 for value in curve) else curve


def rdp_epsilon(composition: Iterable[tuple[Mechanism, int]], delta: float) -> float:
    """ε by Rényi differential privacy of a composition; infinity where RDP has no valid bound."""
    from dp_accounting.rdp import RdpAccountant, compute_epsilon

    orders = RdpAccountant().orders
    total: NDArray[np.float64] = np.zeros(len(orders))
    for mechanism, count in composition:
        curve = rdp_curve(mechanism)
        if curve is None:
            return math.inf
        total = total + count * np.asarray(curve)
    if not delta > 0 or bool(np.isnan(total).any()):
        return math.inf
    return float(compute_epsilon(list(orders), list(total), delta)[0])


# Grid of the privacy losses. All bounds are pessimistic at any step; these constants only trade tightness for time.
_FINEST_STEP = 1e-6
_USUAL_STEP = 2e-4
_COARSEST_STEP = 0.5
_LARGEST_SINGLE = 2**18
_LARGEST_COMPOSED = 2**22
# A normal variable leaves ±10.2 standard deviations with probability e^-50, where dp_accounting truncates.
_TAIL = 10.2


def grid_step(composition: Sequence[tuple[Mechanism, int]]) -> float | None:
    """The step in nats of the grid of privacy losses for a composition; None if no affordable grid represents it."""
    wanted, needed = _USUAL_STEP, 0.0
    expected = variance = 0.0
    for mechanism, count in composition:
        distance, rate = shift(mechanism), sampling_rate(mechanism)
        if not math.isfinite(distance) or distance > 1e3:
            return None
        squared = distance * distance
        largest = squared / 2 + _TAIL * distance
        largest = max(largest + math.log(rate), math.log1p(rate * math.expm1(min(largest, 700.0))))
        # χ² bounds both moments of a sampled loss; without sampling they are the Gaussian's own.
        chi_square = rate * rate * math.expm1(min(squared, 700.0))
        wanted = min(wanted, max(math.sqrt(chi_square) / 2, 5e-4 / math.sqrt(count)))
        needed = max(needed, largest / _LARGEST_SINGLE)
        expected += count * min(rate * squared / 2, 4 * chi_square)
        variance += count * min(rate * (squared + squared * squared / 4), 4 * chi_square)
    needed = max(needed, (expected + 12 * math.sqrt(variance)) / _LARGEST_COMPOSED)
    if needed > _COARSEST_STEP:
        return None
    return max(_ladder(max(wanted, _FINEST_STEP), up=False), _ladder(max(needed, _FINEST_STEP), up=True))


def pld_epsilon(pld: PrivacyLossDistribution, delta: float, count: int) -> float:
    """ε of a composed PLD of `count` applications at δ, with an allowance for rounding in the Fourier transforms.

    A transform raised to the power `count` carries an absolute error of about `count` · 1e-16 in mass; the allowance is
    ten times that and is taken from δ. Infinity where it would be more than a tenth of δ: then no digit is safe.
    """
    allowance = 1e-15 * count + 1e-13
    if not allowance <= delta / 10:
        return math.inf
    return float(pld.get_epsilon_for_delta(delta - allowance))


def _ladder(value: float, *, up: bool) -> float:
    """The nearest of 1, 2, 5 · 10^k at or above `value` (`up`), or at or below: equal steps share cached PLDs."""
    exponent = math.floor(math.log10(value))
    rungs = [mantissa * 10.0**power for power in (exponent - 1, exponent, exponent + 1) for mantissa in (1, 2, 5)]
    if up:
        return min(rung for rung in rungs if rung >= value * (1 - 1e-9))
    return max(rung for rung in rungs if rung <= value * (1 + 1e-9))
