"""Which tables a study's evaluation counts at every site: a function of the study and its schema, nothing else."""

from __future__ import annotations

from itertools import combinations

from common.evaluation.counts import COARSE_BINS, FINE_BINS, CountPlan, CountTable, Key, Population, bins_of
from common.study import Protocol

SCORE_BINS = 12  # of a predicted probability, equally filled by the cohort's own rows
MOST_MISSING = 9  # rows with as many missing values or more share a cell
# What the noise budget is spent on: the total weight of each family of tables.
MARGINALS, PAIRS, MISSING, UTILITY, GROUPS = 4.0, 2.0, 0.5, 3.0, 2.0
OUTCOMES = 3  # not this level, this level, unknown
GRADIENT_BOOSTING, LOGISTIC_REGRESSION = "gradient_boosting", "logistic_regression"
MODELS = (GRADIENT_BOOSTING, LOGISTIC_REGRESSION)
TRAINED_ON = ("tstr", "trtr")  # on the cohort, on the site's own patients who took part (Esteban et al. 2017)


def outcome_levels(protocol: Protocol) -> tuple[int, ...]:
    """The levels of the target whose prediction is counted: the second of two, or each of more; none without target."""
    if protocol.target is None:
        return ()
    levels = len(protocol.schema[protocol.target].levels)
    return (1,) if levels == 2 else tuple(range(levels))


def score_names(protocol: Protocol) -> tuple[str, ...]:
    """The scores of a study's un-noised evaluation in their order; none of a noised one, or without hold-out."""
    evaluation = protocol.study.evaluation
    if evaluation.method != "unnoised" or evaluation.holdout == 0 or protocol.target is None:
        return ()
    return tuple(
        f"{trained}/{model}/{level}/{score}"
        for trained in TRAINED_ON
        for model in MODELS
        for level in outcome_levels(protocol)
        for score in ("auroc", "brier")
    )


def column_pairs(protocol: Protocol) -> tuple[tuple[str, str], ...]:
    """The pairs of columns that are counted; the target comes first in its pairs."""
    names = protocol.schema.names
    match protocol.study.evaluation.pairs:
        case "all":
            return tuple(combinations(names, 2))
        case "target" if protocol.target:
            return tuple((protocol.target, name) for name in names if name != protocol.target)
        case _:
            return ()


def count_plan(protocol: Protocol) -> CountPlan:
    """The tables, in the order in which they are sent; none over held-out patients without them, or without noise."""
    schema, evaluation = protocol.schema, protocol.study.evaluation
    tables: list[CountTable] = []

    def add(total: float, population: Population, shapes: dict[Key, tuple[int, ...]]) -> None:
        for key, shape in shapes.items():
            tables.append(CountTable(key, population, shape, total / len(shapes)))

    for column in schema.columns:
        nested = FINE_BINS // COARSE_BINS if column.is_numeric else 1
        weight = MARGINALS / len(schema.columns)
        tables.append(CountTable(("marginal", column.name), "everyone", (bins_of(column),), weight, nested))
    sizes = {c.name: bins_of(c, coarse=True) for c in schema.columns}
    add(PAIRS, "everyone", {("pair", a, b): (sizes[a], sizes[b]) for a, b in column_pairs(protocol)})
    nullable = sum(column.nullable for column in schema.columns)
    if nullable:
        add(MISSING, "everyone", {("missing",): (min(nullable, MOST_MISSING) + 1,)})
    if evaluation.holdout == 0 or evaluation.method == "unnoised":
        return CountPlan(tuple(tables))  # tables of a hold-out would be hidden under any floor: `scores` instead
    levels = outcome_levels(protocol)
    add(UTILITY, "holdout", {("utility", m, str(level)): (SCORE_BINS, OUTCOMES) for m in MODELS for level in levels})
    add(
        GROUPS,
        "holdout",
        {
            ("group", name, str(level)): (sizes[name], SCORE_BINS, OUTCOMES)
            for name in evaluation.groups
            for level in levels
        },
    )
    return CountPlan(tuple(tables))
