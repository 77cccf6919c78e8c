"""What a federated evaluation found, as plain JSON: for every site and for all together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.evaluation.attack_results import noised_attacks
from common.evaluation.attacks.scores import auroc_interval
from common.evaluation.counts import CountPlan, Key
from common.evaluation.fairness import group_names
from common.evaluation.outcome_models import why_no_model
from common.evaluation.plan import (
    DETECTION,
    GRADIENT_BOOSTING,
    MODELS,
    TRAINED_ON,
    count_plan,
    outcome_levels,
    score_names,
)
from common.evaluation.pooled import PooledCounts, auroc, calibration, distance, miscalibration, pool
from common.evaluation.scores import DETECTION_ROWS
from common.evaluation.shares import marginal_shares
from common.evaluation.tabulate import own_counts, scored_outcomes
from common.evaluation.unnoised_attacks import unnoised_attacks
from common.privacy.evaluation_release import evaluation_event
from common.privacy.holdout import holdout_patients
from common.study import Protocol
from common.table import Table

SCHEMA_VERSION = 2
ALL = "all sites"
SEED = 0  # of the simulated repetitions behind every interval: the same answers give the same document
FITTED = (
    'a model would have to be fitted to the site\'s patients, which the noise of the counts does not cover; "unnoised"'
    " measures it where a site's policy allows that"
)
SINGLED_OUT = (
    "its successes are descriptions that fit exactly one patient: counts of one, of which one patient can change many;"
    " a simulation measures it"
)


def values_expected(protocol: Protocol) -> int:
    """How many values a site's answer has: all cells of the plan, then the un-noised scores."""
    return count_plan(protocol).size + len(score_names(protocol))


def populations_of(protocol: Protocol, patients: int) -> dict[str, int]:
    """How many patients each population of a site has, which is public."""
    held_out = holdout_patients(patients, protocol.study.evaluation.holdout)
    return {"everyone": patients, "fit": patients - held_out, "holdout": held_out}


def evaluation_results(
    protocol: Protocol, cohort: Table, answers: Mapping[str, NDArray[np.float64]], patients: Mapping[str, int]
) -> dict[str, Any]:
    """The document behind evaluation.json, from the sites' values, shape (1, values) each, and their patient numbers.

    Every number is an estimate from what the sites sent, with the interval that chance and noise leave; a distance is
    given with what chance and noise alone would have made of it.
    """
    evaluation, plan = protocol.study.evaluation, count_plan(protocol)
    names = score_names(protocol)
    counts = {site: values[0, : plan.size] for site, values in answers.items()}
    scores = {site: dict(zip(names, values[0, plan.size :].tolist(), strict=True)) for site, values in answers.items()}
    deviations = None
    if evaluation.method == "accounted":
        deviations = plan.deviations(evaluation_event(protocol.study).noise_multiplier)
    people = {site: populations_of(protocol, patients[site]) for site in answers}
    own, predicted = own_counts(protocol, cohort), _predicted(protocol, cohort, plan)
    groups = {site: [site] for site in sorted(answers)} | {ALL: sorted(answers)}
    results = {}
    for name, members in groups.items():
        of = {site: people[site] for site in members}
        pooled = pool(plan, {site: counts[site] for site in members}, of, deviations)
        found = {site: scores[site] for site in members}
        results[name] = _results(protocol, plan, pooled, own, predicted) | {
            "detection": _detection(found, of, len(cohort)),
            "scores": _mean_scores(found, of),
            "attacks": _attacks(protocol, len(cohort), pooled, found, of),
        }
        if name == ALL:
            results[name]["marginal_shares"] = marginal_shares(protocol.schema, pooled, own)
    return {
        "schema_version": SCHEMA_VERSION,
        "method": evaluation.method,
        "epsilon": evaluation.epsilon if evaluation.method == "accounted" else None,
        "delta": protocol.study.privacy.delta,
        "caution": caution(protocol, people),
        "rows": len(cohort),
        "target": protocol.target,
        "patients": people,
        "tables": len(plan.tables),
        "not_measured": not_measured(protocol, cohort),
        "results": results,
    }


def not_measured(protocol: Protocol, cohort: Table) -> dict[str, str]:
    """What the evaluation of a cohort does not say, and why."""
    evaluation, found = protocol.study.evaluation, {"singling_out": SINGLED_OUT}
    if evaluation.method == "accounted":
        found |= {"trtr": FITTED, "detection": FITTED}
    if evaluation.holdout == 0:
        found |= dict.fromkeys(("utility", "trtr", "attacks"), "no patients are held out ([evaluation] holdout)")
    elif protocol.target is None:
        found |= dict.fromkeys(("utility", "trtr"), "the study has no target")
    elif why := why_no_model(cohort, protocol.target):
        found["utility"] = f"not possible because {why.replace('the training table', 'the cohort')}"
    return found


def caution(protocol: Protocol, people: Mapping[str, Mapping[str, int]]) -> str:
    """The sentence that must stand beside these numbers (privacy.md, section 0)."""
    counted = sum(site["everyone"] for site in people.values())
    if protocol.study.evaluation.method == "accounted":
        return (
            f"Noised counts of n = {counted} patients; they are an event in the ledger of every site, and every ε of"
            " privacy.json includes them."
        )
    return (
        f"Un-noised evaluation aggregates, n = {counted}, no ε. Any ε reported beside them is of the model and cohort"
        " alone, excluding this evaluation and the decision to release."
    )


def _predicted(protocol: Protocol, cohort: Table, plan: CountPlan) -> dict[tuple[str, str], NDArray[np.float64]]:
    """By model and level, what it predicts in every score bin."""
    if not any(table.key[0] == "utility" for table in plan.tables):
        return {}
    return {scored.key: scored.predicted for scored in scored_outcomes(protocol, cohort)}


def _results(
    protocol: Protocol,
    plan: CountPlan,
    pooled: PooledCounts,
    own: dict[Key, Any],
    predicted: dict[tuple[str, str], Any],
) -> dict[str, Any]:
    rng = np.random.default_rng(SEED)
    marginals: dict[str, Any] = {}
    pairs: list[dict[str, Any]] = []
    utility: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    missing = None
    for table in plan.tables:
        match table.key:
            case ("marginal", column):
                marginals[column] = asdict(distance(pooled, table.key, own[table.key], rng))
            case ("pair", first, second):
                pairs.append({"columns": [first, second], **asdict(distance(pooled, table.key, own[table.key], rng))})
            case ("missing",):
                missing = asdict(distance(pooled, table.key, own[table.key], rng))
            case ("utility", model, level) if (model, level) in predicted:
                utility[f"{model}/{level}"] = _utility(pooled, table.key, predicted[model, level], rng)
            case ("group", column, level) if (GRADIENT_BOOSTING, level) in predicted:
                groups += _by_group(protocol, pooled, table.key, predicted[GRADIENT_BOOSTING, level], rng)
    known = [entry["value"] for entry in marginals.values() if entry["value"] is not None]
    return {
        "marginals": marginals,
        "marginal_mean": float(np.mean(known)) if known else None,
        "pairs": pairs,
        "missing": missing,
        "utility": {name: utility[name] for name in _utility_names(protocol) if name in utility},
        "groups": groups,
        "sites_counted": min(pooled.sites.values(), default=0),
    }


def _utility(
    pooled: PooledCounts, key: Key, predicted: NDArray[np.float64], rng: np.random.Generator
) -> dict[str, Any]:
    bins = [
        {"patients": _number(patients), "observed": _number(observed), "predicted": float(probability)}
        for (patients, observed), probability in zip(calibration(pooled, key), predicted, strict=True)
    ]
    gap = asdict(miscalibration(pooled, key, predicted, rng))
    return asdict(auroc(pooled, key, rng)) | {"observed_minus_predicted": gap, "calibration": bins}


def _utility_names(protocol: Protocol) -> list[str]:
    return [f"{model}/{level}" for model in MODELS for level in outcome_levels(protocol)]


def _by_group(
    protocol: Protocol, pooled: PooledCounts, key: Key, predicted: NDArray[np.float64], rng: np.random.Generator
) -> list[dict[str, Any]]:
    """AUROC and calibration in the large in every group of a column: its levels, or its coarse bins."""
    _, column, level = key
    found = []
    for index, group in enumerate(group_names(protocol.schema[column])):
        part = pooled.counts[key][index]
        # How many patients a group has is not public: it is what the counts say.
        size = max(0, round(float(part.sum())))
        one = PooledCounts({key: part}, {key: pooled.deviation[key]}, {key: size}, {key: pooled.sites[key]})
        gap = asdict(miscalibration(one, key, predicted, rng))
        about = {"column": column, "group": group, "level": level}
        found.append(about | asdict(auroc(one, key, rng)) | {"observed_minus_predicted": gap})
    return found


def _attacks(
    protocol: Protocol,
    cohort_rows: int,
    pooled: PooledCounts,
    scores: Mapping[str, Mapping[str, float]],
    people: Mapping[str, Mapping[str, int]],
) -> dict[str, Any] | None:
    evaluation = protocol.study.evaluation
    if evaluation.holdout == 0:
        return None
    if evaluation.method == "accounted":
        return noised_attacks(protocol, cohort_rows, pooled, np.random.default_rng(SEED))
    return unnoised_attacks(protocol, cohort_rows, scores, people)


def _detection(
    scores: Mapping[str, Mapping[str, float]], people: Mapping[str, Mapping[str, int]], cohort_rows: int
) -> dict[str, Any] | None:
    """AUROC of telling rows from patients: of a site, or the mean of several weighted by their patients."""
    found: dict[str, Any] = {}
    for seen in DETECTION:
        name = f"detection/{seen}/auroc"
        shown = [site for site, values in scores.items() if name in values and np.isfinite(values[name])]
        if not shown:
            continue
        patients = np.array([people[site]["everyone"] for site in shown])
        weights = patients / patients.sum()
        used = np.minimum(patients, min(cohort_rows, DETECTION_ROWS))
        parts = [auroc_interval(scores[site][name], rows, rows) for site, rows in zip(shown, used, strict=True)]
        value = float(weights @ [part.value for part in parts])
        below, above = (
            float(np.linalg.norm(weights * [getattr(part, end) - part.value for part in parts]))
            for end in ("low", "high")
        )
        ends = {"low": max(0.0, value - below), "high": min(1.0, value + above)}
        found[seen] = {"value": value, **ends, "patients": int(patients.sum())}
    return found or None


def _mean_scores(
    scores: Mapping[str, Mapping[str, float]], people: Mapping[str, Mapping[str, int]]
) -> dict[str, float | None]:
    """The scores of models on held-out patients: of a site, or the mean weighted by its held-out patients."""
    names = [name for name in next(iter(scores.values()), {}) if name.startswith(tuple(TRAINED_ON))]
    found: dict[str, float | None] = {}
    for name in names:
        shown = [site for site in scores if np.isfinite(scores[site][name])]
        weights = [people[site]["holdout"] for site in shown]
        found[name] = float(np.average([scores[site][name] for site in shown], weights=weights)) if shown else None
    return found


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
