"""Attacks in tables: every patient in exactly one cell of each, by what the cohort says of him alone.

Guesses, scores and their bins are made from the cohort and fixed random numbers, so that no patient moves another
one's cell and replacing one moves one count a table, however many attacks there are. Singling out is not here: its
unit is a description that fits exactly one patient, of which one patient can change many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.evaluation.attacks.copies import THRESHOLD
from common.evaluation.attacks.counts import MINIMUM_GUESSES
from common.evaluation.attacks.gower import blocks
from common.evaluation.attacks.inference import TOLERANCE, guessed_right
from common.evaluation.attacks.linkability import halves
from common.evaluation.attacks.membership_density import DensityRatio
from common.evaluation.attacks.membership_distance import calibration_distances
from common.evaluation.attacks.rows import canonical, contained
from common.evaluation.counts import Key
from common.evaluation.plan import DENSITY, DISTANCE, MEMBERSHIP_BINS
from common.table import Table

SEED = 0  # of the rows from which bins are calibrated: every site has the same ones
# Where bins of a score end, in its distribution over rows that are no patients; finer where members are expected.
DENSITY_QUANTILES = (0.08, 0.2, 0.32, 0.44, 0.55, 0.65, 0.75, 0.84, 0.91, 0.96, 0.99)
DISTANCE_QUANTILES = (0.1, 0.25, 0.4, 0.52, 0.64, 0.74, 0.84, 0.92, 0.97)  # and one each of near and of exact copies
# No distance between rows reaches this; it is added where a synthetic row has no secret to offer.
FAR = np.float32(1e6)


@dataclass(frozen=True)
class _Nearest:
    """What one pass over all pairs of rows finds: distances, linked halves and guessed secrets."""

    distance: NDArray[np.float64]
    linked: NDArray[np.bool_]
    guesses: NDArray[np.float64]


class AttackCells:
    """The attacks with one cohort; `secrets` are the columns of the inference attack.

    The cohort needs `MINIMUM_GUESSES` rows; columns that a site withholds are missing in it.
    """

    def __init__(self, cohort: Table, secrets: Sequence[str]) -> None:
        self._cohort = cohort
        self._secrets = [cohort.schema.index(name) for name in secrets]
        density, distance = np.random.default_rng(SEED).spawn(2)
        self._density = DensityRatio(cohort, density)
        self._density_edges = np.quantile(self._density.calibration, DENSITY_QUANTILES)
        far = -calibration_distances(cohort, distance)
        # Below the near copies, which have a bin of their own.
        self._distance_edges = np.minimum(np.quantile(far, DISTANCE_QUANTILES), -THRESHOLD)
        self._rows = canonical(cohort)

    def __call__(self, table: Table) -> dict[Key, NDArray[np.intp]]:
        """The cell of every row in every table, named by the beginning of its key; higher cells speak for a member."""
        found = self._nearest(table)
        density = np.searchsorted(self._density_edges, self._density(table), side="right")
        distance = np.searchsorted(self._distance_edges, -found.distance, side="left")
        distance[found.distance <= THRESHOLD] = MEMBERSHIP_BINS - 2
        distance[contained(canonical(table), self._rows)] = MEMBERSHIP_BINS - 1
        cells: dict[Key, NDArray[np.intp]] = {("membership", DENSITY): density, ("membership", DISTANCE): distance}
        if len(table.schema.columns) > 1:
            cells["linkability",] = found.linked.astype(np.intp)
        for position, guesses in zip(self._secrets, found.guesses.T, strict=True):
            column, truth = table.schema.columns[position], table.values[:, position]
            # A patient whose secret is not known is not guessed: he stays in the table, whose total is public.
            known, right = ~np.isnan(truth) & ~np.isnan(guesses), np.zeros(len(table), dtype=np.intp)
            right[known] = guessed_right(guesses[known], truth[known], column, TOLERANCE)
            cells["inference", column.name] = right
        return cells

    def _nearest(self, table: Table) -> _Nearest:
        """Block by block; the same rows as in `gower.nearest`, `linkability.link` with k = 1 and `inference.infer`."""
        schema, rows = table.schema, self._cohort
        left, right = ([schema.index(name) for name in half] for half in halves(schema))
        distance, linked = np.empty(len(table)), np.empty(len(table), dtype=np.bool_)
        guesses = np.empty((len(table), len(self._secrets)))
        unknown = [np.where(np.isnan(rows.values[:, j]), FAR, np.float32(0)) for j in self._secrets]
        for one, other in zip(blocks(table, rows, left), blocks(table, rows, right), strict=True):
            total = one.total + other.total
            distance[one.rows] = total.min(axis=1) / len(schema.columns)
            linked[one.rows] = one.total.argmin(axis=1) == other.total.argmin(axis=1)
            for i, j in enumerate(self._secrets):
                part = one.part(left.index(j)) if j in left else other.part(right.index(j))
                guesses[one.rows, i] = rows.values[(total - part + unknown[i]).argmin(axis=1), j]
        return _Nearest(distance, linked, guesses)


def why_no_attack(cohort_rows: int) -> str:
    """Why a cohort of so many rows is not attacked; empty if it is."""
    if cohort_rows >= MINIMUM_GUESSES:
        return ""
    return f"not possible because the cohort has {cohort_rows} rows; {MINIMUM_GUESSES} are needed"
