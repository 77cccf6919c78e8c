"""A site's counts: its patients sorted into the tables of the plan, by models made from the cohort alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.evaluation.counts import CountPlan, Key, Population, bins_of, cells_of, count
from common.evaluation.fidelity import check_comparable
from common.evaluation.outcome_models import GRADIENT_BOOSTING, OutcomeModel, fit_outcome_models, why_no_model
from common.evaluation.plan import MOST_MISSING, OUTCOMES, SCORE_BINS, count_plan, outcome_levels
from common.study import Protocol
from common.table import Table

Cells = Callable[[Table], NDArray[np.intp]]  # the flat cell of every patient


@dataclass(frozen=True)
class ScoredOutcome:
    """A model of one level of the target, made from the cohort: inner edges of its score bins, shape (bins - 1,)."""

    model: OutcomeModel
    target: str
    level: int
    edges: NDArray[np.float64]

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
            found.append(ScoredOutcome(model, target, level, edges))
    return found


def tabulate(
    protocol: Protocol, cohort: Table, populations: Mapping[Population, Table]
) -> tuple[CountPlan, dict[Key, NDArray[np.float64]]]:
    """The plan of the study and the exact counts of every table of it.

    `populations` holds everyone, and of a study with hold-out those who took part (fit) and those who did not
    (holdout). A table that needs a model which the cohort does not allow is all zeros, whatever the patients are.
    Raises `DataError` if the cohort has another schema or no rows.
    """
    plan = count_plan(protocol)
    for table in populations.values():
        check_comparable(cohort, table)
    cells = _cells(protocol, cohort, plan)
    counts: dict[Key, NDArray[np.float64]] = {}
    for table in plan.tables:
        patients, of = populations[table.population], cells.get(table.key)
        counts[table.key] = np.zeros(table.shape) if of is None else count(of(patients), table.shape)
    return plan, counts


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
