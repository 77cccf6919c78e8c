"""What an evaluation by the sites costs them in seconds, and how wide its intervals are at several ε."""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.evaluation.counts import CountPlan, Population
from common.evaluation.results import ALL, evaluation_results
from common.evaluation.tabulate import tabulate
from common.privacy.evaluation_release import evaluation_event, noised_counts
from common.privacy.holdout import holdout_slots
from common.study import Protocol
from common.table import Table, read_table
from tests.bench.inputs import load_inputs, protocol_for


def run(arguments: argparse.Namespace) -> None:
    inputs = load_inputs(arguments.data)
    settings = ["evaluation.method=accounted", f"evaluation.holdout={arguments.holdout}", *arguments.overrides]
    protocols = {e: protocol_for(arguments.data, [*settings, f"evaluation.epsilon={e}"]) for e in arguments.epsilon}
    first = next(iter(protocols.values()))
    cohort, _ = read_table(arguments.cohort, inputs.schema)
    cohort = Table(cohort.schema, cohort.values[: first.study.evaluation.rows])
    exact: dict[str, NDArray[np.float64]] = {}
    plan = CountPlan(())
    for site, table in inputs.sites.items():
        started = time.perf_counter()
        plan, counts = tabulate(first, cohort, populations(first, table))
        exact[site] = plan.join(counts)
        print(f"{site}: {len(table)} patients, {len(cohort)} rows: {time.perf_counter() - started:.1f} s")
    patients = {site: len(table) for site, table in inputs.sites.items()}
    print(f"{len(plan.tables)} tables, {plan.size} cells")
    for epsilon, protocol in protocols.items():
        event = evaluation_event(protocol.study)
        found, seconds = list[dict[str, Any]](), 0.0
        for seed in range(arguments.seeds):
            answers = {
                site: noised_counts(cells, plan, event, 1000 * seed + k)[None, :]
                for k, (site, cells) in enumerate(exact.items())
            }
            started = time.perf_counter()
            found.append(evaluation_results(protocol, cohort, answers, patients)["results"])
            seconds = time.perf_counter() - started
        for name in (ALL, next(iter(exact))):
            print(f"ε = {epsilon:g}, {name}; reading {seconds:.1f} s")
            rows = [_numbers(each[name]) for each in found]
            for key in (key for key in rows[0] if all(key in row for row in rows)):
                values, widths = [row[key][0] for row in rows], [row[key][1] for row in rows]
                print(f"  {key:<44}{np.mean(values):8.3f}  ±{np.mean(widths) / 2:.3f}  (spread {np.std(values):.3f})")


def populations(protocol: Protocol, table: Table) -> dict[Population, Table]:
    """Everyone, those who take part, those held out."""
    fit, held_out = holdout_slots(protocol.digest, len(table), protocol.study.evaluation.holdout)
    parts = {"fit": Table(table.schema, table.values[fit]), "holdout": Table(table.schema, table.values[held_out])}
    return {"everyone": table, "fit": parts["fit"], "holdout": parts["holdout"]}


def _numbers(found: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Values and widths of intervals; of distances how far a value is above chance, and chance itself."""
    numbers: dict[str, tuple[float, float]] = {}

    def add(name: str, entry: dict[str, Any]) -> None:
        numbers[name] = entry["value"], entry["high"] - entry["low"]

    for name, entry in found["utility"].items():
        add(f"utility {name}", entry)
        add(f"utility {name} observed - predicted", entry["observed_minus_predicted"])
    for entry in found["groups"]:
        if entry["value"] is not None:
            add(f"group {entry['column']} {entry['group']} {entry['level']}", entry)
    distances = list(found["marginals"].values())
    numbers["marginals: value, ± half of chance"] = tuple(  # pyright: ignore[reportArgumentType]
        float(np.mean([entry[part] for entry in distances])) for part in ("value", "chance")
    )
    attacks = found["attacks"]
    for name, entry in attacks["membership"].items():
        add(f"membership {name} AUROC", entry["auroc"])
        add(f"membership {name} TPR", entry["true_positive_rate"])
    contrasts = {f"copies {kind}": entry for kind, entry in attacks["copies"].items()}
    contrasts |= {"linkability": attacks["linkability"]}
    contrasts |= {f"inference {name}": entry for name, entry in attacks["inference"].items()}
    for name, entry in contrasts.items():
        for part in ("fit", "holdout", "difference"):
            add(f"{name} {part}", entry[part])
    return numbers
