"""Singling out: predicates that match exactly one synthetic row, and how often they match exactly one patient.

After Giomi et al. 2022, section 3.1. A predicate of weight w matches exactly one of n patients with probability
n w (1 − w)^(n − 1), so tables of different size cannot be compared; where the paper fits a correction, both sides here
are random patients of equal number, which keeps the result a count. One patient can decide several predicates: the
counts are of predicates, and their sensitivity to one patient is not 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np

from common.encoding.number import from_unit
from common.evaluation.attacks.counts import AttackCounts, NotPossible, too_few
from common.evaluation.attacks.rows import distinct
from common.schema import Column
from common.table import Table

Operator = Literal["equal", "different", "at most", "at least", "missing", "known"]
UNIVARIATE, MULTIVARIATE = "singling_out_univariate", "singling_out_multivariate"
PREDICATES = 1000
COLUMNS = 3
# Candidates tried for every predicate wanted, before fewer are accepted.
ATTEMPTS = 40


class Condition(NamedTuple):
    """A condition on one column (by position); `value` is a number or level index, unused for missing and known."""

    column: int
    operator: Operator
    value: float = 0.0


Predicate = tuple[Condition, ...]


def single_out(
    synthetic: Table,
    train: Table,
    control: Table,
    rng: np.random.Generator,
    *,
    predicates: int = PREDICATES,
    columns: int = COLUMNS,
) -> list[AttackCounts | NotPossible]:
    """Counts of predicates that single out a patient: of one column each, and of `columns` columns.

    At most `predicates` of each kind are used. The baseline tries as many random predicates, drawn from the schema, on
    the training patients.
    """
    width = min(columns, len(synthetic.schema.columns))
    cohort = distinct(synthetic)  # who finds a row twice knows it as well as who finds it once
    # Before any draw that depends on the number of patients, so that every hospital tries the same predicates.
    kinds = [(UNIVARIATE, 1, univariate(cohort, predicates, rng))]
    if width > 1:
        kinds.append((MULTIVARIATE, width, multivariate(cohort, predicates, width, rng)))
    blind = {
        attack: [_random_predicate(cohort.schema.columns, size, rng) for _ in found] for attack, size, found in kinds
    }
    n = min(len(train), len(control))
    sides = [Table(t.schema, t.values[rng.choice(len(t), n, replace=False)]) for t in (train, control)]
    results: list[AttackCounts | NotPossible] = []
    for attack, size, found in kinds:
        setting = f"columns={size}"
        few = too_few(attack, None, setting, predicates_found=len(found), patients_a_side=n)
        if few is not None:
            results.append(few)
            continue
        results.append(
            AttackCounts(
                attack=attack,
                secret=None,
                setting=setting,
                guesses=len(found),
                successes=_single_matches(found, sides[0]),
                control_guesses=len(found),
                control_successes=_single_matches(found, sides[1]),
                baseline_guesses=len(found),
                baseline_successes=_single_matches(blind[attack], sides[0]),
            )
        )
    if width < 2:
        reason = "not possible because it needs at least two columns"
        results.append(NotPossible(MULTIVARIATE, None, reason, "columns=1"))
    return results


def matches(predicate: Predicate, table: Table) -> np.ndarray:
    """Which rows fulfil every condition, shape (rows,); a missing value fulfils "missing" alone."""
    return np.logical_and.reduce([_fulfil(condition, table.values[:, condition.column]) for condition in predicate])


def _fulfil(condition: Condition, values: np.ndarray) -> np.ndarray:
    match condition.operator:
        case "equal":
            return values == condition.value
        case "different":
            return (values != condition.value) & ~np.isnan(values)
        case "at most":
            return values <= condition.value
        case "at least":
            return values >= condition.value
        case "missing":
            return np.isnan(values)
        case "known":
            return ~np.isnan(values)


def _single_matches(predicates: Iterable[Predicate], table: Table) -> int:
    # Columns lie in memory one after the other, which makes a condition one pass over adjacent numbers.
    by_column = Table(table.schema, np.asfortranarray(table.values))
    return sum(int(np.count_nonzero(matches(predicate, by_column)) == 1) for predicate in predicates)


def univariate(cohort: Table, count: int, rng: np.random.Generator) -> list[Predicate]:
    """Up to `count` random ones of all predicates on one column that match one row: extremes and unique values."""
    found: list[Predicate] = []
    for j, column in enumerate(cohort.schema.columns):
        values = cohort.values[:, j]
        if np.count_nonzero(np.isnan(values)) == 1:
            found.append((Condition(j, "missing"),))
        known, occurrences = np.unique(values[~np.isnan(values)], return_counts=True)
        found += [(Condition(j, "equal", float(value)),) for value in known[occurrences == 1]]
        if column.is_numeric and known.size:
            extremes: tuple[tuple[Operator, int], ...] = (("at most", 0), ("at least", -1))
            found += [
                (Condition(j, operator, float(known[end])),) for operator, end in extremes if occurrences[end] == 1
            ]
    return [found[i] for i in rng.permutation(len(found))[:count]]


def multivariate(cohort: Table, count: int, width: int, rng: np.random.Generator) -> list[Predicate]:
    """Up to `count` different predicates on `width` columns that match one row; fewer after `ATTEMPTS` times as many.

    Each describes `width` random columns of a random row: its level, whether it is missing, or, for a number, "at
    least" above the column's median in the cohort and "at most" otherwise, as extreme values are rarer.
    """
    by_column = Table(cohort.schema, np.asfortranarray(cohort.values))
    columns = cohort.schema.columns
    medians = [
        float(np.median(known)) if (known := values[~np.isnan(values)]).size else 0.0 for values in by_column.values.T
    ]
    found: dict[Predicate, None] = {}
    for _ in range(ATTEMPTS * count):
        row = cohort.values[rng.integers(len(cohort))]
        chosen = sorted(rng.choice(len(columns), width, replace=False).tolist())
        predicate = tuple(_describe(j, float(row[j]), columns[j], medians[j]) for j in chosen)
        if predicate not in found and np.count_nonzero(matches(predicate, by_column)) == 1:
            found[predicate] = None
            if len(found) == count:
                break
    return list(found)


def _describe(j: int, value: float, column: Column, median: float) -> Condition:
    if np.isnan(value):
        return Condition(j, "missing")
    if not column.is_numeric:
        return Condition(j, "equal", value)
    return Condition(j, "at least" if value > median else "at most", value)


def _random_predicate(columns: tuple[Column, ...], width: int, rng: np.random.Generator) -> Predicate:
    """Conditions on `width` random columns, drawn from the schema alone; missing counts as one more level."""
    return tuple(_random_condition(int(j), columns[j], rng) for j in rng.choice(len(columns), width, replace=False))


def _random_condition(j: int, column: Column, rng: np.random.Generator) -> Condition:
    levels = len(column.levels) or 2
    if column.nullable and rng.integers(levels + 1) == levels:
        return Condition(j, "missing" if rng.integers(2) else "known")
    if column.is_numeric:
        value = float(from_unit(rng.uniform(-1.0, 1.0, 1), column)[0])
        return Condition(j, "at least" if rng.integers(2) else "at most", value)
    return Condition(j, "equal" if rng.integers(2) else "different", float(rng.integers(levels)))
