"""What an anchor's ε leaves of the data, said before anything is spent: simulated on random tables of the schema.

No patient is involved: the tables are random, only the schema, the sites' public numbers and ε are the study's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.anchor.cells import ColumnCells, TableCells
from common.anchor.features import FeatureMap
from common.anchor.marginals import MarginalStatistics
from common.anchor.moments import moment_sensitivity
from common.errors import StudyError
from common.privacy.anchor import anchor_event
from common.privacy.channel_release import fit_patients
from common.study import Protocol
from server.anchor.repair import repair_marginals

SEED = 0  # of the random tables: the same study is judged alike every time
# Beyond these a cohort says next to nothing about its patients.
LARGEST_DISTANCE = 0.25
LARGEST_NOISE = 0.3


@dataclass(frozen=True)
class Expectation:
    """`marginal_distance`: mean Kolmogorov-Smirnov distance that noise alone makes of a random table's marginals.

    `correlation_noise`: standard deviation of the noise in a correlation with the target, or without a target between
    two columns, before shrinkage.
    """

    marginal_distance: float
    correlation_noise: float

    @property
    def objection(self) -> str:
        """Why the setting is useless, with the numbers; empty if it is not."""
        found = []
        if self.marginal_distance > LARGEST_DISTANCE:
            found.append(
                f"on random tables of this schema the noise alone moves a column's distribution by"
                f" {self.marginal_distance:.2g} on average (Kolmogorov-Smirnov; useful up to {LARGEST_DISTANCE:g})"
            )
        if self.correlation_noise > LARGEST_NOISE:
            found.append(
                f"the noise in a correlation has a standard deviation of {self.correlation_noise:.2g} (useful up to"
                f" {LARGEST_NOISE:g})"
            )
        return " and ".join(found)


def expect(protocol: Protocol, patients: Mapping[str, int]) -> Expectation:
    """What the study's anchor can be expected to leave, for sites with these public numbers of patients."""
    study, rng = protocol.study, np.random.default_rng(SEED)
    cells = TableCells(protocol.schema, protocol.target)
    statistics = MarginalStatistics(cells)
    sites = len(patients)
    total = sum(fit_patients(study, count) for count in patients.values())
    true = [_random_marginal(column, rng) for column in cells.columns]
    counts = np.concatenate(
        [column.values(total * marginal) for column, marginal in zip(statistics.columns, true, strict=True)]
    )
    noise = anchor_event(study, "marginals").noise_multiplier * statistics.sensitivity * math.sqrt(sites)
    repaired = repair_marginals(statistics, counts + noise * rng.standard_normal(len(counts)), noise, total)
    distances = [np.abs(np.cumsum(a - b)).max() for a, b in zip(true, repaired, strict=True)]
    features = FeatureMap(cells, true)
    multiplier = anchor_event(study, "moments").noise_multiplier
    entry = multiplier * moment_sensitivity(features.radius) * math.sqrt(sites) / math.sqrt(2.0) / total
    return Expectation(float(np.mean(distances)), entry / float(features.weights.max()))


def require_useful_anchor(protocol: Protocol, patients: Mapping[str, int]) -> None:
    """`StudyError` with the numbers if the anchor's ε leaves too little and the study does not accept that."""
    epsilon = protocol.study.anchor.epsilon
    if epsilon is None or protocol.study.anchor.accept_useless_noise:
        return
    found = expect(protocol, patients)
    if found.objection:
        raise StudyError(
            f"[anchor] epsilon = {epsilon:g} is of no use with {len(patients)} sites,"
            f" {sum(patients.values())} patients and {len(protocol.schema.columns)} columns: {found.objection}",
            fix="nothing was spent. Raise epsilon, leave out columns or narrow their bounds, find more patients, or set"
            " accept_useless_noise = true to run it anyway",
        )


def _random_marginal(column: ColumnCells, rng: np.random.Generator) -> NDArray[np.float64]:
    """A bump somewhere on a numeric column, unequal levels of another, and a random share of missing values."""
    if column.numeric:
        position = np.linspace(0.0, 1.0, column.known)
        known = np.exp(-0.5 * np.square((position - rng.uniform(0.1, 0.9)) / rng.uniform(0.05, 0.3))) + 1e-6
    else:
        known = rng.dirichlet(np.ones(column.known))
    known = known / known.sum()
    if not column.nullable:
        return known
    missing = rng.uniform(0.0, 0.5)
    return np.append((1.0 - missing) * known, missing)
