"""DP-SGD in numbers: the schedule of a site, and noise calibrated once for the whole study (privacy.md, section 3).

Everything here is a function of what the study declares and of the number of patients, which is public. A step is a
Poisson-sampled Gaussian mechanism: every patient enters the batch independently with the sampling probability q, his
gradient is clipped to norm C, and N(0, (σC)² I) is added to the sum; σ is the noise multiplier, in add/remove units.
Replacing one patient moves the sum by up to 2C, which `common.privacy.conventions` accounts for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.errors import StudyError
from common.privacy.accountant import account
from common.privacy.calibration import LARGEST_MULTIPLIER, SMALLEST_MULTIPLIER, least_multiplier
from common.privacy.events import SampledGaussianSteps
from common.privacy.gaussian import gaussian_noise_multiplier
from common.privacy.memory import remembered
from common.study import Study

SMALLEST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER = SMALLEST_MULTIPLIER, LARGEST_MULTIPLIER
# log ε falls about this fast with log σ; only the number of evaluations depends on it.
_USUAL_SLOPE = 1.3


@dataclass(frozen=True)
class DPSGDSchedule:
    """DP-SGD of one site in every round of a study.

    `steps` a round; `sampling_probability` q of every patient in a step; `noise_multiplier` σ, noise standard deviation
    over the clipping norm; `expected_batch` q n patients, by which the noised sum of gradients is divided.
    """

    steps: int
    sampling_probability: float
    noise_multiplier: float
    expected_batch: float

    def event(self, number: int) -> SampledGaussianSteps:
        """What round `number` spends."""
        return SampledGaussianSteps(number, self.steps, self.sampling_probability, self.noise_multiplier)


def dpsgd_schedule(study: Study, patients: int) -> DPSGDSchedule:
    """The schedule of a site with n = `patients`, the same in every round: max(1, round(local_epochs n / batch)) steps.

    q = batch / n, at most 1. The noise is calibrated to the study's ε over all rounds. `StudyError` if the study
    declares no ε or one that no noise reaches.
    """
    training, privacy = study.training, study.privacy
    if privacy.epsilon is None:
        raise StudyError("[privacy] epsilon is missing: dpsgd calibrates its noise to it", fix="set epsilon")
    if patients < 1:
        raise ValueError(f"a site has at least 1 patient, got {patients}")
    steps = max(1, round(training.local_epochs * patients / training.batch_size))
    probability = min(1.0, training.batch_size / patients)
    multiplier = calibrate_dpsgd(training.rounds * steps, probability, privacy.epsilon, privacy.delta)
    return DPSGDSchedule(steps, probability, multiplier, probability * patients)


@remembered
def calibrate_dpsgd(steps: int, sampling_probability: float, epsilon: float, delta: float) -> float:
    """The smallest noise multiplier (add/remove units) for which `steps` steps are (ε, δ)-DP under replace-one.

    By the accountant's own bound (PLD; exact where sampling is certain), so that what is accounted later never exceeds
    `epsilon`; smallest on a grid of ratio 10^(1/2000), which errs towards more noise, and at least 0.1. `StudyError` if
    even 10^5 does not reach `epsilon`.
    """
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon must be positive and finite, got {epsilon!r}")

    def reached(multiplier: float) -> float:
        return account([SampledGaussianSteps(1, steps, sampling_probability, multiplier)], delta).epsilon

    # Central limit: many steps act like one Gaussian with a shift of 2 q √steps / σ (Dong, Roth, Su 2022).
    guess = 2 * sampling_probability * math.sqrt(steps) * gaussian_noise_multiplier(epsilon, delta)
    found = least_multiplier(reached, epsilon, max(guess, 0.5), _USUAL_SLOPE)
    if found is None:
        raise StudyError(
            f"[privacy] epsilon = {epsilon:g} at delta = {delta:g} is out of reach for {steps} steps of dpsgd with"
            f" sampling probability {sampling_probability:.3g}",
            fix="ask for a larger epsilon, or plan fewer rounds",
        )
    return found
