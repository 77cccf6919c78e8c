"""How good is the cohort? Federated against pooled, single sites and an unconstrained network, over seeds."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from client.trainers.base import RoundInputs
from common.encoding import TableEncoding
from common.evaluation.metrics import evaluate
from common.generation import sample_prior
from common.model.training import train_locally
from common.study import Protocol
from common.table import Table
from server.checkpoint import build_decoder
from tests.bench.inputs import Inputs, load_inputs, protocol_for, simulate

METRICS = ("gb", "lr", "ks", "tv", "correlation", "missingness", "seconds")


def run(arguments: argparse.Namespace) -> None:
    inputs = load_inputs(arguments.data)
    results: dict[str, list[dict[str, float]]] = {}
    for seed in range(arguments.seeds):
        for name, scores in _runs(inputs, arguments, seed):
            results.setdefault(name, []).append(scores)
            line = json.dumps({"run": name, "seed": seed} | scores)
            print(line, flush=True)
            if arguments.out:
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
    print(_markdown(inputs, arguments, results))


def _runs(inputs: Inputs, arguments: argparse.Namespace, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    overrides = [*arguments.overrides, f"study.seed={seed}", f"release.rows={arguments.rows}"]
    protocol = protocol_for(inputs.folder, overrides)
    pooled = inputs.pooled
    kinds: dict[str, Callable[[], Iterator[tuple[str, dict[str, float]]]]] = {
        "federated": lambda: iter([("federated", _federated(inputs, overrides))]),
        "pooled": lambda: iter([("pooled", _local(protocol, pooled, inputs, constrained=True))]),
        "unconstrained": lambda: iter([("unconstrained", _local(protocol, pooled, inputs, constrained=False))]),
        "single": lambda: (
            (f"single {name}", _local(protocol, table, inputs, constrained=True))
            for name, table in inputs.sites.items()
        ),
    }
    for kind in arguments.runs:
        yield from kinds[kind]()


def _federated(inputs: Inputs, overrides: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        summary = simulate(inputs.folder, out, overrides)
        metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    return scores_of(metrics, summary["seconds"]["federation"])


def _local(protocol: Protocol, table: Table, inputs: Inputs, *, constrained: bool) -> dict[str, float]:
    """The same networks, head and schedule on one table, as one site that never sends anything."""
    training = protocol.study.training
    epochs = training.rounds * training.local_epochs
    study = protocol.study.model_copy(
        update={"training": training.model_copy(update={"rounds": 1, "local_epochs": epochs})}
    )
    encoding = TableEncoding(protocol.schema)
    seed = protocol.study.study.seed or 0
    decoder = build_decoder(protocol, seed)
    torch.set_num_threads(1)
    started = time.perf_counter()
    local = train_locally(
        RoundInputs(study, encoding, encoding.encode(table), decoder.arrays(), 1, {}, seed, torch.device("cpu")),
        constrained=constrained,
    )
    seconds = time.perf_counter() - started
    rows = np.vstack([t.values for t in sample_prior(local.decoder, encoding, protocol.study.release.rows, seed)])
    return scores_of(evaluate(Table(protocol.schema, rows), inputs.pooled, inputs.test, seed), seconds)


def scores_of(metrics: dict[str, Any], seconds: float) -> dict[str, float]:
    tstr, fidelity = metrics["utility"]["tstr"], metrics["fidelity"]
    return {
        "gb": tstr["gradient_boosting"],
        "lr": tstr["logistic_regression"],
        "ks": fidelity["ks_mean"],
        "tv": fidelity["tv_mean"],
        "correlation": fidelity["correlation_difference"],
        "missingness": fidelity["missingness_mean"],
        "seconds": seconds,
        "trtr_gb": metrics["utility"]["trtr"]["gradient_boosting"],
        "trtr_lr": metrics["utility"]["trtr"]["logistic_regression"],
    }


def _markdown(inputs: Inputs, arguments: argparse.Namespace, results: dict[str, list[dict[str, float]]]) -> str:
    """The table of the README: mean over seeds (for single sites over seeds and sites), with the range over seeds."""
    rows = {name: runs for name, runs in results.items() if not name.startswith("single")}
    singles = [runs for name, runs in results.items() if name.startswith("single")]
    if singles:
        rows["single site, mean"] = [
            {metric: float(np.mean([runs[seed][metric] for runs in singles])) for metric in singles[0][0]}
            for seed in range(arguments.seeds)
        ]
    real = next(iter(results.values()))[0]
    lines = [
        f"\n{inputs.folder.name}: {len(inputs.sites)} sites, {len(inputs.pooled)} patients, {arguments.rows} synthetic"
        f" rows, {arguments.seeds} seeds, mean (range); real data: {real['trtr_gb']:.3f} / {real['trtr_lr']:.3f}\n",
        "| run | TSTR gb | TSTR lr | KS | TV | Δcorr | training s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, runs in rows.items():
        cells = [_cell([run[metric] for run in runs]) for metric in ("gb", "lr", "ks", "tv", "correlation")]
        lines.append(f"| {name} | {' | '.join(cells)} | {np.mean([run['seconds'] for run in runs]):.0f} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"
