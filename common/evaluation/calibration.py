"""Whether predicted probabilities mean what they say on held-out patients: a model learned on one table, tested there.

After Van Calster et al. 2019 (BMC Medicine 17:230): calibration in the large, slope, and a curve with intervals. Every
number is an un-noised aggregate of patients (privacy.md, section 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import logit
from scipy.stats import norm

from common.evaluation.attacks.risk import Estimate, wilson
from common.evaluation.logistic import fit_logistic
from common.evaluation.outcome_models import OutcomeModel
from common.schema import Schema
from common.table import Table

BINS = 10
FEWEST = 11  # patients in a bin of the curve, and patients with and without the outcome for anything at all
SURE = 1e-6  # probabilities are cut to [SURE, 1 - SURE] before a logit is taken
Array = NDArray[np.float64]


@dataclass(frozen=True)
class CurveBin:
    """Patients with similar predictions: how many, the mean prediction, and the observed share (Wilson interval)."""

    patients: int
    predicted: float
    observed: Estimate


@dataclass(frozen=True)
class Calibration:
    """Calibration of one model for one level of the target, on `patients` with a known outcome.

    `intercept`: calibration in the large, the intercept of a logistic recalibration with the slope held at 1; 0 is
    right, below 0 predictions are too high. `slope` of the recalibration: 1 is right, below 1 predictions are too
    extreme. `brier` is the mean squared error of the probabilities, `brier_prevalence` that of predicting everybody's
    share. None where `reason` says why.
    """

    model: str
    level: str
    patients: int
    intercept: Estimate | None
    slope: Estimate | None
    brier: float | None
    brier_prevalence: float | None
    curve: tuple[CurveBin, ...]
    reason: str = ""


def predicted_levels(schema: Schema, target: str) -> tuple[int, ...]:
    """The levels whose prediction is judged: the second of two, or each of more."""
    levels = len(schema[target].levels)
    return (1,) if levels == 2 else tuple(range(levels))


def calibrate(models: Sequence[OutcomeModel], test: Table, target: str, confidence: float = 0.95) -> list[Calibration]:
    """The calibration on `test` of every model for every level of `predicted_levels`."""
    known = Table(test.schema, test.values[~np.isnan(test[target])])
    found = []
    for model in models:
        probabilities = model.probabilities(known) if len(known) else np.empty((0, len(test.schema[target].levels)))
        for level in predicted_levels(test.schema, target):
            name = test.schema[target].levels[level]
            found.append(calibration_of(model.name, name, probabilities[:, level], known[target] == level, confidence))
    return found


def calibration_of(
    model: str, level: str, predicted: Array, outcome: NDArray[np.bool_], confidence: float = 0.95
) -> Calibration:
    """The calibration of probabilities `predicted` of an `outcome`, both of shape (n,)."""
    patients, events = len(outcome), int(outcome.sum())
    if min(events, patients - events) < FEWEST:
        reason = f"not possible because fewer than {FEWEST} patients are known to have {level!r}, or not to have it"
        return Calibration(model, level, patients, None, None, None, None, (), reason)
    intercept, slope, reason = _recalibrated(predicted, outcome.astype(np.float64), confidence)
    share = events / patients
    return Calibration(
        model=model,
        level=level,
        patients=patients,
        intercept=intercept,
        slope=slope,
        brier=float(np.mean((predicted - outcome) ** 2)),
        brier_prevalence=share * (1 - share),
        curve=_curve(predicted, outcome, confidence),
        reason=reason,
    )


def _recalibrated(predicted: Array, outcome: Array, confidence: float) -> tuple[Estimate | None, Estimate | None, str]:
    score = logit(np.clip(predicted, SURE, 1 - SURE))
    if np.ptp(score) == 0:
        return None, None, "no intercept and slope, because the model predicts the same for everybody"
    z = float(norm.ppf((1 + confidence) / 2))
    intercept = slope = None
    try:
        large = fit_logistic(np.empty((len(score), 0)), outcome, offset=score)
        intercept = _estimate(float(large.coefficients[0]), z * float(large.errors[0]))
        # Fitted per standard deviation, where the solver's limit on a slope means the same for every model.
        spread = float(score.std())
        line = fit_logistic(score[:, None] / spread, outcome)
        slope = _estimate(float(line.coefficients[1]) / spread, z * float(line.errors[1]) / spread)
    except np.linalg.LinAlgError as error:
        return intercept, slope, f"the recalibration has no finite solution ({error})"
    return intercept, slope, ""


def _estimate(value: float, half: float) -> Estimate:
    return Estimate(value, value - half, value + half)


def _curve(predicted: Array, outcome: NDArray[np.bool_], confidence: float) -> tuple[CurveBin, ...]:
    """Bins with equally many patients, at most `BINS` and none under `FEWEST`; equal predictions stay together."""
    ordered = np.sort(predicted)
    bins = min(BINS, len(ordered) // FEWEST)
    edges = np.unique(ordered[[len(ordered) * k // bins for k in range(1, bins)]])
    which = np.searchsorted(edges, predicted, side="right")
    sizes = np.bincount(which)
    merged, last = np.zeros(len(sizes), dtype=np.intp), 0
    kept = 0
    for index, size in enumerate(sizes):  # a bin that ties left small joins the one before it
        if kept >= FEWEST and sizes[index:].sum() >= FEWEST:
            last, kept = last + 1, 0
        merged[index], kept = last, kept + int(size)
    which = merged[which]
    found = []
    for index in range(last + 1):
        inside = which == index
        patients = int(inside.sum())
        observed = wilson(int(outcome[inside].sum()), patients, confidence)
        found.append(CurveBin(patients, float(predicted[inside].mean()), observed))
    return tuple(found)
