"""Can a classifier tell patients from synthetic rows, and what gives the rows away?

A classifier two-sample test (Lopez-Paz and Oquab 2017, arXiv:1610.06545) by gradient boosting, cross-validated. The
AUROC is of fidelity, not of privacy: rows that cannot be told from patients may be copies of them. An un-noised
aggregate of patients (privacy.md, section 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import StratifiedKFold
from threadpoolctl import threadpool_limits

from common.evaluation.attacks.risk import Estimate
from common.evaluation.auroc import auroc_estimate, delong
from common.evaluation.counts import cells_of
from common.evaluation.fidelity import check_comparable
from common.evaluation.pairs import nullable
from common.evaluation.sample import at_most
from common.table import Table

MOST_ROWS = 10_000  # of each table
FOLDS = 5
FEWEST_ROWS = 50  # of each table: 10 a fold
IMPORTANCE_ROWS = 1_000  # of a held-out fold, for the permutations
SCORED_ROWS = 20_000  # at once
NAMED = 10  # columns that are named
# "exact": as they are, so that one digit more than a laboratory prints tells; "binned": in the evaluation's bins.
Values = Literal["exact", "binned"]


@dataclass(frozen=True)
class GiveAway:
    """By how much the AUROC falls on held-out rows when this column is shuffled; the standard deviation over folds."""

    column: str
    drop: float
    deviation: float


@dataclass(frozen=True)
class Detection:
    """AUROC of "is this row synthetic?" on held-out rows: 0.5 is chance, 1 always right; None if `reason` says why.

    Well below 0.5 means that rows of one table occur in the other. `rows` of each table were used. `columns` are
    those used most, largest drop first; columns that say the same share their drop. `values` says what the classifier
    saw.
    """

    values: Values
    auroc: Estimate | None
    rows: int
    columns: tuple[GiveAway, ...]
    reason: str = ""


def detect(
    synthetic: Table,
    real: Table,
    rng: np.random.Generator,
    *,
    values: Values = "exact",
    most_rows: int = MOST_ROWS,
    columns_too: bool = True,
) -> Detection:
    """Tell synthetic from real rows in `FOLDS`-fold cross-validation on equally many rows of both.

    The interval takes the folds as independent (DeLong in each; LeDell, Petersen and van der Laan 2015), and
    does not include the choice of the rows where a table was cut to `most_rows`. With `columns_too` false no column is
    named, which saves most of the time.

    Raises `DataError` if the schemas differ or a table has no rows.
    """
    check_comparable(synthetic, real)
    rows = min(len(synthetic), len(real), most_rows)
    if rows < FEWEST_ROWS:
        reason = f"not possible because a table has {rows} rows; {FEWEST_ROWS} are needed"
        return Detection(values, None, rows, (), reason)
    seen = np.vstack([_seen(at_most(table, rows, rng), values) for table in (synthetic, real)])
    columns = np.flatnonzero(np.any(~np.isnan(seen), axis=0))
    if columns.size == 0:
        return Detection(values, None, rows, (), "not possible because no column has a value")
    seen = seen[:, columns]
    labels = np.repeat([True, False], rows)
    categorical = [not real.schema.columns[j].is_numeric for j in columns]
    found, drops = [], []
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=int(rng.integers(2**31)))
    # Threads that wait for each other on a busy machine cost minutes; one fits these rows in a second.
    with threadpool_limits(limits=1, user_api="openmp"):
        for train, test in folds.split(seen, labels):
            model = _fit(seen[train], labels[train], categorical, int(rng.integers(2**31)))
            found.append(delong(labels[test], _score(model, seen[test])))
            if columns_too:
                drops.append(_drops(model, seen[test], labels[test], rng))
    area = auroc_estimate(
        float(np.mean([value for value, _ in found])), sum(variance for _, variance in found) / FOLDS**2
    )
    if not columns_too:
        return Detection(values, area, rows, ())
    mean, deviation = np.mean(drops, axis=0), np.std(drops, axis=0, ddof=1)
    order = np.argsort(-mean, kind="stable")[:NAMED]
    return Detection(
        values,
        area,
        rows,
        tuple(
            GiveAway(real.schema.names[columns[j]], float(mean[j]), float(deviation[j])) for j in order if mean[j] > 0
        ),
    )


def _seen(table: Table, values: Values) -> np.ndarray:
    if values == "exact":
        return table.values
    seen = table.values.copy()
    for j, column in enumerate(table.schema.columns):
        if column.is_numeric:
            cells = cells_of(seen[:, j], nullable(column)).astype(np.float64)
            seen[:, j] = np.where(np.isnan(seen[:, j]), np.nan, cells)
    return seen


def _fit(values: np.ndarray, labels: np.ndarray, categorical: list[bool], seed: int) -> HistGradientBoostingClassifier:
    # A column without a value in this fold is unlikely, but would stop scikit-learn: an unknown column is a constant.
    options: dict[str, Any] = {"categorical_features": categorical, "early_stopping": False, "random_state": seed}
    return HistGradientBoostingClassifier(**options).fit(_filled(values), labels)


def _filled(values: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(values).all(axis=0), 0.0, values)


def _score(model: HistGradientBoostingClassifier, values: np.ndarray) -> np.ndarray:
    return np.asarray(model.decision_function(values), dtype=np.float64)


def _drops(
    model: HistGradientBoostingClassifier, values: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Permutation importance (Breiman 2001) in AUROC on held-out rows, shape (columns,)."""
    if len(labels) > IMPORTANCE_ROWS:
        # Equally many of both classes, as in the fold.
        each = IMPORTANCE_ROWS // 2
        chosen = np.concatenate([rng.choice(np.flatnonzero(labels == kind), each, replace=False) for kind in (0, 1)])
        values, labels = values[chosen], labels[chosen]
    whole = delong(labels, _score(model, values))[0]
    rows, columns = values.shape
    drops = np.empty(columns)
    at_once = max(1, SCORED_ROWS // rows)  # a call has a fixed cost that outweighs its rows
    for start in range(0, columns, at_once):
        some = range(start, min(start + at_once, columns))
        shuffled = np.tile(values, (len(some), 1)).reshape(len(some), rows, columns)
        for copy, j in zip(shuffled, some, strict=True):
            copy[:, j] = rng.permutation(copy[:, j])
        scores = _score(model, shuffled.reshape(-1, columns)).reshape(len(some), rows)
        drops[some] = [whole - delong(labels, each)[0] for each in scores]
    return drops
