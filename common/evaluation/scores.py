"""Un-noised scores of a site: what only models fitted to patients can say; under the floor, by explicit policy.

Attacks are among them because their tables, in which a success is rare, would be hidden whole under any floor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import brier_score_loss, roc_auc_score

from common.evaluation.attack_results import COPIES
from common.evaluation.contrast import auroc_between, true_positive_rate
from common.evaluation.counts import Key, Population, count
from common.evaluation.detection import FEWEST_ROWS, Values, detect
from common.evaluation.outcome_models import fit_outcome_models, why_no_model
from common.evaluation.plan import (
    ATTACKED,
    DISTANCE,
    GUESS,
    MEMBERSHIP_BINS,
    MEMBERSHIP_SCORES,
    TRAINED_ON,
    guesses_of,
    outcome_levels,
    score_names,
)
from common.evaluation.tabulate import attack_cells, attack_on
from common.study import Protocol
from common.table import Table

DETECTION_ROWS = 2_000  # of each table: a site answers in seconds
SEED = 0  # of the folds of the detection
SEEN: tuple[Values, ...] = ("exact", "binned")


def scores(
    protocol: Protocol,
    cohort: Table,
    populations: Mapping[Population, Table],
    floor: int,
    withheld: Sequence[str] = (),
) -> dict[str, float]:
    """Every score by name, in [0, 1]; NaN where it is not defined, or where it is about fewer than `floor` patients.

    A rate with fewer than `floor` successes is given as 0, one with fewer than `floor` failures as 1.
    """
    names = score_names(protocol)
    found = dict.fromkeys(names, math.nan)
    if not names:
        return found
    found |= _detection(cohort, populations["everyone"], floor)
    if "holdout" in populations:
        found |= _utility(protocol, cohort, populations, floor)
        if min(len(populations[population]) for population in ATTACKED) >= floor:
            attack = attack_on(protocol, cohort, withheld)
            if attack is not None:
                found |= attack_scores(protocol, attack_cells(attack, populations), floor)
    return found


def _detection(cohort: Table, patients: Table, floor: int) -> dict[str, float]:
    if min(len(cohort), len(patients)) < max(FEWEST_ROWS, floor):
        return {}
    found = {}
    for seen in SEEN:
        rng = np.random.default_rng(SEED)
        area = detect(cohort, patients, rng, values=seen, most_rows=DETECTION_ROWS, columns_too=False).auroc
        found[f"detection/{seen}/auroc"] = math.nan if area is None else area.value
    return found


def _utility(
    protocol: Protocol, cohort: Table, populations: Mapping[Population, Table], floor: int
) -> dict[str, float]:
    target, found = protocol.target, dict[str, float]()
    if target is None:
        return found
    held_out = populations["holdout"]
    known = Table(held_out.schema, held_out.values[~np.isnan(held_out[target])])
    for trained, table in zip(TRAINED_ON, (cohort, populations["fit"]), strict=True):
        if why_no_model(table, target) or (trained == "trtr" and _too_few(table[target], floor)):
            continue
        for model in fit_outcome_models(table, target, seed=0):
            probabilities = model.probabilities(known)
            for level in outcome_levels(protocol):
                truth = known[target] == level
                if min(truth.sum(), (~truth).sum()) < floor:
                    continue
                name = f"{trained}/{model.name}/{level}"
                found[f"{name}/auroc"] = float(roc_auc_score(truth, probabilities[:, level]))
                found[f"{name}/brier"] = float(brier_score_loss(truth, probabilities[:, level]))
    return found


def attack_scores(protocol: Protocol, cells: Mapping[Key, NDArray[np.intp]], floor: int) -> dict[str, float]:
    """The scores of the attacks from the cells of `attack_cells`."""
    found = {}
    for score in MEMBERSHIP_SCORES:
        fit, holdout = (
            count(cells["membership", score, population], (MEMBERSHIP_BINS,))
            / len(cells["membership", score, population])
            for population in ATTACKED
        )
        found[f"membership/{score}/auroc"] = float(auroc_between(fit, holdout))
        found[f"membership/{score}/true_positive_rate"] = float(true_positive_rate(fit, holdout))
    for population in ATTACKED:
        for kind, first in COPIES.items():
            found[f"copies/{kind}/{population}"] = _rate(cells["membership", DISTANCE, population] >= first, floor)
        for key in guesses_of(protocol):
            found[f"{'/'.join(key)}/{population}"] = _rate(cells[*key, population] == GUESS - 1, floor)
    return found


def _rate(success: NDArray[np.bool_], floor: int) -> float:
    """The share of successes; 0 or 1 if the successes or the others are under the floor."""
    successes, patients = int(success.sum()), len(success)
    if successes < floor:
        return 0.0
    return 1.0 if patients - successes < floor else successes / patients


def _too_few(outcomes: NDArray[np.float64], floor: int) -> bool:
    counts = np.unique(outcomes[~np.isnan(outcomes)], return_counts=True)[1]
    return bool((counts < floor).any())
