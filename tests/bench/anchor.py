"""The anchor at several ε: noise at every site, and as if one party had pooled the statistics and noised them once."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator

import numpy as np

from client.anchor import exact_statistics, noised_statistics
from common.encoding import EncodedTable, TableEncoding
from common.evaluation.metrics import evaluate
from common.privacy.anchor import STEPS, Step, anchor_event
from common.study import Protocol
from common.table import Table
from server.anchor.generators import make_generators
from server.anchor.statistics import Pooled, Statistics
from tests.bench.inputs import Inputs, load_inputs, protocol_for
from tests.bench.quality import scores_of

COLUMNS = ("gb", "lr", "ks", "tv", "correlation")
POOLED = "pooled"


def run(arguments: argparse.Namespace) -> None:
    inputs = load_inputs(arguments.data)
    results: dict[tuple[str, float, str], list[dict[str, float]]] = {}
    for seed in range(arguments.seeds):
        for epsilon in arguments.epsilon:
            for where in arguments.noise:
                for generator, scores in _runs(inputs, arguments, epsilon, where, seed):
                    results.setdefault((where, epsilon, generator), []).append(scores)
                    line = {"noise": where, "epsilon": epsilon, "generator": generator, "seed": seed} | scores
                    print(json.dumps(line), flush=True)
    print(_markdown(inputs, results))


def _runs(
    inputs: Inputs, arguments: argparse.Namespace, epsilon: float, where: str, seed: int
) -> Iterator[tuple[str, dict[str, float]]]:
    overrides = ["training.mode=anchored", f"anchor.epsilon={epsilon}", f"study.seed={seed}", *arguments.overrides]
    protocol = protocol_for(inputs.folder, overrides)
    encoding = TableEncoding(protocol.schema)
    tables = {POOLED: inputs.pooled} if where == POOLED else inputs.sites
    data = {site: encoding.encode(table) for site, table in tables.items()}
    started = time.perf_counter()
    first = _asked(protocol, data, "marginals", None, seed)
    marginals = np.concatenate(Statistics(protocol, first).marginals)
    statistics = Statistics(protocol, first, _asked(protocol, data, "moments", marginals, seed))
    made = make_generators(statistics, seed)
    seconds = time.perf_counter() - started
    generators = {"copula": made.copula.sample, "decoder": made.decoder_rows, "nearest": made.sample}
    for name in arguments.generators:
        rows = np.vstack([table.values for table in generators[name](arguments.rows, seed)])
        metrics = evaluate(Table(protocol.schema, rows), inputs.pooled, inputs.test, seed, thorough=False)
        yield name, scores_of(metrics, seconds)


def _asked(
    protocol: Protocol, data: dict[str, EncodedTable], step: Step, marginals: np.ndarray | None, seed: int
) -> Pooled:
    """What the sites send, each with noise of its own, from seeds: these ε are as if."""
    event, total = anchor_event(protocol.study, step), None
    for number, (_, table) in enumerate(sorted(data.items())):
        exact, sensitivity = exact_statistics(protocol, table, step, marginals)
        stream = 1000 * seed + 10 * number + STEPS.index(step)
        sent = noised_statistics(exact, sensitivity, event, stream)
        total = sent if total is None else total + sent
    assert total is not None
    return Pooled(total, {site: len(table) for site, table in data.items()})


def _markdown(inputs: Inputs, results: dict[tuple[str, float, str], list[dict[str, float]]]) -> str:
    seeds = len(next(iter(results.values())))
    lines = [
        f"\n{inputs.folder.name}: {len(inputs.sites)} sites, {len(inputs.pooled)} patients, {seeds} seeds, mean"
        " (range)\n",
        "| noise | ε | generator | TSTR gb | TSTR lr | KS | TV | Δcorr | s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (where, epsilon, generator), runs in results.items():
        cells = []
        for metric in COLUMNS:
            values = [run[metric] for run in runs]
            spread = f" ({min(values):.3f}-{max(values):.3f})" if metric in ("gb", "lr") else ""
            cells.append(f"{np.mean(values):.3f}{spread}")
        seconds = np.mean([run["seconds"] for run in runs])
        lines.append(f"| {where} | {epsilon:g} | {generator} | {' | '.join(cells)} | {seconds:.0f} |")
    return "\n".join(lines)
