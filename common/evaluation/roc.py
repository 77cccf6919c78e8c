"""The receiver operating characteristic of outcome models on held-out patients, for a picture.

Every number is an un-noised aggregate of patients (privacy.md, section 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.evaluation.attacks.risk import Estimate
from common.evaluation.auroc import auroc_estimate, delong
from common.evaluation.calibration import FEWEST, predicted_levels
from common.evaluation.outcome_models import OutcomeModel
from common.table import Table

POINTS = 51  # of a curve, at false-positive rates 0, 0.02, …, 1
DIGITS = 4


@dataclass(frozen=True)
class RocCurve:
    """True-positive rates at `POINTS` equally spaced false-positive rates, and the AUROC with DeLong's interval.

    Between two thresholds the curve is straight, as is usual where several patients have one score. None and no points
    where `reason` says why.
    """

    model: str
    level: str
    patients: int
    auroc: Estimate | None
    sensitivity: tuple[float, ...]
    reason: str = ""


def roc_curves(models: Sequence[OutcomeModel], test: Table, target: str) -> list[RocCurve]:
    """The curve on `test` of every model and level of `predicted_levels`; both outcomes need `FEWEST` patients."""
    known = Table(test.schema, test.values[~np.isnan(test[target])])
    found = []
    for model in models:
        probabilities = model.probabilities(known) if len(known) else np.empty((0, len(test.schema[target].levels)))
        for level in predicted_levels(test.schema, target):
            name, truth = test.schema[target].levels[level], known[target] == level
            if min(int(truth.sum()), int((~truth).sum())) < FEWEST:
                reason = (
                    f"not possible because fewer than {FEWEST} patients are known to have {name!r}, or not to have it"
                )
                found.append(RocCurve(model.name, name, len(known), None, (), reason))
                continue
            scores = probabilities[:, level]
            area = auroc_estimate(*delong(truth, scores))
            found.append(RocCurve(model.name, name, len(known), area, curve(truth, scores)))
    return found


def curve(truth: NDArray[np.bool_], scores: NDArray[np.float64]) -> tuple[float, ...]:
    """True-positive rates at the fixed false-positive rates; `truth` and `scores` have shape (n,), both classes."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), scores.size - 1)  # of every group of equal scores
    hits = np.cumsum(truth[order])[last] / truth.sum()
    alarms = np.cumsum(~truth[order])[last] / (~truth).sum()
    at = np.linspace(0.0, 1.0, POINTS)
    # Of several points at one rate `interp` takes the last, the highest: a threshold just there finds so many.
    return tuple(round(float(v), DIGITS) for v in np.interp(at, np.append(0.0, alarms), np.append(0.0, hits)))
