"""Fit the copula to the noised statistics: its own rows, encoded like a site's, shall have the same second moments.

Clipping, levels, missing values and classes distort a latent correlation on its way into a moment. Instead of inverting
that, the moments of simulated rows are compared with the wanted ones and the parameters are moved, a few times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.anchor.features import FeatureMap, Kind
from server.anchor.copula import ColumnMap, Copula, draw_classes

ROWS = 20_000
STEPS = 10
DAMPING = 0.8
LARGEST_STEP = 0.4  # of a correlation in one step
LARGEST_TILT = 1.0
# Ridge on the gain of a pair: where a latent correlation hardly shows in a moment, a moment says little about it.
GAIN_RIDGE = 0.01
TILT_RIDGE = 0.02
LEAST_GAIN = 0.03
LEAST_EIGENVALUE = 1e-3


@dataclass(frozen=True)
class Fit:
    """The copula, and how far its moments stay from the wanted ones: mean absolute difference between columns."""

    copula: Copula
    distance: float


class _Fitter:
    def __init__(
        self, features: FeatureMap, marginals: Sequence[NDArray[np.float64]], wanted: NDArray[np.float64], seed: int
    ) -> None:
        self.features, self.cells, self.wanted = features, features.cells, wanted
        self.marginals, self.rng = list(marginals), np.random.default_rng(seed)
        target = self.cells.target
        self.classes = np.ones(1) if target is None else np.asarray(marginals[target], dtype=np.float64)
        self.conditional = {
            j: np.repeat(marginals[j][:, None], len(self.classes), axis=1)
            for j in range(len(self.cells.columns))
            if j != target
        }
        self.tilts = {j: np.zeros((len(features.columns[j].kinds), len(self.classes))) for j in self.conditional}
        # The feature that stands for each entry of the code: all but the curvatures, which have none of their own.
        self.read = np.array(
            [i for i, kind in enumerate(features.kinds) if kind is not Kind.CURVATURE and features.owner[i] != target],
            dtype=np.int64,
        )
        owner = features.owner[self.read]
        self.between = owner[:, None] != owner[None, :]
        self.correlation = np.eye(len(self.read))
        self.codes = self.rng.standard_normal((ROWS, len(self.read)))
        self.drawn = draw_classes(self.classes, self.rng.random(ROWS))
        self.gain = np.zeros((0, 0))

    def copula(self) -> Copula:
        columns = tuple(
            ColumnMap(self.cells.columns[j], conditional, self.features.columns[j].order)
            for j, conditional in self.conditional.items()
        )
        return Copula(self.cells, self.classes, columns, np.asarray(np.linalg.cholesky(self.correlation), np.float64))

    def step(self) -> float:
        """Move the parameters once; returns the mean absolute difference of moments that was found before."""
        copula = self.copula()
        rows = self.features.of(copula.rows(self.codes, self.drawn, self.rng))
        difference = self.wanted - rows.T @ rows / ROWS
        if self.gain.size == 0:
            gain = np.maximum((rows[:, self.read] * self.codes).mean(axis=0), LEAST_GAIN)
            self.gain = np.outer(gain, gain)
        self._tilt(difference)
        latent = difference[np.ix_(self.read, self.read)]
        step = latent * self.gain / (np.square(self.gain) + GAIN_RIDGE)
        step = np.where(self.between, DAMPING * np.clip(step, -LARGEST_STEP, LARGEST_STEP), 0.0)
        self.correlation = nearest_correlation(self.correlation + step)
        return float(np.abs(latent[self.between]).mean()) if self.between.any() else 0.0

    def _tilt(self, difference: NDArray[np.float64]) -> None:
        """Move every column's distribution in each class so that its features' class means move as wanted."""
        target = self.cells.target
        if target is None:
            return
        own = self.features.owner == target
        # Σ_y p(y) t_d(y) m(y) = wanted moment for every target feature t_d, and Σ_y p(y) m(y) = 0.
        table = self.features.columns[target].table
        equations = np.vstack([self.classes, (self.classes[:, None] * table).T])
        wanted = np.vstack([np.zeros(self.features.size), difference[own]])
        means = np.linalg.lstsq(equations, wanted, rcond=None)[0]
        for j in self.conditional:
            start, stop = self.features.starts[j], self.features.starts[j + 1]
            table, marginal = self.features.columns[j].table, self.marginals[j]
            for label in range(len(self.classes)):
                shares = self.conditional[j][:, label]
                centred = table - shares @ table
                spread = centred.T @ (centred * shares[:, None]) + TILT_RIDGE * np.eye(table.shape[1])
                move = np.linalg.solve(spread, means[label, start:stop])
                self.tilts[j][:, label] += DAMPING * np.clip(move, -LARGEST_TILT, LARGEST_TILT)
            self.conditional[j] = tilted(marginal, table @ self.tilts[j], self.classes)


def fit_copula(
    features: FeatureMap, marginals: Sequence[NDArray[np.float64]], wanted: NDArray[np.float64], seed: int
) -> Fit:
    """The copula whose rows have the second moments `wanted` (features, features), as nearly as it can.

    `marginals` are the probabilities of every column's cells, which it keeps.
    """
    fitter = _Fitter(features, marginals, wanted, seed)
    distances = [fitter.step() for _ in range(STEPS)]
    return Fit(fitter.copula(), distances[-1])


def tilted(
    marginal: NDArray[np.float64], exponents: NDArray[np.float64], classes: NDArray[np.float64]
) -> NDArray[np.float64]:
    """p(cell | class) ∝ p(cell) e^exponent, (cells, classes), scaled until the classes nearly mix to `marginal`."""
    logarithms = np.log(np.maximum(marginal, 1e-300))[:, None] + exponents
    result = np.exp(logarithms - logarithms.max(axis=0))
    result /= result.sum(axis=0)
    for _ in range(3):
        result *= (marginal / np.maximum(result @ classes, 1e-300))[:, None]
        result /= result.sum(axis=0)
    return result


def nearest_correlation(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Eigenvalues raised to `LEAST_EIGENVALUE`, then rescaled to a unit diagonal."""
    if not len(matrix):
        return matrix
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2.0)
    raised = (vectors * np.maximum(values, LEAST_EIGENVALUE)) @ vectors.T
    scale = np.sqrt(np.diag(raised))
    return raised / scale[:, None] / scale[None, :]
