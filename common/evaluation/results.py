"""What a federated evaluation found, as plain JSON: for every site and for all together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.evaluation.counts import CountPlan, Key, Population
from common.evaluation.plan import MODELS, count_plan, outcome_levels, score_names
from common.evaluation.pooled import PooledCounts, auroc, calibration, distance, pool
from common.evaluation.shares import marginal_shares
from common.evaluation.tabulate import tabulate
from common.privacy.evaluation_release import evaluation_event
from common.privacy.holdout import holdout_patients
from common.study import Protocol
from common.table import Table

SCHEMA_VERSION = 1
ALL = "all sites"
SEED = 0  # of the simulated repetitions behind every interval: the same answers give the same document


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
    found = {site: dict(zip(names, values[0, plan.size :].tolist(), strict=True)) for site, values in answers.items()}
    deviations = None
    if evaluation.method == "accounted":
        deviations = plan.deviations(evaluation_event(protocol.study).noise_multiplier)
    people = {site: populations_of(protocol, patients[site]) for site in answers}
    own = _cohort_counts(protocol, cohort)
    groups = {site: [site] for site in sorted(answers)} | {ALL: sorted(answers)}
    results = {}
    for name, members in groups.items():
        pooled = pool(plan, {s: counts[s] for s in members}, {s: people[s] for s in members}, deviations)
        results[name] = _results(protocol, plan, pooled, own)
        if name == ALL:
            results[name]["marginal_shares"] = marginal_shares(protocol.schema, pooled, own)
        results[name]["scores"] = {score: _number(value) for score, value in found.get(name, {}).items()}
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
        "results": results,
    }


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


def _cohort_counts(protocol: Protocol, cohort: Table) -> dict[Key, NDArray[np.float64]]:
    """The cohort sorted into the same tables; those of held-out patients are not used."""
    everywhere: dict[Population, Table] = {"everyone": cohort, "fit": cohort, "holdout": cohort}
    return tabulate(protocol, cohort, everywhere)[1]


def _results(protocol: Protocol, plan: CountPlan, pooled: PooledCounts, own: dict[Key, Any]) -> dict[str, Any]:
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
            case ("utility", model, level):
                bins = [[_number(part) for part in line] for line in calibration(pooled, table.key)]
                utility[f"{model}/{level}"] = asdict(auroc(pooled, table.key, rng)) | {"calibration": bins}
            case ("group", column, level):
                groups += _by_group(protocol, pooled, table.key, column, level, rng)
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


def _utility_names(protocol: Protocol) -> list[str]:
    return [f"{model}/{level}" for model in MODELS for level in outcome_levels(protocol)]


def _by_group(
    protocol: Protocol, pooled: PooledCounts, key: Key, column: str, level: str, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """AUROC in every group of a column: its levels, or its coarse bins."""
    found = []
    for index, group in enumerate(_group_names(protocol, column, pooled.counts[key].shape[0])):
        part = pooled.counts[key][index]
        # How many patients a group has is not public: it is what the counts say.
        size = max(0, round(float(part.sum())))
        one = PooledCounts({key: part}, {key: pooled.deviation[key]}, {key: size}, {key: pooled.sites[key]})
        found.append({"column": column, "group": group, "level": level, **asdict(auroc(one, key, rng))})
    return found


def _group_names(protocol: Protocol, column: str, size: int) -> list[str]:
    declared = protocol.schema[column]
    if declared.is_numeric:
        inner = size - declared.nullable
        names = [f"part {number} of {inner} of the declared range" for number in range(1, inner + 1)]
    else:
        names = list(declared.levels)
    return [*names, "missing"] if declared.nullable else names


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
