"""A small study, and comparisons of it whose federations are made up."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.privacy.dpsgd import dpsgd_schedule
from common.privacy.events import BoundedInfluence, Event, GaussianUpdate, UnboundedInfluence
from common.privacy.statement import privacy_statement
from common.study import Protocol
from common.table import Table
from server.compare import (
    Plan,
    plan_comparison,
)
from server.compare_records import Comparison
from server.run import RunFiles
from server.simulation import SimulationResult

STUDY = """[study]
name = "small"
schema = "schema.json"
[training]
rounds = 2
"""
SCHEMA = {
    "cohortium:target": "dead",
    "fields": [
        {"name": "age", "type": "number", "constraints": {"minimum": 0, "maximum": 120}},
        {"name": "dead", "type": "boolean", "constraints": {"required": True}},
    ],
}
PATIENTS = {"anna": 60, "berta": 40}


def csv(rows: int, seed: int) -> str:
    random = np.random.default_rng(seed)
    lines = [f"{random.uniform(20, 90):.1f},{'true' if random.random() < 0.4 else 'false'}" for _ in range(rows)]
    return "\n".join(["age,dead", *lines]) + "\n"


def plan(folder: Path, text: str = "", **options: Any) -> Plan:
    (folder / "study.toml").write_text(STUDY + text)
    return plan_comparison(folder / "study.toml", **options)


def by_line(found: Plan) -> dict[str, Protocol]:
    return {run.line: run.protocol for run in found.runs}


def events_of(protocol: Protocol, patients: int, weight: float) -> list[Event]:
    study = protocol.study
    numbers = range(1, study.training.rounds + 1)
    if study.training.mode == "none":
        return [UnboundedInfluence(number, weight) for number in numbers]
    if study.training.mode == "dpsgd":
        return [dpsgd_schedule(study, patients).event(number) for number in numbers]
    norm, noise = study.training.update_norm, study.privacy.update_noise
    if noise:
        return [GaussianUpdate(number, norm, noise, weight) for number in numbers]
    return [BoundedInfluence(number, norm, weight) for number in numbers]


def statement_of(protocol: Protocol, silent: Sequence[str] = ()) -> dict[str, Any]:
    events = {
        site: [] if site in silent else events_of(protocol, number, number / sum(PATIENTS.values()))
        for site, number in PATIENTS.items()
    }
    return privacy_statement(protocol, events, PATIENTS)


# Base AUROC of every mode; each seed adds 0.01.
BASE = {"constrained": 0.74, "dpsgd": 0.60, "none": 0.76}


@dataclass
class Runs:
    """Stands in for Flower: `trouble` is raised by the run into the folder of that name."""

    trouble: dict[str, BaseException] = field(default_factory=dict)
    silent: dict[str, Sequence[str]] = field(default_factory=dict)
    undefined: tuple[str, ...] = ()
    started: list[str] = field(default_factory=list)

    def simulate(
        self, protocol: Protocol, directory: Path, tables: Any, files: RunFiles, on_round: Any
    ) -> SimulationResult:
        self.started.append(files.out.name)
        if files.out.name in self.trouble:
            raise self.trouble[files.out.name]
        return SimulationResult(protocol, files, next(iter(tables.values())), {"federation": 2.0}, {})

    def release(self, result: SimulationResult, held_out: Table | None, *, thorough: bool) -> dict[str, Any]:
        name, study = result.files.out.name, result.protocol.study
        auroc = BASE[study.training.mode] + 0.01 * (study.study.seed or 0) + 0.001 * (study.privacy.epsilon or 0)
        result.files.privacy.write_text(json.dumps(statement_of(result.protocol, self.silent.get(name, ()))))
        tstr = {"gradient_boosting": auroc, "logistic_regression": auroc + 0.005, "reason": ""}
        if name in self.undefined:
            tstr = {"gradient_boosting": None, "logistic_regression": None, "reason": "one outcome class only"}
        trtr = {"gradient_boosting": 0.78, "logistic_regression": 0.79, "reason": ""}
        metrics = {
            "fidelity": {"ks_mean": 0.1, "tv_mean": 0.2, "correlation_difference": None},
            "utility": None if held_out is None else {"tstr": tstr, "trtr": trtr},
            "utility_reason": "no test table was given" if held_out is None else "",
        }
        result.files.metrics.write_text(json.dumps(metrics))
        return {"seconds": result.seconds, "not_joined": {}}


Compare = Callable[..., Comparison]
