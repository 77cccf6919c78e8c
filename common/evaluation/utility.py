"""Whether a prognostic model learned on one table holds on another: AUROC of two classifiers.

TSTR trains on synthetic rows and tests on patients; TRTR, its ceiling, trains on patients (Esteban, Hyland and Rätsch
2017, arXiv:1706.02633).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from threadpoolctl import threadpool_limits

from common.errors import DataError
from common.table import Table

# L2-penalised logistic regression on standardised features needs tens of iterations; this is never the limit.
MAX_ITERATIONS = 5000
PARALLEL_ROWS = 100_000


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
    y_train = train[target][known_train].astype(np.intp)
    y_test = test[target][known_test].astype(np.intp)
    counts: dict[str, Any] = {
        "train_rows": int(known_train.sum()),
        "test_rows": int(known_test.sum()),
        "train_left_out": int((~known_train).sum()),
        "test_left_out": int((~known_test).sum()),
    }
    reason = _why_impossible(y_train, y_test)
    informative = _informative(train.values[known_train], train.schema.index(target))
    if not reason and not informative:
        reason = "the training table has no known value besides the target"
    if reason:
        return Utility(None, None, **counts, reason=reason)

    known_rows = Table(train.schema, train.values[known_train]), Table(test.schema, test.values[known_test])
    levels = len(train.schema[target].levels)
    boosted = _probabilities_boosting(*known_rows, informative, y_train, levels, seed)
    linear = _probabilities_logistic(*known_rows, target, y_train, levels)
    return Utility(_auroc(y_test, boosted), _auroc(y_test, linear), **counts)


def _why_impossible(y_train: np.ndarray, y_test: np.ndarray) -> str:
    for name, outcomes in (("training", y_train), ("test", y_test)):
        if outcomes.size == 0:
            return f"the {name} table has no row with a known outcome"
        if np.unique(outcomes).size == 1:
            return f"the {name} table has one outcome class only"
    return ""


def _informative(values: np.ndarray, target: int) -> list[int]:
    """Positions of the predictors with a known value; scikit-learn cannot bin a column without one."""
    known = np.flatnonzero(np.any(~np.isnan(values), axis=0))
    return [int(j) for j in known if j != target]


def _auroc(outcomes: np.ndarray, probabilities: np.ndarray) -> float:
    """AUROC of class probabilities, shape (rows, levels), for level indices, shape (rows,)."""
    if probabilities.shape[1] == 2:
        return float(roc_auc_score(outcomes == 1, probabilities[:, 1]))
    present = np.unique(outcomes)
    return float(np.mean([roc_auc_score(outcomes == level, probabilities[:, level]) for level in present]))


def _by_level(predicted: np.ndarray, classes: np.ndarray, levels: int) -> np.ndarray:
    """Spread probabilities of the levels seen in training, shape (rows, seen), over all, shape (rows, levels)."""
    probabilities = np.zeros((len(predicted), levels))
    probabilities[:, classes] = predicted
    return probabilities


def _probabilities_boosting(
    train: Table, test: Table, predictors: list[int], outcomes: np.ndarray, levels: int, seed: int
) -> np.ndarray:
    options: dict[str, Any] = {
        "categorical_features": [not train.schema.columns[j].is_numeric for j in predictors],
        # Early stopping would set rows aside by class and fail on a class with one member.
        "early_stopping": False,
        "random_state": seed,
    }
    # OpenMP threads that wait for each other on a busy machine cost minutes on tables that one thread fits in a second.
    with threadpool_limits(limits=1 if len(outcomes) < PARALLEL_ROWS else None, user_api="openmp"):
        model = HistGradientBoostingClassifier(**options).fit(train.values[:, predictors], outcomes)
    return _by_level(model.predict_proba(test.values[:, predictors]), np.unique(outcomes), levels)


def _probabilities_logistic(train: Table, test: Table, target: str, outcomes: np.ndarray, levels: int) -> np.ndarray:
    x_train, x_test = _design(train, test, target)
    model = LogisticRegression(max_iter=MAX_ITERATIONS).fit(x_train, outcomes)
    return _by_level(model.predict_proba(x_test), np.unique(outcomes), levels)


def _design(train: Table, test: Table, target: str) -> tuple[np.ndarray, np.ndarray]:
    """Design matrices of both tables, shapes (rows, features); everything estimated comes from `train`.

    A numeric column gives its standardised, median-imputed value and an indicator of being missing, a categorical one
    an indicator for each level and for missing.
    """
    blocks: list[tuple[np.ndarray, np.ndarray]] = []
    for column in train.schema.columns:
        if column.name == target:
            continue
        a, b = train[column.name], test[column.name]
        if not column.is_numeric:
            levels = np.arange(len(column.levels) + 1)
            coded = [np.where(np.isnan(x), len(column.levels), x)[:, None] == levels for x in (a, b)]
            blocks.append((coded[0].astype(float), coded[1].astype(float)))
            continue
        known = a[~np.isnan(a)]
        median = float(np.median(known)) if known.size else 0.0
        filled_a, filled_b = np.where(np.isnan(a), median, a), np.where(np.isnan(b), median, b)
        if np.ptp(filled_a) > 0:
            mean, spread = filled_a.mean(), filled_a.std()
            value_a, value_b = (filled_a - mean) / spread, (filled_b - mean) / spread
        else:  # constant in training: nothing was learned from it, whatever the test table holds
            value_a, value_b = np.zeros_like(filled_a), np.zeros_like(filled_b)
        blocks.append((np.column_stack([value_a, np.isnan(a)]), np.column_stack([value_b, np.isnan(b)])))
    return np.hstack([block[0] for block in blocks]), np.hstack([block[1] for block in blocks])
