"""Leakage against utility: what attackers find, over the decoder's bound, epochs, width, norm projection and sites.

Every point is a whole training in this process, with the real trainers and the strategy's own aggregation, on tables in
whose largest site canaries were planted; its utility is measured on the same run. Two kinds of leakage: canaries (which
row of a pair was planted: AUROC, and the lower bound on ε) and real patients (members against held-out ones: AUROC and
the share of members found at 1 % false positives). Results are appended to a file line by line; a line that is there is
not run again. One core.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

from common.encoding import TableEncoding
from common.evaluation.audit import CONFIDENCE, audit_scores, declared_guesses, strongest
from common.evaluation.canaries import Canaries, draw_canaries
from common.evaluation.canary_scores import SEEN_BY, cohort_scores, message_scores, paired, reconstruction
from common.evaluation.utility import train_and_test
from common.generation import sample_prior
from common.study import Protocol
from common.table import Table
from server.checkpoint import build_decoder
from server.compare import DPSGD_SETTINGS
from tests.bench.inputs import Inputs, load_inputs, protocol_for
from tests.in_process import Trained, federate

MEMBERS = 800  # real patients attacked, and as many held-out ones
FALSE_POSITIVES = 0.01
FREE = "training.mode=none"
POINTS: dict[str, tuple[str, ...]] = {
    "default": (),
    "none": (FREE,),
    "L = 5": ("model.decoder_lipschitz=5.0",),
    "L = 10": ("model.decoder_lipschitz=10.0",),
    "none, 40 epochs": (FREE, "training.rounds=20"),
    "none, 160 epochs": (FREE, "training.rounds=80"),
    "160 epochs": ("training.rounds=80",),
    "L = 5, 160 epochs": ("model.decoder_lipschitz=5.0", "training.rounds=80"),
    "C off": ("training.update_norm=1e9",),
    "C = 0.3": ("training.update_norm=0.3",),
    "40 epochs": ("training.rounds=20",),
    "width 32": ("model.hidden=[32,32]",),
    "L = 80": ("model.decoder_lipschitz=80.0",),
    "one site": ("training.min_sites=1",),
    "dpsgd, ε = 10": ("training.mode=dpsgd", "privacy.epsilon=10.0", *DPSGD_SETTINGS),
    "none, 320 epochs": (FREE, "training.rounds=160"),
    "320 epochs": ("training.rounds=160",),
    "L = 5, 320 epochs": ("model.decoder_lipschitz=5.0", "training.rounds=160"),
}
POOLED, CLEAN = "one site", "default, no canaries"
# Columns of the printed table: heading, and the key of a result.
COLUMNS = {
    "TSTR gb": "gb",
    "TSTR lr": "lr",
    "canaries: public": "canary nearest row",
    "member": "canary reconstruction",
    "coordinator": "canary site's decoders",
    "ε ≥, member": "epsilon reconstruction",
    "patients: public": "patient nearest row",
    "member ": "patient reconstruction",
    "found at 1 %": "found reconstruction",
}


def run(arguments: argparse.Namespace) -> None:
    whole = load_inputs(arguments.data)
    torch.set_num_threads(1)
    names = arguments.points or [*POINTS, CLEAN]
    unknown = [name for name in names if name not in POINTS and name != CLEAN]
    if unknown:
        raise SystemExit(f"unknown points {unknown}; there are {[*POINTS, CLEAN]}")
    results = read_results(arguments.out)
    for seed in range(arguments.seeds):
        for name in names:
            if any((line["point"], line["seed"]) == (name, seed) for line in results):
                continue
            started = time.perf_counter()
            point = Point(
                fewer(whole, arguments.patients, seed), name, seed, arguments.canaries, tuple(arguments.overrides)
            )
            line = {"point": name, "seed": seed} | point.scores() | {"seconds": time.perf_counter() - started}
            results.append(line)
            text = json.dumps(line)
            print(text, flush=True)
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(text + "\n")
    chosen = [line for line in results if line["point"] in names and line["seed"] < arguments.seeds]
    print(markdown(fewer(whole, arguments.patients, 0), arguments.canaries, chosen))
    for key in ("canary reconstruction", "canary site's decoders", "patient reconstruction"):
        print(against_free(chosen, key))
    if arguments.figure and chosen:
        draw(chosen, whole.folder.name).savefig(arguments.figure, dpi=150)


def fewer(inputs: Inputs, patients: int | None, seed: int) -> Inputs:
    """The tables with about `patients` of their rows, drawn at random, every site keeping its share."""
    if patients is None:
        return inputs
    random, share = np.random.default_rng(seed), patients / len(inputs.pooled)
    sites = {
        name: Table(inputs.schema, table.values[random.permutation(len(table))[: round(share * len(table))]])
        for name, table in inputs.sites.items()
    }
    return replace(inputs, sites=sites)


def read_results(path: Path) -> list[dict[str, Any]]:
    """The finished lines of an earlier run; a last line that was cut off is left out."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


@dataclass(frozen=True)
class Point:
    """One setting under one seed."""

    inputs: Inputs
    name: str
    seed: int
    number: int
    overrides: tuple[str, ...]

    def scores(self) -> dict[str, float]:
        """Train, then measure utility and both kinds of leakage."""
        settings = [f"study.seed={self.seed}", *POINTS.get(self.name, ()), *self.overrides]
        protocol = protocol_for(self.inputs.folder, settings)
        sites = {"all": self.inputs.pooled} if self.name == POOLED else dict(self.inputs.sites)
        site = max(sites, key=lambda name: len(sites[name]))
        canaries = draw_canaries(protocol.schema, len(sites[site]), self.number, self.seed)
        planted = sites if self.name == CLEAN else sites | {site: canaries.plant(sites[site])}
        started = time.perf_counter()
        trained = federate(protocol, planted, site)
        seconds = time.perf_counter() - started
        encoding, rows = TableEncoding(protocol.schema), protocol.study.release.rows
        parts = sample_prior(trained.decoder, encoding, rows, self.seed)
        cohort = Table(protocol.schema, np.vstack([part.values for part in parts]))
        utility = train_and_test(cohort, self.inputs.test, str(protocol.target), self.seed)
        scores = {
            "gb": utility.gradient_boosting or np.nan,
            "lr": utility.logistic_regression or np.nan,
            "training_seconds": seconds,
        }
        if self.name != CLEAN:
            scores |= canary_leakage(protocol, trained, cohort, canaries)
        # A slot that was replaced holds no patient who could have been trained on.
        gone = {site: canaries.slots} if self.name != CLEAN else {}
        return scores | self.patient_leakage(trained, cohort, sites, gone)

    def patient_leakage(
        self, trained: Trained, cohort: Table, sites: Mapping[str, Table], gone: Mapping[str, np.ndarray]
    ) -> dict[str, float]:
        """Members against held-out patients, equally many of each, drawn at random from all sites."""
        random = np.random.default_rng(self.seed)
        members = np.vstack([np.delete(t.values, gone.get(name, []), axis=0) for name, t in sites.items()])
        chosen = [v[random.permutation(len(v))[:MEMBERS]] for v in (members, self.inputs.test.values)]
        rows = Table(self.inputs.schema, np.vstack(chosen))
        levels = TableEncoding(self.inputs.schema).encode(rows).levels
        values = cohort_scores(cohort, rows) | {"reconstruction": reconstruction(trained.decoder, levels)}
        number, found = len(chosen[0]), {}
        for name, score in values.items():
            threshold = np.quantile(score[number:], 1.0 - FALSE_POSITIVES)
            found[f"patient {name}"] = auroc(score[:number], score[number:])
            found[f"found {name}"] = float(np.mean(score[:number] > threshold))
        return found


def canary_leakage(protocol: Protocol, trained: Trained, cohort: Table, canaries: Canaries) -> dict[str, float]:
    """AUROC of every score in telling which row of a pair was planted, and the bound on ε it gives.

    The bounds of one training hold together at 95 %, as those of `cohortium audit` do.
    """
    rows = Table(protocol.schema, np.vstack([canaries.first.values, canaries.second.values]))
    levels = TableEncoding(protocol.schema).encode(rows).levels
    values = cohort_scores(cohort, rows) | {"reconstruction": reconstruction(trained.decoder, levels)}
    values |= message_scores(trained.rounds, build_decoder(protocol, seed=0), levels)
    found: dict[str, float] = {}
    for name, score in values.items():
        guesses = paired(score)
        bounds = audit_scores(
            guesses,
            canaries.coins,
            declared_guesses(len(canaries)),
            delta=protocol.study.privacy.delta,
            level=(1.0 - CONFIDENCE) / len(SEEN_BY),
        )
        found[f"canary {name}"] = auroc(guesses[canaries.coins > 0], guesses[canaries.coins < 0])
        found[f"epsilon {name}"] = strongest(bounds).epsilon
    return found


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Probability that a positive's score exceeds a negative's."""
    labels = np.repeat([1, 0], [len(positive), len(negative)])
    return float(roc_auc_score(labels, np.concatenate([positive, negative])))


def markdown(inputs: Inputs, canaries: int, results: Sequence[Mapping[str, Any]]) -> str:
    """Mean over seeds of every point, with the range of the two columns that the question is about."""
    lines = [
        f"\n{inputs.folder.name}: {len(inputs.sites)} sites, {len(inputs.pooled)} patients, {canaries} canaries at the"
        " largest site; mean over seeds (range); AUROC 0.5 is guessing\n",
        f"| point | seeds | {' | '.join(heading.strip() for heading in COLUMNS)} |",
        f"| --- | --- {'| --- ' * len(COLUMNS)}|",
    ]
    for name in dict.fromkeys(line["point"] for line in results):
        runs = [line for line in results if line["point"] == name]
        cells = []
        for key in COLUMNS.values():
            values = [float(run[key]) for run in runs if key in run]
            spread = (
                f" ({min(values):.3f}-{max(values):.3f})" if key in ("gb", "canary reconstruction") and values else ""
            )
            cells.append(f"{np.mean(values):.3f}{spread}" if values else "")
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def against_free(results: Sequence[Mapping[str, Any]], key: str) -> str:
    """Leakage minus that of an unconstrained network of equal utility, mean and range over seeds, of every other point.

    Equal utility: between the unconstrained runs of the same seed, linearly in the mean TSTR of both classifiers. A
    point that no two of them enclose has no difference; how many seeds had one is said.
    """
    lines = [f"\nAUROC of {key!r} minus that of an unconstrained network at the same TSTR, same seed and canaries\n"]
    lines += ["| point | difference | range | seeds |", "| --- | --- | --- | --- |"]
    found: dict[str, list[float]] = {}
    for seed in sorted({line["seed"] for line in results}):
        runs = [line for line in results if line["seed"] == seed and key in line]
        free = sorted((mean_tstr(run), run[key]) for run in runs if run["point"].startswith("none"))
        for run in runs:
            if len(free) > 1 and not run["point"].startswith("none") and free[0][0] <= mean_tstr(run) <= free[-1][0]:
                level = np.interp(mean_tstr(run), [u for u, _ in free], [leak for _, leak in free])
                found.setdefault(run["point"], []).append(float(run[key] - level))
    for name, values in found.items():
        lines.append(f"| {name} | {np.mean(values):+.3f} | {min(values):+.3f} to {max(values):+.3f} | {len(values)} |")
    return "\n".join(lines)


def mean_tstr(run: Mapping[str, Any]) -> float:
    """Mean TSTR of both classifiers."""
    return float(run["gb"] + run["lr"]) / 2.0


def draw(results: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Leakage against TSTR, a mean and its label for every point; the line joins the unconstrained ones."""
    panels = {
        "canary reconstruction": "canaries: AUROC of a member (final decoder)",
        "patient reconstruction": "patients: AUROC of a member (final decoder)",
    }
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axis, (key, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name in dict.fromkeys(line["point"] for line in results):
            runs = [line for line in results if line["point"] == name and key in line]
            if not runs:
                continue
            x, y = np.mean([run["gb"] for run in runs]), np.mean([run[key] for run in runs])
            colour = "#009E73" if name.startswith("none") else "#0072B2" if name.startswith("dpsgd") else "#D55E00"
            axis.plot([x], [y], "o", color=colour)
            axis.annotate(name, (float(x), float(y)), fontsize=6, xytext=(4, 3), textcoords="offset points")
        free = [line for line in results if line["point"].startswith("none")]
        means = [
            [np.mean([line[k] for line in free if line["point"] == name]) for k in ("gb", key)]
            for name in {line["point"] for line in free}
        ]
        if means:
            axis.plot(*zip(*sorted(means), strict=True), "--", color="#009E73", linewidth=0.8)
        axis.axhline(0.5, color="#595959", linewidth=0.8, linestyle=":")
        axis.margins(x=0.15)
        axis.set_xlabel("TSTR, gradient boosting")
        axis.set_ylabel(label)
    figure.suptitle(title)
    return figure
