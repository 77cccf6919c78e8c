"""The effects of columns on an outcome: one logistic regression with the same terms in several tables.

A numeric column is on its declared scale, per standard deviation of the patients; a category is against the patients'
most common one. A missing value counts as the patients' mean, or as the most common category, and an indicator of
being missing is adjusted for, not reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.encoding.number import to_unit
from common.errors import DataError
from common.evaluation.fidelity import correlation_matrix
from common.evaluation.logistic import RIDGE, fit_logistic
from common.evaluation.outcome_models import why_no_model
from common.table import Table

FEWEST = 11  # rows of every table with an indicator, without it, with the outcome, without it
EVENTS_A_TERM = 5  # of the rarer outcome in the smallest table (Vittinghoff and McCulloch 2007, Am J Epidemiol 165:710)
MOST_TERMS = 200
DEPENDENT = 1e-4  # share of a term's variance that the terms before it leave unexplained: less is collinear
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Term:
    """What one coefficient says: `level` against `reference` of a column, or one standard deviation of a number."""

    column: str
    level: str | None = None
    reference: str | None = None


@dataclass(frozen=True)
class Effects:
    """Log odds ratios of the reported terms in one table: `values`, shape (k,), and `covariance`, shape (k, k)."""

    rows: int
    values: Array
    covariance: Array

    @property
    def errors(self) -> Array:
        """Standard errors, shape (k,)."""
        return np.sqrt(np.diag(self.covariance))


@dataclass(frozen=True)
class EffectModels:
    """The same regression in every table, by name. `left_out` says of each absent term why it is not there.

    `ridge`: at least one table had no maximum of the likelihood, so all were fitted with a small penalty, and no
    interval is quite what it says. `reason` says why there is no regression at all.
    """

    level: str
    terms: tuple[Term, ...]
    left_out: tuple[str, ...]
    effects: Mapping[str, Effects]
    ridge: bool
    features: Mapping[str, Array]
    outcomes: Mapping[str, Array]
    reported: NDArray[np.intp]
    reason: str = ""


def fit_effects(
    tables: Mapping[str, Table], patients: str, target: str, level: int, columns: Sequence[str] | None = None
) -> EffectModels:
    """Regress "the target is `level`" on `columns` (default: all others) in each of `tables`.

    `tables[patients]` gives scales and references. Raises `DataError` if a name in `columns` is no column, or is the
    target.
    """
    schema = tables[patients].schema
    names = [name for name in schema.names if name != target] if columns is None else list(columns)
    unknown = [repr(name) for name in names if name not in schema.names or name == target]
    if unknown:
        raise DataError(
            f"no column whose effect can be estimated: {', '.join(unknown)}",
            fix="name columns of the schema other than the target",
        )
    known = {key: Table(schema, t.values[~np.isnan(t[target])]) for key, t in tables.items()}
    outcomes = {key: (table[target] == level).astype(np.float64) for key, table in known.items()}
    label = schema[target].levels[level]
    fewest = min(float(min(y.sum(), len(y) - y.sum())) for y in outcomes.values())
    if fewest < FEWEST:
        key = min(outcomes, key=lambda k: min(outcomes[k].sum(), len(outcomes[k]) - outcomes[k].sum()))
        reason = why_no_model(known[key], target).replace("training", key) or (
            f"fewer than {FEWEST} rows of the {key} table have {label!r}, or do not have it"
        )
        return _none(label, f"not possible because {reason}", ())
    most = min(MOST_TERMS, int(fewest) // EVENTS_A_TERM)
    terms, is_reported, features, left_out = _design(known, patients, names, most)
    if not any(is_reported):
        return _none(label, "not possible because no column has enough different values in every table", left_out)
    reported = np.flatnonzero(is_reported)
    ridge = 0.0
    try:
        fits = {key: fit_logistic(features[key], outcomes[key]) for key in tables}
    except np.linalg.LinAlgError:
        ridge = RIDGE
        try:
            fits = {key: fit_logistic(features[key], outcomes[key], ridge=ridge) for key in tables}
        except np.linalg.LinAlgError as error:
            return _none(label, f"not possible because the regression has no solution ({error})", left_out)
    places = reported + 1  # the intercept comes first
    effects = {
        key: Effects(len(outcomes[key]), fit.coefficients[places], fit.covariance[np.ix_(places, places)])
        for key, fit in fits.items()
    }
    return EffectModels(
        label, tuple(terms[j] for j in reported), left_out, effects, ridge > 0, features, outcomes, reported
    )


def _none(label: str, reason: str, left_out: tuple[str, ...]) -> EffectModels:
    return EffectModels(label, (), left_out, {}, False, {}, {}, np.empty(0, dtype=np.intp), reason)


def _design(
    tables: Mapping[str, Table], patients: str, names: Sequence[str], most: int
) -> tuple[list[Term], list[bool], dict[str, Array], tuple[str, ...]]:
    """Terms with whether each is reported, and the features of every table, shape (rows, terms)."""
    terms: list[Term] = []
    reported: list[bool] = []
    blocks: dict[str, list[Array]] = {key: [] for key in tables}
    left_out: list[str] = []
    for name in names:
        for term, shown, parts in _terms(tables, patients, name):
            if not all(_varies(part) for part in parts.values()):
                if shown:
                    left_out.append(f"{_words(term)}: too few rows with different values in at least one table")
            elif len(terms) >= most:
                left_out.append(f"{_words(term)}: too few rows with the rarer outcome for more than {most} terms")
            else:
                terms.append(term)
                reported.append(shown)
                for key, part in parts.items():
                    blocks[key].append(part)
    if not terms:
        return [], [], {}, tuple(left_out)
    features = {key: np.column_stack(parts) for key, parts in blocks.items()}
    kept = np.ones(len(terms), dtype=bool)
    for matrix in features.values():
        kept &= _independent(matrix)
    left_out += [
        f"{_words(terms[j])}: follows from the columns before it in at least one table"
        for j in np.flatnonzero(~kept)
        if reported[j]
    ]
    chosen = np.flatnonzero(kept)
    return (
        [terms[j] for j in chosen],
        [reported[j] for j in chosen],
        {key: matrix[:, chosen] for key, matrix in features.items()},
        tuple(left_out),
    )


def _terms(tables: Mapping[str, Table], patients: str, name: str) -> list[tuple[Term, bool, dict[str, Array]]]:
    """The terms of a column, whether each is reported, and its feature in every table."""
    column = tables[patients].schema[name]
    found: list[tuple[Term, bool, dict[str, Array]]] = []
    gone = {key: np.isnan(table[name]) for key, table in tables.items()}
    if column.is_numeric:
        unit = {key: to_unit(table[name], column) for key, table in tables.items()}
        own = unit[patients][~gone[patients]]
        mean, spread = (float(own.mean()), float(own.std())) if own.size and np.ptp(own) > 0 else (0.0, 1.0)
        scaled = {key: np.where(gone[key], 0.0, (np.nan_to_num(unit[key]) - mean) / spread) for key in tables}
        found.append((Term(name), True, scaled))
    else:
        own = tables[patients][name][~gone[patients]].astype(np.intp)
        reference = int(np.bincount(own, minlength=len(column.levels)).argmax())
        for level, label in enumerate(column.levels):
            if level != reference:
                term = Term(name, label, column.levels[reference])
                found.append((term, True, {key: (t[name] == level).astype(np.float64) for key, t in tables.items()}))
    found.append((Term(name, "missing"), False, {key: part.astype(np.float64) for key, part in gone.items()}))
    return found


def _varies(feature: Array) -> bool:
    """Whether at least `FEWEST` rows differ from the most common value."""
    if feature.size == 0 or np.ptp(feature) == 0:
        return False
    return len(feature) - int(np.unique(feature, return_counts=True)[1].max()) >= FEWEST


def _independent(features: Array) -> NDArray[np.bool_]:
    """Which features do not follow linearly from those before them: a sweep of the correlation matrix."""
    left = correlation_matrix(features)
    kept = np.zeros(len(left), dtype=bool)
    for j in range(len(left)):
        if left[j, j] > DEPENDENT:
            kept[j] = True
            left = left - np.outer(left[:, j], left[j]) / left[j, j]
    return kept


def _words(term: Term) -> str:
    return term.column if term.level is None else f"{term.column}={term.level}"
