"""The stochastic channel (privacy.md, section 2): T3, T4 and T5 as pure functions.

x → μ(x) → z = Π_R μ(x) + σ_z ξ → x̃ = g(z) + σ_x η. Noise multipliers ν are in replace units: noise standard deviation
over Δ, both in latent units. All arguments are declared constants, never measured ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.privacy.calibration import least_multiplier
from common.privacy.conventions import (
    LARGEST_MULTIPLIER,
    OneOfManyGaussian,
    PlainGaussian,
    grid_step,
    pld_epsilon,
    rdp_epsilon,
    simplified,
)
from common.privacy.gaussian import (
    SMALLEST_MULTIPLIER,
    composed_noise_multiplier,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_noise_multiplier,
)
from common.privacy.memory import remembered

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

# Probability that all rows together may spend on infinite privacy loss; it is far below any δ the PLD is used for.
_TAIL_MASS = 1e-12
# log ε falls about this fast with log ν; only the number of evaluations depends on it.
_USUAL_SLOPE = 4.0


def channel_sensitivity(latent_radius: float, encoder_lipschitz: float, diameter: float) -> float:
    """Δ = min(2R, L_e · diam 𝒳) in latent units; `diameter` is that of the encoded space.

    Two codes lie in a ball of radius R, and their inputs at most `diameter` apart.
    """
    for name, value in (("latent_radius", latent_radius), ("encoder_lipschitz", encoder_lipschitz)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value!r}")
    if not (math.isfinite(diameter) and diameter > 0):
        raise ValueError(f"diameter must be positive and finite, got {diameter!r}")
    return min(2.0 * latent_radius, encoder_lipschitz * diameter)


def latent_noise_multiplier(latent_noise: float, sensitivity: float) -> float:
    """T3: ν = σ_z/Δ. Decoding, whatever its sampling, is post-processing. Both arguments in latent units."""
    return latent_noise / sensitivity


def effective_noise_multiplier(
    latent_noise: float, observation_noise: float, decoder_lipschitz: float, sensitivity: float
) -> float:
    """T4: ν = √(σ_z² + σ_x²/L_d²)/Δ, valid only if every output coordinate carries the same observation noise.

    The noise must be added before argmax, rounding and clamping. `observation_noise` is in units of the encoded output,
    the others in latent units (shift reduction of Feldman, Mironov, Talwar, Thakurta 2018).
    """
    return math.hypot(latent_noise, observation_noise / decoder_lipschitz) / sensitivity


def effective_noise_factor(latent_noise: float, observation_noise: float, decoder_lipschitz: float) -> float:
    """√(1 + σ_x²/(L_d σ_z)²): by how much T4 multiplies the noise of T3; to be printed beside every use of T4."""
    if latent_noise == 0:
        return math.inf if observation_noise > 0 else 1.0
    return math.hypot(1.0, observation_noise / (decoder_lipschitz * latent_noise))


def one_of_many_delta(epsilon: ArrayLike, patients: int, noise_multiplier: float) -> NDArray[np.float64]:
    """T5, one row: a bound on the hockey-stick divergence at e^ε, for any real ε, replace-one.

    For ε ≥ 0, δ'(ε) = δ_Gauss(log(1 + n(e^ε − 1)), ν)/n (Balle, Barthe, Gaboardi 2018, Theorem 9 with m = 1, where
    δ'(log(1 + (e^t − 1)/n)) = δ_Gauss(t)/n). For ε < 0 the relation is symmetric: H_γ = 1 − γ + γ h(1/γ).
    """
    eps = np.asarray(epsilon, dtype=np.float64)
    size = np.abs(eps)
    small = np.log1p(patients * np.expm1(np.minimum(size, 1.0)))
    large = size + math.log(patients) + np.log1p(-(patients - 1) / patients * np.exp(-size))
    above = gaussian_delta(np.where(size < 1.0, small, large), noise_multiplier) / patients
    return np.where(eps >= 0, above, -np.expm1(-size) + np.exp(-size) * above)


def one_of_many_pld(patients: int, noise_multiplier: float, step: float, rows: int) -> PrivacyLossDistribution:
    """T5, one row of a cohort of `rows`: its pessimistic PLD on a grid of `step` nats, replace-one, symmetric.

    Connect-the-dots over `one_of_many_delta`; the profile is convex in e^ε, so it belongs to a dominating pair and the
    result composes, adaptively, with every other replace-one PLD (Zhu, Dong, Wang 2022).
    """

    from dp_accounting.pld import pld_pmf  # as in conventions.py: where it is needed
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    def profile(eps: float) -> float:
        return float(one_of_many_delta(eps, patients, noise_multiplier))

    tail = _TAIL_MASS / rows
    upper = _first_at_most(profile, tail)
    # Losses below the grid are rounded up to its end, so a shorter lower side is still pessimistic.
    lower = _first_at_most(lambda eps: profile(eps) * math.exp(-eps), tail)
    grid = np.arange(-math.ceil(lower / step) - 1, math.ceil(upper / step) + 2)
    deltas = np.clip(one_of_many_delta(grid * step, patients, noise_multiplier), 0.0, 1.0)
    return PrivacyLossDistribution(pld_pmf.create_pmf_pessimistic_connect_dots(step, grid, deltas))


def cohort_epsilon(rows: int, patients: int, noise_multiplier: float, delta: float) -> float:
    """T5, primary: ε of `rows` rows, each of one of `patients` drawn independently, by the Balle-Barthe-Gaboardi PLD.

    Infinity if no finite bound could be computed.
    """
    mechanism = simplified(OneOfManyGaussian(patients, noise_multiplier))
    if isinstance(mechanism, PlainGaussian):
        return gaussian_epsilon(delta, composed_noise_multiplier([(mechanism.noise_multiplier, rows)]))
    step = grid_step([(mechanism, rows)]) if noise_multiplier >= SMALLEST_MULTIPLIER else None
    if step is None:
        return math.inf
    single = one_of_many_pld(patients, min(noise_multiplier, LARGEST_MULTIPLIER), step, rows)
    return pld_epsilon(single.self_compose(rows), delta, rows)


def cohort_epsilon_rdp(rows: int, patients: int, noise_multiplier: float, delta: float) -> float:
    """T5, cross-check: the same by dp_accounting's RDP of sampling without replacement (Wang, Balle, Kasiviswanathan).

    Valid, and looser than `cohort_epsilon`: 1.6 to 4.7 times at ε of order one, far more below.
    """
    return rdp_epsilon([(simplified(OneOfManyGaussian(patients, noise_multiplier)), rows)], delta)


def metric_renyi(order: float, rows: int, patients: int, distance: float, latent_noise: float) -> float:
    """Metric privacy of a cohort: D_α ≤ M log(1 − 1/n + e^{α(α−1)d²/(2σ_z²)}/n)/(α − 1) for two contents of a slot.

    `distance` d = min(2R, L_e‖x − x'‖) and σ_z in latent units; `order` α > 1. By joint convexity of the Rényi moment;
    d must *not* be put into T5's formula, which needs Δ between all patients (privacy.md, T5).
    """
    if not order > 1:
        raise ValueError(f"order must be above 1, got {order!r}")
    if latent_noise == 0:
        return 0.0 if distance == 0 else math.inf
    exponent = order * (order - 1) * (distance / latent_noise) ** 2 / 2
    if exponent < 1:
        return rows * math.log1p(math.expm1(exponent) / patients) / (order - 1)
    log_moment = exponent - math.log(patients) + math.log1p((patients - 1) * math.exp(-exponent))
    return rows * log_moment / (order - 1)


@remembered
def calibrate_latent_noise(epsilon: float, delta: float, patients: int, rows: int, sensitivity: float) -> float:
    """σ_z in latent units for which T5, with T3 only, gives at most `epsilon` at `delta`; within 0.12 % of the least.

    `sensitivity` is Δ of `channel_sensitivity`. `ValueError` if the target is not positive or no noise reaches it.
    """
    if not (epsilon > 0 and math.isfinite(epsilon) and 0 < delta < 1 and sensitivity > 0):
        raise ValueError(
            f"calibration needs a positive finite epsilon, 0 < delta < 1 and a positive sensitivity,"
            f" got {epsilon!r}, {delta!r} and {sensitivity!r}"
        )

    # Central limit for one of n, sampled: M rows act like one Gaussian with a shift of √(2M (e^{1/ν²} - 1))/n.
    shift = patients / gaussian_noise_multiplier(epsilon, delta)
    multiplier = least_multiplier(
        lambda value: cohort_epsilon(rows, patients, value, delta),
        epsilon,
        guess=1 / math.sqrt(math.log1p(shift * shift / (2 * rows))),
        slope=_USUAL_SLOPE,
    )
    if multiplier is None:
        raise ValueError(f"no latent noise gives epsilon = {epsilon:g} at delta = {delta:g} for {rows} rows")
    # A division may round down; the accountant divides by Δ again.
    return multiplier * sensitivity * (1 + 1e-9)


def _first_at_most(function: Callable[[float], float], bound: float) -> float:
    """An argument, within a tenth of the least, at which a decreasing function has fallen to `bound`."""
    argument = 1e-3
    while function(argument) > bound:
        argument *= 1.1
    return argument
