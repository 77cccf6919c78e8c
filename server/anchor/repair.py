"""From noised statistics to ones that can be true: marginals on the simplex, correlations without what is only noise.

The noise is known exactly, so every estimate is shrunk by how much of its spread noise explains (empirical Bayes).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.fft import idct
from scipy.stats import norm

from common.anchor.features import FeatureMap, Kind
from common.anchor.marginals import ColumnStatistic, MarginalStatistics

# Every cell keeps this share of a patient: what was not seen among n may still occur.
LEAST_SHARE = 1e-3
SMOOTHNESS = np.arange(0.0, 4.25, 0.25)  # exponents of the prior's decay over frequencies
SCALES = 10.0 ** -np.linspace(-4.0, 6.0, 41)
EM_STEPS = 100


def repair_marginals(
    statistics: MarginalStatistics, noised: NDArray[np.float64], noise: float, patients: int
) -> list[NDArray[np.float64]]:
    """Probabilities of every column's cells from the pooled values of message one.

    `noise` is the standard deviation in every value, `patients` the public number behind the counts.
    """
    parts = statistics.split(noised)
    return [_marginal(column, part, noise, patients) for column, part in zip(statistics.columns, parts, strict=True)]


def _marginal(
    statistic: ColumnStatistic, values: NDArray[np.float64], noise: float, patients: int
) -> NDArray[np.float64]:
    column = statistic.column
    if not statistic.smooth:
        counts = project_to_simplex(values, patients)
    else:
        missing = min(max(float(values[-1]), 0.0), float(patients)) if column.nullable else 0.0
        known = patients - missing
        coefficients = values[: column.known - 1] / statistic.weights
        spread = noise / statistic.weights
        smoothed = coefficients * _kept(coefficients, spread, known / np.sqrt(column.known))
        smoothed = np.concatenate([[known / np.sqrt(column.known)], smoothed])
        bins = project_to_simplex(np.asarray(idct(smoothed, norm="ortho")), known)
        counts = np.append(bins, missing) if column.nullable else bins
    shares = np.maximum(counts, LEAST_SHARE)
    return shares / shares.sum()


def _kept(values: NDArray[np.float64], noise: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
    """The share of every coefficient that is kept: v / (v + noise²), v = (scale b)² f^-2γ of largest likelihood."""
    if not noise.any():
        return np.ones_like(values)
    frequency = np.arange(1.0, len(values) + 1)
    prior = (scale * SCALES[:, None, None]) ** 2 * frequency ** (-2.0 * SMOOTHNESS[None, :, None])
    variance = prior + np.square(noise)
    likelihood = -(np.log(variance) + np.square(values) / variance).sum(axis=-1)
    best = prior[np.unravel_index(int(likelihood.argmax()), likelihood.shape)]
    return best / (best + np.square(noise))


def project_to_simplex(values: NDArray[np.float64], total: float) -> NDArray[np.float64]:
    """The nearest vector that is not negative and adds up to `total` (Duchi et al. 2008)."""
    if total <= 0:
        return np.zeros_like(values)
    ordered = np.sort(values)[::-1]
    excess = (np.cumsum(ordered) - total) / np.arange(1, len(values) + 1)
    return np.maximum(values - excess[np.flatnonzero(ordered > excess)[-1]], 0.0)


def repair_moments(
    features: FeatureMap, noised: NDArray[np.float64], noise: float, patients: int
) -> NDArray[np.float64]:
    """Mean second moments (features, features) with the entries between columns shrunk towards 0.

    `noised` is the pooled sum, `noise` the standard deviation of one of its entries off the diagonal. Entries of one
    kind (with the target, of ranks and levels, of curvatures) share a prior: 0, or normal with a common variance.
    """
    mean = noised / patients
    groups = _groups(features)
    result = mean.copy()
    for group in np.unique(groups[groups >= 0]) if noise > 0 else ():
        chosen = groups == group
        result[chosen] = _shrunk(mean[chosen], noise / patients)
    return (result + result.T) / 2.0


def _groups(features: FeatureMap) -> NDArray[np.int64]:
    """Which prior an entry has; -1 inside a column, whose moments follow from its marginal."""
    target = features.owner == (-1 if features.cells.target is None else features.cells.target)
    curved = np.array([kind is Kind.CURVATURE for kind in features.kinds])
    either_target, either_curved = target[:, None] | target[None, :], curved[:, None] | curved[None, :]
    groups = 2 * either_target + either_curved
    return np.where(features.owner[:, None] == features.owner[None, :], -1, groups)


def _shrunk(values: NDArray[np.float64], noise: float) -> NDArray[np.float64]:
    """Posterior means under a mixture of 0 and N(0, s²), both fitted by expectation-maximisation."""
    share, variance = 0.3, max(float(np.mean(np.square(values))) - noise**2, 1e-8) / 0.3
    odds = np.zeros_like(values)
    for _ in range(EM_STEPS):
        slab = norm.logpdf(values, 0.0, math.hypot(noise, math.sqrt(variance)))
        spike = norm.logpdf(values, 0.0, noise)
        odds = share / (share + (1.0 - share) * np.exp(np.clip(spike - slab, -700.0, 700.0)))
        share = min(max(float(odds.mean()), 0.02), 0.98)
        # Never below a twentieth of the noise's variance, where the two components are one.
        variance = max(float((odds * np.square(values)).sum() / odds.sum()) - noise**2, 0.05 * noise**2)
    return odds * values * variance / (variance + noise**2)
