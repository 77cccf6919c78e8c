"""Logistic regression by maximum likelihood, with standard errors; scikit-learn's has none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

Array = NDArray[np.float64]

ITERATIONS, TOLERANCE = 50, 1e-9
RIDGE = 1.0  # a normal prior with standard deviation 1 on every slope, in the units of the features
# A slope beyond this, per standard deviation, is separation: an odds ratio over 3,000,000.
LARGEST = 15.0


@dataclass(frozen=True)
class LogisticFit:
    """Intercept first, then the slopes: `coefficients`, shape (p + 1,), and `covariance`, shape (p + 1, p + 1).

    The covariance is the inverse of the (penalised) information. `ridge` is 0 for maximum likelihood.
    """

    coefficients: Array
    covariance: Array
    ridge: float

    @property
    def errors(self) -> Array:
        """Standard errors, shape (p + 1,)."""
        return np.sqrt(np.diag(self.covariance))


def fit_logistic(features: Array, outcomes: Array, *, ridge: float = 0.0, offset: Array | None = None) -> LogisticFit:
    """Newton's method on `features`, shape (n, p), p may be 0, and `outcomes` of 0 and 1, shape (n,).

    `ridge` penalises ½ · ridge · ‖slopes‖²; `offset`, shape (n,), has the coefficient 1. Raises
    `np.linalg.LinAlgError` if there is no finite maximum: one class, separation, or dependent columns.
    """
    if outcomes.size == 0 or outcomes.min() == outcomes.max():
        raise np.linalg.LinAlgError("one outcome class")
    design = np.column_stack([np.ones(len(features)), features])
    shift = np.zeros(len(design)) if offset is None else offset
    penalty = np.full(design.shape[1], ridge)
    penalty[0] = 0.0

    def loss(beta: Array) -> float:
        eta = design @ beta + shift
        return float((np.logaddexp(0.0, eta) - outcomes * eta).sum() + (penalty * beta * beta).sum() / 2)

    beta = np.zeros(design.shape[1])
    current = loss(beta)
    for _ in range(ITERATIONS):
        chance = expit(design @ beta + shift)
        gradient = design.T @ (outcomes - chance) - penalty * beta
        information = (design * (chance * (1 - chance))[:, None]).T @ design + np.diag(penalty)
        step = np.linalg.solve(information, gradient)
        size = 1.0
        while loss(beta + size * step) > current and size > 1e-6:  # a full step may overshoot
            size /= 2
        beta = beta + size * step
        current = loss(beta)
        if not np.all(np.isfinite(beta)) or np.abs(beta[1:]).max(initial=0.0) > LARGEST:
            raise np.linalg.LinAlgError("the slopes grow without bound: separation")
        if np.abs(gradient @ step) < TOLERANCE * len(design):
            return LogisticFit(beta, _inverse(design, beta, shift, penalty), ridge)
    raise np.linalg.LinAlgError("no convergence")


def _inverse(design: Array, beta: Array, shift: Array, penalty: Array) -> Array:
    chance = expit(design @ beta + shift)
    information = (design * (chance * (1 - chance))[:, None]).T @ design + np.diag(penalty)
    covariance = np.linalg.inv(information)
    if not np.all(np.diag(covariance) > 0):
        raise np.linalg.LinAlgError("the information is singular")
    return covariance
