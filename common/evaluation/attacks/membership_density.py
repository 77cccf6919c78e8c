"""Membership inference by density ratio, after DOMIAS (van Breugel et al. 2023, arXiv 2302.12580).

A patient is called a member where the cohort is dense and the population is not, which finds local overfitting that a
distance alone does not show. A density is estimated from the distance r to the k-th nearest row (density ~ r^-d), so
that the ratio of two orders patients like r_reference / r_cohort. The score is r_reference / (r_reference + r_cohort),
in [0, 1]; 1 is a copy. In the cohort k is 1, as overfitting is local; in the reference it is larger, as the population
is smooth.

The reference stands for the population: held-out patients that are not in the control where there are some; otherwise
the product of the cohort's own marginals, which finds fewer members at low false-positive rates. Distances are
Euclidean between encoded rows: every column has the same mean square in the cohort, categories are one-hot, missing is
a flag.
"""

from __future__ import annotations

import numpy as np

from common.encoding.number import to_unit
from common.evaluation.attacks.counts import NotPossible, too_few
from common.evaluation.attacks.membership_distance import CALIBRATION, product_of_marginals
from common.evaluation.attacks.scores import ScoreCounts, calibrated_edges, histogram
from common.table import Table

ATTACK = "membership_density"
COHORT_NEIGHBOURS, REFERENCE_NEIGHBOURS = 1, 10
OWN_MARGINALS = "product of the cohort's own marginals"
PATIENTS = "held-out patients not in the control"
# Smallest standard deviation by which an encoded column is divided; smaller ones would let rare values drown the rest.
LEAST_SPREAD = 0.05
BLOCK = 1 << 22


def density_attack(
    synthetic: Table,
    train: Table,
    control: Table,
    rng: np.random.Generator,
    *,
    reference: Table | None = None,
    k: tuple[int, int] = (COHORT_NEIGHBOURS, REFERENCE_NEIGHBOURS),
) -> ScoreCounts | NotPossible:
    """Histogram of the density-ratio scores of training and control patients; `k` is of the cohort and the reference.

    Bins are calibrated on synthetic rows and the product of their marginals alone, also where the scores use
    `reference` patients, so that hospitals with the same cohort and the same state of `rng` have the same bins.
    """
    setting = f"reference: {OWN_MARGINALS if reference is None else PATIENTS}; k={k[0]},{k[1]}"
    few = too_few(ATTACK, None, setting, training_patients=len(train), control_patients=len(control))
    if few is None and reference is not None:
        few = too_few(ATTACK, None, setting, reference_patients=len(reference))
    if few is not None:
        return few
    if len(synthetic) <= max(k):
        return NotPossible(ATTACK, None, f"not possible because the cohort has {len(synthetic)} row(s) only", setting)
    ratio = DensityRatio(synthetic, rng, k)
    edges = calibrated_edges(ratio.calibration)
    return histogram(ATTACK, setting, edges, *(ratio(patients, reference) for patients in (train, control)))


class DensityRatio:
    """The score of a row, made from the cohort and `rng` alone.

    `calibration` are scores of rows that are no patients: of synthetic ones, each without itself, and of rows drawn
    from the product of the cohort's marginals, shape (scores,). The cohort needs more rows than either of `k`.
    """

    def __init__(
        self,
        synthetic: Table,
        rng: np.random.Generator,
        k: tuple[int, int] = (COHORT_NEIGHBOURS, REFERENCE_NEIGHBOURS),
    ) -> None:
        self._encode, self._k = Encoder(synthetic), k
        self._cohort = self._encode(synthetic)
        self._independent = self._encode(product_of_marginals(synthetic, len(synthetic), rng))
        chosen = rng.choice(len(synthetic), min(CALIBRATION, len(synthetic)), replace=False)
        fresh = self._encode(product_of_marginals(synthetic, CALIBRATION, rng))
        own, others = self._scores(self._cohort[chosen], self._independent, chosen), self._scores(fresh)
        self.calibration = np.concatenate([own, others])

    def __call__(self, table: Table, reference: Table | None = None) -> np.ndarray:
        """Scores in [0, 1], shape (rows,); the population is `reference`, or the product of the cohort's marginals.

        Without `reference` the score of a row depends on no other row of `table`.
        """
        return self._scores(self._encode(table), None if reference is None else self._encode(reference))

    def _scores(
        self, rows: np.ndarray, population: np.ndarray | None = None, itself: np.ndarray | None = None
    ) -> np.ndarray:
        to_cohort = kth_distance(rows, self._cohort, self._k[0], itself=itself)
        to_population = kth_distance(rows, self._independent if population is None else population, self._k[1])
        both = to_cohort + to_population
        return np.where(both > 0, to_population / np.where(both > 0, both, 1.0), 0.5)


class Encoder:
    """Rows as points, with spreads measured on the cohort alone; float64, shape (rows, features)."""

    def __init__(self, cohort: Table) -> None:
        self._centres: list[float] = []
        self._spreads: list[tuple[float, float]] = []
        for column, values in zip(cohort.schema.columns, cohort.values.T, strict=True):
            known = ~np.isnan(values)
            if column.is_numeric:
                unit = to_unit(values[known], column) / 2
                centre, spread = (float(unit.mean()), float(unit.std())) if unit.size else (0.0, 0.0)
                flag = float(known.std())
            else:
                codes = np.where(known, values, len(column.levels)).astype(np.intp)
                shares = np.bincount(codes, minlength=len(column.levels) + 1) / len(codes)
                # Root of the summed variances of the indicators.
                centre, spread, flag = 0.0, float(np.sqrt(max(0.0, 1 - (shares**2).sum()))), 0.0
            self._centres.append(centre)
            self._spreads.append((max(spread, LEAST_SPREAD), max(flag, LEAST_SPREAD)))

    def __call__(self, table: Table) -> np.ndarray:
        """Encode a table of the cohort's schema."""
        features: list[np.ndarray] = []
        for j, column in enumerate(table.schema.columns):
            values, (spread, flag) = table.values[:, j], self._spreads[j]
            gone = np.isnan(values)
            if column.is_numeric:
                features.append(np.where(gone, 0.0, (to_unit(values, column) / 2 - self._centres[j]) / spread))
                if column.nullable:
                    features.append(gone / flag)
            else:
                codes = np.where(gone, len(column.levels), values)
                features += list((codes == np.arange(len(column.levels) + 1)[:, None]) / spread)
        return np.column_stack(features)


def kth_distance(points: np.ndarray, among: np.ndarray, k: int, *, itself: np.ndarray | None = None) -> np.ndarray:
    """Euclidean distance of every point to the k-th nearest row of `among`, shape (points,).

    With `itself`, point i is row itself[i] of `among`, which is then not counted.
    """
    result = np.empty(len(points))
    squares = (among**2).sum(axis=1)
    size = max(1, BLOCK // len(among))
    for start in range(0, len(points), size):
        chunk = points[start : start + size]
        # Squared distances less |point|², which does not change the order.
        order = squares - 2 * (chunk @ among.T)
        if itself is not None:
            order[np.arange(len(chunk)), itself[start : start + size]] = np.inf
        near = np.argpartition(order, k - 1, axis=1)[:, :k]
        # Computed anew from differences: the form above cancels where rows are copies.
        exact = np.sqrt(((chunk[:, None, :] - among[near]) ** 2).sum(axis=2))
        result[start : start + size] = exact.max(axis=1)
    return result
