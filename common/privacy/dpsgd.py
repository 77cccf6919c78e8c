"""DP-SGD in numbers: the schedule of a site, and noise calibrated once for the whole study (privacy.md, section 3).

Everything here is a function of what the study declares and of the number of patients, which is public. A step is a
Poisson-sampled Gaussian mechanism: every patient enters the batch independently with the sampling probability q, his
gradient is clipped to norm C, and N(0, (σC)² I) is added to the sum; σ is the noise multiplier, in add/remove units.
Replacing one patient moves the sum by up to 2C, which `common.privacy.conventions` accounts for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from common.errors import StudyError
from common.privacy.accountant import account
from common.privacy.events import SampledGaussianSteps
from common.privacy.gaussian import gaussian_noise_multiplier
from common.study import Study

# Multipliers are 10^(k/_RUNGS): neighbours differ by 0.12 %, far less than what any choice of batch or clip changes,
# and a result cannot depend on the last digits of a Fourier transform.
_RUNGS = 2000
_LOWEST, _HIGHEST = -_RUNGS, 5 * _RUNGS
SMALLEST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER = 10.0 ** (_LOWEST / _RUNGS), 10.0 ** (_HIGHEST / _RUNGS)
# log ε falls about this fast with log σ; only the number of evaluations depends on it.
_USUAL_SLOPE = 1.3
_MOST_INTERPOLATIONS = 12


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


@lru_cache(maxsize=1024)
def calibrate_dpsgd(steps: int, sampling_probability: float, epsilon: float, delta: float) -> float:
    """The smallest noise multiplier (add/remove units) for which `steps` steps are (ε, δ)-DP under replace-one.

    By the accountant's own bound (PLD; exact where sampling is certain), so that what is accounted later never exceeds
    `epsilon`; smallest on a grid of ratio 10^(1/2000), which errs towards more noise, and at least 0.1. `StudyError` if
    even 10^5 does not reach `epsilon`.
    """
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon must be positive and finite, got {epsilon!r}")

    def excess(rung: int) -> float:
        """log(ε / target), at most 0 where the noise suffices."""
        event = SampledGaussianSteps(1, steps, sampling_probability, _multiplier(rung))
        return math.log(max(account([event], delta).epsilon, 1e-300) / epsilon)

    # Invariant: `high` suffices and `low` does not, the ends of the ladder by assumption, checked at the end.
    low, high = _LOWEST - 1, _HIGHEST
    at_low = at_high = math.nan
    rung = _first_guess(steps, sampling_probability, epsilon, delta)
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
            # Only one side is known: go to where the usual slope leads, and a little beyond.
            step = value * _RUNGS / math.log(10) / _USUAL_SLOPE
            rung += math.ceil(1.1 * step) + 1 if step > 0 else math.floor(1.1 * step) - 1
        else:
            rung = low + math.ceil((high - low) * at_low / (at_low - at_high))
        rung = min(max(rung, low + 1), high - 1)
    if high == _HIGHEST and excess(high) > 0:
        raise StudyError(
            f"[privacy] epsilon = {epsilon:g} at delta = {delta:g} is out of reach for {steps} steps of dpsgd with"
            f" sampling probability {sampling_probability:.3g}",
            fix="ask for a larger epsilon, or plan fewer rounds",
        )
    return _multiplier(high)


def _multiplier(rung: int) -> float:
    return 10.0 ** (rung / _RUNGS)


def _first_guess(steps: int, sampling_probability: float, epsilon: float, delta: float) -> int:
    """Central limit: many steps act like one Gaussian with a shift of 2 q √steps / σ (Dong, Roth, Su 2022)."""
    multiplier = 2 * sampling_probability * math.sqrt(steps) * gaussian_noise_multiplier(epsilon, delta)
    return min(max(round(_RUNGS * math.log10(max(multiplier, 0.5))), _LOWEST), _HIGHEST - 1)
