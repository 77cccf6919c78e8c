"""A site's part of the anchor: exact statistics of its patients, and the noise that makes them an accounted message."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.anchor.cells import TableCells
from common.anchor.features import FeatureMap
from common.anchor.marginals import MarginalStatistics
from common.anchor.moments import moment_sensitivity, moment_vector
from common.encoding import EncodedTable
from common.privacy.anchor import Step
from common.privacy.events import GaussianStatistics
from common.privacy.noise import RandomNumbers
from common.records import MessageError
from common.study import Protocol

SUM_TOLERANCE = 1e-6


def exact_statistics(
    protocol: Protocol, data: EncodedTable, step: Step, marginals: NDArray[np.float64] | None
) -> tuple[NDArray[np.float64], float]:
    """The statistics of a step before noise, (values,), and their L2 sensitivity under replacing one patient.

    They never leave the site. `MessageError` for marginals that are none.
    """
    cells, levels = TableCells(protocol.schema, protocol.target), data.levels.numpy()
    if step == "marginals":
        statistics = MarginalStatistics(cells)
        return statistics.vector(levels), statistics.sensitivity
    features = FeatureMap(cells, check_marginals(cells, marginals))
    return moment_vector(features, levels), moment_sensitivity(features.radius)


def noised_statistics(
    exact: NDArray[np.float64], sensitivity: float, event: GaussianStatistics, seed: int | None
) -> NDArray[np.float64]:
    """What leaves: `exact` with N(0, (ν Δ)²) in every value, ν the event's multiplier in units of the sensitivity Δ.

    `seed=None` draws from the operating system; a seed is for simulations, whose ε is then "as if".
    """
    return exact + event.noise_multiplier * sensitivity * RandomNumbers(seed).normal(len(exact))


def check_marginals(cells: TableCells, marginals: NDArray[np.float64] | None) -> list[NDArray[np.float64]]:
    """The probabilities of every column's cells; `MessageError` unless they are: finite, none negative, sum 1.

    Nothing private depends on this: rows are clipped and the noise is scaled to the radius whatever they are. It keeps
    a coordinator's mistake from costing a spend.
    """
    if marginals is None or not np.isfinite(marginals).all() or (marginals < 0).any():
        raise MessageError("the marginals are not probabilities")
    parts = cells.split(marginals)
    if any(abs(float(part.sum()) - 1.0) > SUM_TOLERANCE for part in parts):
        raise MessageError("the marginals of a column do not add up to 1")
    return parts
