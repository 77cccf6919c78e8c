"""Whether a prognostic model learned on one table holds on another: AUROC of two classifiers.

TSTR trains on synthetic rows and tests on patients; TRTR, its ceiling, trains on patients (Esteban, Hyland and Rätsch
2017, arXiv:1706.02633).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from common.errors import DataError
from common.evaluation.outcome_models import fit_outcome_models, why_no_model
from common.table import Table


@dataclass(frozen=True)
class Utility:
    """AUROC on the test table of two classifiers trained on the training table; None if `reason` says why.

    Row counts are of rows with a known outcome; `*_left_out` counts the rows without one.
    """

    gradient_boosting: float | None
    logistic_regression: float | None
    train_rows: int
    test_rows: int
    train_left_out: int
    test_left_out: int
    reason: str = ""


@dataclass(frozen=True)
class UtilityGap:
    """What training on synthetic rows costs in AUROC: TRTR − TSTR (negative: synthetic did better), or None."""

    gradient_boosting: float | None
    logistic_regression: float | None


def utility_gap(tstr: Utility, trtr: Utility) -> UtilityGap:
    """TRTR − TSTR for each classifier; None where either is None."""
    return UtilityGap(
        _difference(trtr.gradient_boosting, tstr.gradient_boosting),
        _difference(trtr.logistic_regression, tstr.logistic_regression),
    )


def _difference(ceiling: float | None, reached: float | None) -> float | None:
    return None if ceiling is None or reached is None else ceiling - reached


def train_and_test(train: Table, test: Table, target: str, seed: int) -> Utility:
    """Train on `train`, score on `test`, predicting `target` from all other columns.

    For a target of two levels the second declared one is positive. For more, the AUROC of each level against the rest
    is averaged over the levels that occur in `test`; a level that `train` lacks scores 0.5 there. A table that allows
    no AUROC (no known outcome, or one outcome class) gives None and a reason.

    Raises `DataError` if the schemas differ, or `target` is not a categorical or boolean column.
    """
    if train.schema.digest != test.schema.digest:
        raise DataError(
            "the training and the test table have different schemas",
            fix="read both with the study's schema.json",
        )
    if target not in train.schema.names or train.schema[target].is_numeric:
        raise DataError(
            f"the target {target!r} is not a column with categories",
            fix="set cohortium:target to a boolean column or a string column with an enum",
        )
    known_train, known_test = ~np.isnan(train[target]), ~np.isnan(test[target])
    y_test = test[target][known_test].astype(np.intp)
    counts: dict[str, Any] = {
        "train_rows": int(known_train.sum()),
        "test_rows": int(known_test.sum()),
        "train_left_out": int((~known_train).sum()),
        "test_left_out": int((~known_test).sum()),
    }
    reason = why_no_model(train, target) or _why_untestable(y_test)
    if reason:
        return Utility(None, None, **counts, reason=reason)

    known = Table(test.schema, test.values[known_test])
    models = fit_outcome_models(train, target, seed)
    boosted, linear = (_auroc(y_test, model.probabilities(known)) for model in models)
    return Utility(boosted, linear, **counts)


def _why_untestable(outcomes: np.ndarray) -> str:
    if outcomes.size == 0:
        return "the test table has no row with a known outcome"
    if np.unique(outcomes).size == 1:
        return "the test table has one outcome class only"
    return ""


def _auroc(outcomes: np.ndarray, probabilities: np.ndarray) -> float:
    """AUROC of class probabilities, shape (rows, levels), for level indices, shape (rows,)."""
    if probabilities.shape[1] == 2:
        return float(roc_auc_score(outcomes == 1, probabilities[:, 1]))
    present = np.unique(outcomes)
    return float(np.mean([roc_auc_score(outcomes == level, probabilities[:, level]) for level in present]))
