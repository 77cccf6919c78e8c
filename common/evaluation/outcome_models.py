"""Two classifiers of an outcome, fitted to one table and asked about another: gradient boosting, logistic regression.

Everything estimated (bins, medians, spreads, coefficients) comes from the table they were fitted to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from common.evaluation.plan import GRADIENT_BOOSTING, LOGISTIC_REGRESSION
from common.table import Table

# L2-penalised logistic regression on standardised features needs tens of iterations; this is never the limit.
MAX_ITERATIONS = 5000
PARALLEL_ROWS = 100_000


@dataclass(frozen=True)
class OutcomeModel:
    """A fitted classifier; `probabilities` gives those of every level of the target, shape (rows, levels).

    A level that did not occur in training has probability 0.
    """

    name: str
    probabilities: Callable[[Table], np.ndarray]


def fit_outcome_models(train: Table, target: str, seed: int) -> tuple[OutcomeModel, OutcomeModel]:
    """Both classifiers, fitted to the rows of `train` with a known outcome; `seed` fixes the gradient boosting.

    Needs two outcome classes and one other column with a known value: `why_no_model` says if they are missing.
    """
    known = Table(train.schema, train.values[~np.isnan(train[target])])
    outcomes = known[target].astype(np.intp)
    classes, levels = np.unique(outcomes), len(known.schema[target].levels)
    return (
        OutcomeModel(GRADIENT_BOOSTING, _boosting(known, target, outcomes, classes, levels, seed)),
        OutcomeModel(LOGISTIC_REGRESSION, _logistic(known, target, outcomes, classes, levels)),
    )


def why_no_model(train: Table, target: str) -> str:
    """Why no classifier of `target` can be fitted to `train`; empty if one can."""
    outcomes = train[target][~np.isnan(train[target])]
    if outcomes.size == 0:
        return "the training table has no row with a known outcome"
    if np.unique(outcomes).size == 1:
        return "the training table has one outcome class only"
    if not _informative(train.values[~np.isnan(train[target])], train.schema.index(target)):
        return "the training table has no known value besides the target"
    return ""


def _informative(values: np.ndarray, target: int) -> list[int]:
    """Positions of the predictors with a known value; scikit-learn cannot bin a column without one."""
    known = np.flatnonzero(np.any(~np.isnan(values), axis=0))
    return [int(j) for j in known if j != target]


def _boosting(
    train: Table, target: str, outcomes: np.ndarray, classes: np.ndarray, levels: int, seed: int
) -> Callable[[Table], np.ndarray]:
    predictors = _informative(train.values, train.schema.index(target))
    options: dict[str, Any] = {
        "categorical_features": [not train.schema.columns[j].is_numeric for j in predictors],
        # Early stopping would set rows aside by class and fail on a class with one member.
        "early_stopping": False,
        "random_state": seed,
    }
    # OpenMP threads that wait for each other on a busy machine cost minutes on tables that one thread fits in a second.
    with threadpool_limits(limits=1 if len(outcomes) < PARALLEL_ROWS else None, user_api="openmp"):
        model = HistGradientBoostingClassifier(**options).fit(train.values[:, predictors], outcomes)
    return lambda table: _by_level(model.predict_proba(table.values[:, predictors]), classes, levels)


def _logistic(
    train: Table, target: str, outcomes: np.ndarray, classes: np.ndarray, levels: int
) -> Callable[[Table], np.ndarray]:
    design = Design(train, target)
    model = LogisticRegression(max_iter=MAX_ITERATIONS).fit(design(train), outcomes)
    return lambda table: _by_level(model.predict_proba(design(table)), classes, levels)


def _by_level(predicted: np.ndarray, classes: np.ndarray, levels: int) -> np.ndarray:
    """Spread probabilities of the levels seen in training, shape (rows, seen), over all, shape (rows, levels)."""
    probabilities = np.zeros((len(predicted), levels))
    probabilities[:, classes] = predicted
    return probabilities


class Design:
    """Design matrices for a linear model of `target`, scaled and imputed as `train` says.

    A numeric column gives its standardised, median-imputed value and an indicator of being missing, a categorical one
    an indicator for each level and for missing.
    """

    def __init__(self, train: Table, target: str) -> None:
        self.target = target
        self._scales: dict[str, tuple[float, float, float]] = {}  # median, mean, spread (0: constant)
        for column in train.schema.columns:
            if column.name == target or not column.is_numeric:
                continue
            values = train[column.name]
            known = values[~np.isnan(values)]
            median = float(np.median(known)) if known.size else 0.0
            filled = np.where(np.isnan(values), median, values)
            # A column that is constant in training: nothing was learned from it, whatever the other table holds.
            spread = float(filled.std()) if np.ptp(filled) > 0 else 0.0
            self._scales[column.name] = (median, float(filled.mean()), spread)

    def __call__(self, table: Table) -> np.ndarray:
        """The features of `table`, shape (rows, features)."""
        blocks = []
        for column in table.schema.columns:
            if column.name == self.target:
                continue
            values = table[column.name]
            missing = np.isnan(values)
            if not column.is_numeric:
                levels = np.arange(len(column.levels) + 1)
                blocks.append((np.where(missing, len(column.levels), values)[:, None] == levels).astype(float))
                continue
            median, mean, spread = self._scales[column.name]
            filled = np.where(missing, median, values)
            scaled = (filled - mean) / spread if spread > 0 else np.zeros_like(filled)
            blocks.append(np.column_stack([scaled, missing]))
        return np.hstack(blocks)
