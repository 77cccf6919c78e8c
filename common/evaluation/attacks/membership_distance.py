"""Membership inference by distance: patients very near to a synthetic row are called members.

Half of the control sets the thresholds, so that the false-positive rate is known; the other half tests them. No model
is trained ("shadow-free"). The weakness: an outlier is far from everything, member or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor

import numpy as np

from common.evaluation.attacks.counts import AttackCounts, NotPossible, too_few
from common.evaluation.attacks.gower import nearest, nearest_other
from common.evaluation.attacks.scores import LEVELS, ScoreCounts, calibrated_edges, histogram
from common.table import Table

ATTACK = "membership_distance"
SETTING = "1 - Gower distance"
# Synthetic rows of each kind from which bins are calibrated.
CALIBRATION = 2000


def distance_attack(
    synthetic: Table, train: Table, control: Table, rng: np.random.Generator, *, levels: Sequence[float] = LEVELS
) -> tuple[list[AttackCounts | NotPossible], ScoreCounts | NotPossible]:
    """Counts of patients called members at false-positive rates of at most `levels`, and the histogram of all scores.

    The counts compare all training patients with the half of the control that set no threshold. The baseline calls
    members at random, at the same rate. The histogram holds both halves, since it needs no threshold.
    """
    settings = [f"false positives<={level:g}" for level in levels]
    few = too_few(ATTACK, None, training_patients=len(train), control_patients_a_half=len(control) // 2)
    if few is not None:
        return [NotPossible(ATTACK, None, few.reason, setting) for setting in settings], few
    if len(synthetic) < 2:
        few = NotPossible(ATTACK, None, "not possible because the cohort has one row only")
        return [NotPossible(ATTACK, None, few.reason, setting) for setting in settings], few
    # Before any draw that depends on the number of patients, so that every hospital has the same bins.
    edges = calibrated_edges(1 - calibration_distances(synthetic, rng))
    of_train, of_control = nearest(train, synthetic), nearest(control, synthetic)
    order = rng.permutation(len(control))
    half = len(control) // 2
    calibration, test = np.sort(of_control[order[:half]]), of_control[order[half:]]
    results: list[AttackCounts | NotPossible] = []
    for level, setting in zip(levels, settings, strict=True):
        allowed = floor(level * (half + 1) + 1e-9) - 1
        if allowed < 0:
            reason = f"not possible because {half} calibration patients cannot show a rate of {level:g}"
            results.append(NotPossible(ATTACK, None, reason, setting))
            continue
        # A patient's rank among the calibration patients, ties against him: P(called | no member) <= level, exactly.
        called = [np.searchsorted(calibration, d, side="right") <= allowed for d in (of_train, test)]
        results.append(
            AttackCounts(
                attack=ATTACK,
                secret=None,
                setting=setting,
                guesses=len(train),
                successes=int(called[0].sum()),
                control_guesses=len(test),
                control_successes=int(called[1].sum()),
                baseline_guesses=len(train),
                baseline_successes=int((rng.random(len(train)) < level).sum()),
            )
        )
    return results, histogram(ATTACK, SETTING, edges, 1 - of_train, 1 - of_control)


def calibration_distances(synthetic: Table, rng: np.random.Generator) -> np.ndarray:
    """Distances to the nearest synthetic row of rows that are no patients, shape (rows,); needs two synthetic rows.

    Of synthetic rows, each without itself, and of rows drawn from the product of the cohort's marginals.
    """
    chosen = rng.choice(len(synthetic), min(CALIBRATION, len(synthetic)), replace=False)
    independent = product_of_marginals(synthetic, CALIBRATION, rng)
    return np.concatenate([nearest_other(synthetic, chosen), nearest(independent, synthetic)])


def product_of_marginals(synthetic: Table, rows: int, rng: np.random.Generator) -> Table:
    """Rows whose columns are drawn from the cohort independently of each other."""
    drawn = [rng.choice(values, rows) for values in synthetic.values.T]
    return Table(synthetic.schema, np.column_stack(drawn))
