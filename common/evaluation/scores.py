"""Un-noised scores of a site: what only models fitted to patients can say; under the floor, by explicit policy."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from sklearn.metrics import brier_score_loss, roc_auc_score

from common.evaluation.counts import Population
from common.evaluation.outcome_models import fit_outcome_models, why_no_model
from common.evaluation.plan import TRAINED_ON, outcome_levels, score_names
from common.study import Protocol
from common.table import Table


def scores(protocol: Protocol, cohort: Table, populations: Mapping[Population, Table], floor: int) -> dict[str, float]:
    """Every score by name, NaN where it is not defined or where an outcome has fewer than `floor` held-out patients."""
    found = dict.fromkeys(score_names(protocol), math.nan)
    target = protocol.target
    if not found or target is None:
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


def _too_few(outcomes: np.ndarray, floor: int) -> bool:
    counts = np.unique(outcomes[~np.isnan(outcomes)], return_counts=True)[1]
    return bool((counts < floor).any())
