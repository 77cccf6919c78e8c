"""`[privacy] update_noise`: what it guarantees over a study, what it does to the decoder, and when it is refused.

Every update is ū_k + N(0, (z C)² I). Any two projected updates differ by at most 2C whatever training did, so a round
is a Gaussian mechanism with noise multiplier z/2 in replace units that protects a whole site at once (privacy.md,
section 3). For few sites no setting is usable, and a useless one is refused with its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.errors import StudyError
from common.privacy.gaussian import composed_noise_multiplier, gaussian_epsilon
from common.study import Study

# An ε beyond this says so little about one patient that the noise buys nothing.
LARGEST_USEFUL_EPSILON = 20.0
# Beyond this the noise of the whole study moves the decoder further than all updates together could.
LARGEST_USEFUL_RATIO = 1.0
STANDARD_TAIL = 6.0  # a norm exceeds its root-dimension by this many standard deviations once in 10^9 rounds


@dataclass(frozen=True)
class UpdateNoise:
    """`epsilon` of the whole schedule at δ for one site; `noise_to_signal` of the decoder at the end of the study."""

    epsilon: float
    noise_to_signal: float

    @property
    def objection(self) -> str:
        """Why the setting is useless, with the numbers; empty if it is not."""
        found = []
        if self.epsilon > LARGEST_USEFUL_EPSILON:
            found.append(f"ε = {self.epsilon:.3g} over the whole schedule (useful up to {LARGEST_USEFUL_EPSILON:g})")
        if self.noise_to_signal > LARGEST_USEFUL_RATIO:
            found.append(
                f"the noise moves the decoder {self.noise_to_signal:.3g} times as far as all updates together could"
            )
        return " and ".join(found)


def assess_update_noise(
    noise_multiplier: float, rounds: int, delta: float, parameters: int, weights: Sequence[float]
) -> UpdateNoise:
    """What z = `noise_multiplier` means for a study.

    ε is that of `rounds` Gaussian mechanisms with ν = z/2 (analytic Gaussian, replace-one). The decoder has
    `parameters` entries; its noise after T rounds has norm z C √(d T Σ w_k²), the largest possible sum of updates T C.
    """
    epsilon = gaussian_epsilon(delta, composed_noise_multiplier([(noise_multiplier / 2.0, rounds)]))
    spread = math.sqrt(parameters * sum(weight**2 for weight in weights) / rounds)
    return UpdateNoise(epsilon, noise_multiplier * spread)


def require_useful_noise(study: Study, parameters: int, patients: Mapping[str, int]) -> None:
    """`StudyError` with the numbers if the study's update noise is useless and the study does not accept that."""
    noise = study.privacy.update_noise
    if noise == 0 or study.privacy.accept_useless_noise:
        return
    total = sum(patients.values())
    weights = [count / total for count in patients.values()]
    found = assess_update_noise(noise, study.training.rounds, study.privacy.delta, parameters, weights)
    if found.objection:
        raise StudyError(
            f"[privacy] update_noise = {noise:g} is of no use with {len(weights)} sites, {study.training.rounds} rounds"
            f" and {parameters} parameters: {found.objection}",
            fix="set update_noise = 0 and read what the ledger says, or accept_useless_noise = true to run it anyway",
        )


def largest_noisy_norm(update_norm: float, noise_multiplier: float, parameters: int) -> float:
    """A norm that a projected update with noise exceeds once in a billion rounds: C (1 + z (√d + 6))."""
    if noise_multiplier == 0.0:
        return update_norm
    return update_norm * (1.0 + noise_multiplier * (math.sqrt(parameters) + STANDARD_TAIL))
