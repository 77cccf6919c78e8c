"""Which tables a study's evaluation counts at every site: a function of the study and its schema, nothing else."""

from __future__ import annotations

from itertools import combinations

from common.evaluation.counts import COARSE_BINS, FINE_BINS, CountPlan, CountTable, Key, Population, bins_of
from common.study import Protocol

SCORE_BINS = 12  # of a predicted probability, equally filled by the cohort's own rows
MOST_MISSING = 9  # rows with as many missing values or more share a cell
# What the noise budget is spent on: the total weight of each family of tables.
MARGINALS, PAIRS, MISSING, UTILITY, GROUPS = 4.0, 2.0, 0.5, 3.5, 2.0
MEMBERSHIP, LINKABILITY, INFERENCE = 1.5, 0.25, 0.5  # of held-out patients; those who took part have more, see below
OUTCOMES = 3  # not this level, this level, unknown
# Attacks on patients who took part (fit) and, as their control, on those held out: bins of a membership score, the
# last but one for near copies and the last for exact ones where the score is a distance; failure and success.
MEMBERSHIP_BINS, GUESS = 12, 2
DENSITY, DISTANCE = "density", "distance"
MEMBERSHIP_SCORES = (DENSITY, DISTANCE)
ATTACKED: tuple[Population, ...] = ("fit", "holdout")
GRADIENT_BOOSTING, LOGISTIC_REGRESSION = "gradient_boosting", "logistic_regression"
MODELS = (GRADIENT_BOOSTING, LOGISTIC_REGRESSION)
DETECTION = ("exact", "binned")  # what a classifier that tells rows from patients sees of a number
TRAINED_ON = ("tstr", "trtr")  # on the cohort, on the site's own patients who took part (Esteban et al. 2017)


def outcome_levels(protocol: Protocol) -> tuple[int, ...]:
    """The levels of the target whose prediction is counted: the second of two, or each of more; none without target."""
    if protocol.target is None:
        return ()
    levels = len(protocol.schema[protocol.target].levels)
    return (1,) if levels == 2 else tuple(range(levels))


def secrets_of(protocol: Protocol) -> tuple[str, ...]:
    """The columns that the inference attack guesses: those the study names, else the target; it needs another one."""
    if len(protocol.schema.columns) < 2:
        return ()
    return protocol.study.evaluation.secrets or ((protocol.target,) if protocol.target else ())


def guesses_of(protocol: Protocol) -> tuple[Key, ...]:
    """The attacks that succeed or fail at a patient, as the beginnings of their tables' keys."""
    linking: tuple[Key, ...] = (("linkability",),) if len(protocol.schema.columns) > 1 else ()
    return (*linking, *(("inference", secret) for secret in secrets_of(protocol)))


def score_names(protocol: Protocol) -> tuple[str, ...]:
    """The scores of a study's un-noised evaluation in their order; none of a noised one."""
    if protocol.study.evaluation.method != "unnoised":
        return ()
    names = [f"detection/{seen}/auroc" for seen in DETECTION]
    if protocol.study.evaluation.holdout == 0:
        return tuple(names)
    names += [
        f"{trained}/{model}/{level}/{score}"
        for trained in TRAINED_ON
        for model in MODELS
        for level in outcome_levels(protocol)
        for score in ("auroc", "brier")
    ]
    names += [f"membership/{score}/{found}" for score in MEMBERSHIP_SCORES for found in ("auroc", "true_positive_rate")]
    rates = ["copies/exact", "copies/near", *("/".join(key) for key in guesses_of(protocol))]
    return (*names, *(f"{rate}/{population}" for rate in rates for population in ATTACKED))


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
    attacks = _attack_shapes(protocol)
    for shapes, weight in attacks:
        add(weight, "holdout", {(*key, "holdout"): shape for key, shape in shapes.items()})
    # A patient who took part is in no table of held-out patients: what those cost, his tables may cost as well.
    spare = sum(t.weight for t in tables if t.population == "holdout") / sum(weight for _, weight in attacks)
    for shapes, weight in attacks:
        add(weight * spare, "fit", {(*key, "fit"): shape for key, shape in shapes.items()})
    return CountPlan(tuple(tables))


def _attack_shapes(protocol: Protocol) -> list[tuple[dict[Key, tuple[int, ...]], float]]:
    """The tables of each family of attacks without their population, and the family's weight."""
    guesses = guesses_of(protocol)
    families: list[tuple[dict[Key, tuple[int, ...]], float]] = [
        ({("membership", score): (MEMBERSHIP_BINS,) for score in MEMBERSHIP_SCORES}, MEMBERSHIP),
        ({key: (GUESS,) for key in guesses if key[0] == "linkability"}, LINKABILITY),
        ({key: (GUESS,) for key in guesses if key[0] == "inference"}, INFERENCE),
    ]
    return [family for family in families if family[0]]
