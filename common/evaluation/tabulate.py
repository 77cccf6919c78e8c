"""A site's counts: its patients sorted into the tables of the plan, by models made from the cohort alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.evaluation.attacks.cells import AttackCells, why_no_attack
from common.evaluation.counts import CountPlan, Key, Population, bins_of, cells_of, count
from common.evaluation.fidelity import check_comparable
from common.evaluation.outcome_models import GRADIENT_BOOSTING, OutcomeModel, fit_outcome_models, why_no_model
from common.evaluation.plan import (
    ATTACKED,
    MOST_MISSING,
    OUTCOMES,
    SCORE_BINS,
    count_plan,
    outcome_levels,
    secrets_of,
)
from common.study import Protocol
from common.table import Table

Cells = Callable[[Table], NDArray[np.intp]]  # the flat cell of every patient


@dataclass(frozen=True)
class ScoredOutcome:
    """A model of one level of the target, made from the cohort: inner edges of its score bins, shape (bins - 1,).

    `predicted` is the mean probability of the cohort's rows in each bin, shape (bins,); of an empty bin its edge.
    """

    model: OutcomeModel
    target: str
    level: int
    edges: NDArray[np.float64]
    predicted: NDArray[np.float64]

    @property
    def key(self) -> tuple[str, str]:
        """The model and the level, as in the key of its table."""
        return self.model.name, str(self.level)

    def cells(self, table: Table) -> NDArray[np.intp]:
        """Score bin and outcome of every row as flat cells of (SCORE_BINS, OUTCOMES)."""
        bins = np.searchsorted(self.edges, self.model.probabilities(table)[:, self.level], side="right")
        truth = table[self.target]
        outcome = np.where(np.isnan(truth), OUTCOMES - 1, truth == self.level).astype(np.intp)
        return bins * OUTCOMES + outcome


def scored_outcomes(protocol: Protocol, cohort: Table, seed: int = 0) -> list[ScoredOutcome]:
    """Every model of the utility tables; empty if the cohort allows none (no target, one class).

    The bins hold equally many rows of the cohort, so that both sides know them and no patient was looked at. For the
    bins one half of the cohort is scored by a model of the other half: on its own rows a model is too sure of itself.
    """
    target = protocol.target
    if target is None or why_no_model(cohort, target):
        return []
    first, second = (Table(cohort.schema, cohort.values[start::2]) for start in (0, 1))
    halves = (first, second) if len(second) and not why_no_model(first, target) else (cohort, cohort)
    models = zip(fit_outcome_models(cohort, target, seed), fit_outcome_models(halves[0], target, seed), strict=True)
    found = []
    for model, of_half in models:
        scores = of_half.probabilities(halves[1])
        for level in outcome_levels(protocol):
            edges = np.quantile(scores[:, level], np.arange(1, SCORE_BINS) / SCORE_BINS)
            bins = np.searchsorted(edges, scores[:, level], side="right")
            rows = np.bincount(bins, minlength=SCORE_BINS)
            sums = np.bincount(bins, weights=scores[:, level], minlength=SCORE_BINS)
            predicted = np.divide(sums, rows, out=np.append(edges, edges[-1]), where=rows > 0)
            found.append(ScoredOutcome(model, target, level, edges, predicted))
    return found


class Sorter:
    """Sorts patients into the tables of a study, by models and attacks made once from a cohort of its schema.

    Columns that the site withholds are declared, and no attack goes by them. A table that needs what the cohort does
    not allow (two outcome classes, enough rows) stays all zeros, whatever the patients are.
    """

    def __init__(self, protocol: Protocol, cohort: Table, withheld: Sequence[str] = ()) -> None:
        self.plan = count_plan(protocol)
        self._cohort = cohort
        self._cells = _cells(protocol, cohort, self.plan)
        attacked = any(table.key[0] == "membership" for table in self.plan.tables)
        self._attack = attack_on(protocol, cohort, withheld) if attacked else None

    def count(self, populations: Mapping[Population, Table]) -> dict[Key, NDArray[np.float64]]:
        """The exact counts of every table; raises as `tabulate`."""
        for table in populations.values():
            check_comparable(self._cohort, table)
        attacked = {} if self._attack is None else attack_cells(self._attack, populations)
        counts: dict[Key, NDArray[np.float64]] = {}
        for table in self.plan.tables:
            cells = attacked.get(table.key)
            if cells is None and table.key in self._cells:
                cells = self._cells[table.key](populations[table.population])
            counts[table.key] = np.zeros(table.shape) if cells is None else count(cells, table.shape)
        return counts


def tabulate(
    protocol: Protocol, cohort: Table, populations: Mapping[Population, Table], withheld: Sequence[str] = ()
) -> tuple[CountPlan, dict[Key, NDArray[np.float64]]]:
    """The plan of the study and the exact counts of every table of it, as a `Sorter` makes them.

    `populations` holds everyone, and of a study with hold-out those who took part (fit) and those who did not
    (holdout). Raises `DataError` if the cohort has another schema or no rows.
    """
    for table in populations.values():
        check_comparable(cohort, table)
    sorter = Sorter(protocol, cohort, withheld)
    return sorter.plan, sorter.count(populations)


def attack_on(protocol: Protocol, cohort: Table, withheld: Sequence[str] = ()) -> AttackCells | None:
    """The attacks with a cohort; None if it is too small for them."""
    if why_no_attack(len(cohort)):
        return None
    blank = [name in withheld for name in cohort.schema.names]
    return AttackCells(Table(cohort.schema, np.where(blank, np.nan, cohort.values)), secrets_of(protocol))


def attack_cells(attack: AttackCells, populations: Mapping[Population, Table]) -> dict[Key, NDArray[np.intp]]:
    """The cells of those who took part and of those held out, by the keys of their tables."""
    return {
        (*key, population): cells for population in ATTACKED for key, cells in attack(populations[population]).items()
    }


def own_counts(protocol: Protocol, cohort: Table) -> dict[Key, NDArray[np.float64]]:
    """The cohort's own rows in the tables over everyone, with which the patients' are compared."""
    check_comparable(cohort, cohort)
    plan = count_plan(protocol)
    shared = CountPlan(tuple(table for table in plan.tables if table.population == "everyone"))
    cells = _cells(protocol, cohort, shared)
    return {table.key: count(cells[table.key](cohort), table.shape) for table in shared.tables}


def _cells(protocol: Protocol, cohort: Table, plan: CountPlan) -> dict[Key, Cells]:
    """How each table sorts a patient into a cell."""
    found: dict[Key, Cells] = {}
    models = {}
    if any(table.key[0] in ("utility", "group") for table in plan.tables):
        models = {model.key: model for model in scored_outcomes(protocol, cohort)}
    for table in plan.tables:
        match table.key:
            case ("marginal", name):
                found[table.key] = _marginal(protocol, name)
            case ("pair", first, second):
                found[table.key] = _pair(protocol, first, second)
            case ("missing",):
                found[table.key] = _missing
            case ("utility", model, level) if (model, level) in models:
                found[table.key] = models[model, level].cells
            case ("group", name, level) if (GRADIENT_BOOSTING, level) in models:
                found[table.key] = _grouped(protocol, name, models[GRADIENT_BOOSTING, level])
    return found


def _marginal(protocol: Protocol, name: str) -> Cells:
    column = protocol.schema[name]
    return lambda table: cells_of(table[name], column)


def _pair(protocol: Protocol, first: str, second: str) -> Cells:
    a, b = protocol.schema[first], protocol.schema[second]
    width = bins_of(b, coarse=True)
    return lambda table: cells_of(table[first], a, coarse=True) * width + cells_of(table[second], b, coarse=True)


def _grouped(protocol: Protocol, name: str, scored: ScoredOutcome) -> Cells:
    column = protocol.schema[name]
    return lambda table: cells_of(table[name], column, coarse=True) * (SCORE_BINS * OUTCOMES) + scored.cells(table)


def _missing(table: Table) -> NDArray[np.intp]:
    return np.minimum(np.isnan(table.values).sum(axis=1), MOST_MISSING)
