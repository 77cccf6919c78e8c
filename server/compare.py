"""`cohortium compare`: the constrained, dpsgd and non-private modes on one study. What is run, and running it.

`plan_comparison` and `Plan.check` find everything that can be wrong with the input; no federation has started then.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import validate
from common.console import progress
from common.errors import CohortiumError, FederationError, OutputError, StudyError, UsageError
from common.evaluation.metrics import caution
from common.gates_section import GatesSection
from common.privacy.accountant import check_delta
from common.privacy.dpsgd import dpsgd_schedule
from common.privacy.update_noise import require_useful_noise
from common.study import Protocol, Study, load_protocol, parse_override
from common.table import Table, read_table
from server.checkpoint import build_decoder
from server.compare_records import Comparison, RunRecord, RunResult, assemble, read_result
from server.progress import show_rounds
from server.release import release_simulation
from server.run import claim_output
from server.simulation import StoppedError, load_sites, simulate

EPSILONS = (1.0, 3.0, 10.0)
LARGEST_EPSILON = 1000.0  # beyond it there is next to no noise, and calibrating it is at the limits of the numbers
CONSTRAINED, NON_PRIVATE = "constrained", "non-private"
RUNS = "runs"

# The dpsgd runs of a study in another mode. About seventy runs on SUPPORT-2 alone, its test patients in view, varied
# width, depth, latent dimension, batch, steps, rounds, learning rate, clip, KL weight and Lipschitz bounds at ε = 10
# and 3; another study may want others, which `--dpsgd` sets. `update_norm` never binds here: DP-SGD does not need it.
DPSGD_SETTINGS = (
    "model.hidden=[32]",
    "model.latent_dim=12",
    "model.decoder_lipschitz=8.0",
    "training.batch_size=256",
    "training.local_epochs=2",
    "training.learning_rate=0.03",
    "training.kl_weight=0.1",
    "training.gradient_clip=1.0",
    "training.update_norm=10.0",
)
# Sections whose keys may differ between the runs without changing what they are compared on.
DPSGD_SECTIONS = ("model", "training")
PLANNED_KEYS = {
    ("training", "mode"): "the comparison runs every mode itself; leave the key out",
    ("privacy", "epsilon"): "name the ε of the dpsgd runs with --epsilon",
}


@dataclass(frozen=True)
class PlannedRun:
    """One federation: a line of the table, under one seed. `settings` is what differs from the study as given."""

    line: str
    name: str
    folder: str
    protocol: Protocol
    requested_epsilon: float | None
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """Every run of a comparison, in order; `notes` say what of the study does not apply to it."""

    base: Protocol
    runs: tuple[PlannedRun, ...]
    notes: tuple[str, ...]

    def check(self, patients: Mapping[str, int]) -> None:
        """Raise what any run would be refused for at sites with these numbers of patients."""
        seen: set[tuple[str, float | None]] = set()
        dpsgd = [run.requested_epsilon for run in self.runs if run.requested_epsilon is not None]
        for run in self.runs:
            if (run.line, run.requested_epsilon) in seen:
                continue  # another seed of the same line
            seen.add((run.line, run.requested_epsilon))
            study = run.protocol.study
            if study.training.min_sites > len(patients):
                raise FederationError(
                    f"{run.line}: {len(patients)} site(s), training.min_sites is {study.training.min_sites}",
                    fix="add sites or lower training.min_sites",
                )
            if study.privacy.update_noise > 0:
                require_useful_noise(study, build_decoder(run.protocol, seed=0).size, patients)
            for site, number in patients.items():
                check_delta(study.privacy.delta, number, site)
                # The smallest ε needs the most noise: if that exists, so does the noise of every other.
                if dpsgd and run.requested_epsilon == min(dpsgd):
                    dpsgd_schedule(study, number)


def plan_comparison(
    path: Path,
    *,
    epsilons: Sequence[float] = EPSILONS,
    seeds: int = 1,
    overrides: Sequence[str] = (),
    dpsgd: Sequence[str] = (),
) -> Plan:
    """The runs on the study in `path`; `StudyError`, `SchemaError` or `UsageError` for anything wrong with them.

    `overrides` (`--set`) hold for every run; `dpsgd` overrides the dpsgd runs only. Those of a study in another mode
    start from `DPSGD_SETTINGS`, over which `overrides` take precedence.
    """
    epsilons = check_epsilons(epsilons)
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}: expected a whole number of at least 1", fix="for example --seeds 3")
    changes = [planned_change("--set", text) for text in overrides]
    special = [planned_change("--dpsgd", text) for text in dpsgd]
    base = load_protocol(path, overrides)
    document, notes = _comparable(base, seeds)
    if base.study.training.mode == "dpsgd":
        notes.append('The study is in mode "dpsgd": its own settings are those of every run.')
        built_in: list[Change] = []
    else:
        notes.append(f"Settings of the dpsgd runs, unless named otherwise: {', '.join(DPSGD_SETTINGS)}.")
        built_in = [planned_change("--dpsgd", text) for text in DPSGD_SETTINGS]
    if special:
        notes.append(f"Further settings of the dpsgd runs: {', '.join(dpsgd)}.")

    lines: list[tuple[str, str, float | None, dict[str, Any]]] = []
    lines.append((CONSTRAINED, CONSTRAINED, None, _without_dpsgd(document, "constrained")))
    for epsilon in epsilons:
        variant = _edited(document, [*built_in, *changes, *special])
        variant["training"]["mode"] = "dpsgd"
        variant["privacy"] |= {"epsilon": epsilon, "update_noise": 0.0}
        # Reset again: the changes of --set that `_comparable` took back.
        variant = _comparable_document(variant)
        lines.append((f"dpsgd ε = {epsilon:g}", f"dpsgd-eps{epsilon:g}", epsilon, variant))
    lines.append((NON_PRIVATE, NON_PRIVATE, None, _without_dpsgd(document, "none")))

    runs: list[PlannedRun] = []
    for seed in range(seeds) if seeds > 1 else (base.study.study.seed,):
        for line, folder, epsilon, variant in lines:
            protocol = _protocol(variant, seed, base, line)
            name, where = (f"{line}, seed {seed}", f"{folder}-seed{seed}") if seeds > 1 else (line, folder)
            runs.append(PlannedRun(line, name, where, protocol, epsilon, _difference(base, protocol)))
    return Plan(base, tuple(runs), tuple(notes))


def check_epsilons(epsilons: Sequence[float]) -> list[float]:
    """The ε in ascending order; `UsageError` listing every one that is no ε, says nothing, or occurs twice."""
    problems = [f"{value!r} is not a positive finite number" for value in epsilons if not 0 < value < math.inf]
    problems += [
        f"{value:g} is above {LARGEST_EPSILON:g}, where ε says nothing"
        for value in epsilons
        if LARGEST_EPSILON < value < math.inf
    ]
    names = [f"{value:g}" for value in epsilons]
    problems += [f"{name} is named {names.count(name)} times" for name in sorted(set(names)) if names.count(name) > 1]
    if not epsilons:
        problems.append("no ε is named")
    if problems:
        raise UsageError(
            f"--epsilon: {'; '.join(problems)}; expected different positive numbers",
            fix="for example --epsilon 1 --epsilon 3 --epsilon 10",
        )
    return sorted(epsilons)


@dataclass(frozen=True)
class Change:
    """A key of the study and its new value."""

    section: str
    key: str
    value: Any


def planned_change(option: str, text: str) -> Change:
    """Read "section.key=value"; `StudyError` for another form, `UsageError` for a key that the comparison sets."""
    section, key, value = parse_override(text, option)
    if (section, key) in PLANNED_KEYS:
        raise UsageError(f"{option} {text!r}: not in a comparison", fix=PLANNED_KEYS[section, key])
    if option == "--dpsgd" and section not in DPSGD_SECTIONS:
        raise UsageError(
            f"{option} {text!r}: expected a key of [model] or [training], the runs must be alike in all others",
            fix=f"use --set {text} for every run, or leave it out",
        )
    return Change(section, key, value)


def _comparable(base: Protocol, seeds: int) -> tuple[dict[str, Any], list[str]]:
    """The study as plain data without what cannot hold for every run, and a sentence for each thing left out."""
    study, notes = base.study, []
    if study.privacy.max_epsilon is not None:
        notes.append(
            f"privacy.max_epsilon = {study.privacy.max_epsilon:g} is left out of every run: with it every site would"
            " refuse the constrained and the non-private run, whose ε is infinite. It holds again for `simulate`."
        )
    if study.privacy.update_noise > 0:
        notes.append(
            f"privacy.update_noise = {study.privacy.update_noise:g} holds for the constrained run only; the others set"
            " it to 0."
        )
    if study.release.method != "prior":
        notes.append(
            f'release.method = "{study.release.method}" is left out: every run samples its cohort from the prior, so'
            " that the runs differ in training alone."
        )
    if study.gates != GatesSection():
        notes.append(
            "[gates] is left out of every run: a comparison measures and hands nothing out, and its runs are not judged"
            " by what a release has to show."
        )
    if seeds > 1 and study.study.seed is not None:
        notes.append(f"study.seed = {study.study.seed} is replaced by 0 to {seeds - 1}.")
    return _comparable_document(study.document()), notes


def _comparable_document(document: Mapping[str, Any]) -> dict[str, Any]:
    changed = _edited(document, ())
    changed["privacy"]["max_epsilon"] = None
    changed.pop("gates", None)
    if changed["release"]["method"] != "prior":
        changed["release"]["method"] = "prior"
        changed.pop("channel", None)
    return changed


def _without_dpsgd(document: Mapping[str, Any], mode: str) -> dict[str, Any]:
    """In another mode, without the keys that only dpsgd has: they are refused there."""
    changed = _edited(document, ())
    changed["training"]["mode"] = mode
    changed["training"].pop("gradient_clip")
    changed["privacy"].pop("epsilon")
    if mode == "none":
        changed["privacy"]["update_noise"] = 0.0
    return changed


def _edited(document: Mapping[str, Any], changes: Iterable[Change]) -> dict[str, Any]:
    copy = json.loads(json.dumps(document))
    for change in changes:
        copy.setdefault(change.section, {})[change.key] = change.value
    return copy


def _protocol(document: Mapping[str, Any], seed: int | None, base: Protocol, line: str) -> Protocol:
    seeded = _edited(document, (Change("study", "seed", seed),))
    return Protocol(validate(Study, seeded, f"the settings of the run {line!r}", StudyError), base.schema)


def _difference(base: Protocol, protocol: Protocol) -> dict[str, Any]:
    before, after = (dict(_leaves(p.study.document())) for p in (base, protocol))
    return {key: after.get(key) for key in sorted(before | after) if before.get(key) != after.get(key)}


def _leaves(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for section, content in document.items():
        if isinstance(content, dict):
            yield from ((f"{section}.{key}", value) for key, value in content.items())
        else:
            yield section, content


@dataclass(frozen=True)
class Inputs:
    """What all runs share, read once."""

    sites: Path
    tables: Mapping[str, Table]
    held_out: Table | None

    @classmethod
    def read(cls, plan: Plan, sites: Path, test: Path | None) -> Inputs:
        """Read sites and held-out patients and check the plan against them, so that no run is refused later."""
        tables = load_sites(sites, plan.base)
        held_out = read_table(test, plan.base.schema)[0] if test else None
        plan.check({name: len(table) for name, table in tables.items()})
        return cls(sites, tables, held_out)


def run_comparison(plan: Plan, inputs: Inputs, out: Path, *, quiet: bool) -> Comparison:
    """Run everything in turn under `out`, which is claimed already. A run that fails is recorded; the others go on.

    `StoppedError` on Ctrl-C, `OutputError` when nothing can be written any more; both name the runs that are finished.
    """
    records: list[RunRecord] = []
    for number, run in enumerate(plan.runs, 1):
        if not quiet:
            progress.print(f"run {number} of {len(plan.runs)}: {run.name}")
        record = RunRecord(
            run=run.line,
            mode=run.protocol.study.training.mode,
            seed=run.protocol.study.study.seed,
            requested_epsilon=run.requested_epsilon,
            settings=dict(run.settings),
            study_digest=run.protocol.digest,
            folder=f"{RUNS}/{run.folder}",
        )
        try:
            result = _run_one(run, inputs, out / record.folder, quiet=quiet)
            record = record.model_copy(update={"result": result})
        except (StoppedError, KeyboardInterrupt) as error:
            how = error.message if isinstance(error, StoppedError) else "stopped by Ctrl-C after its rounds"
            raise StoppedError(f"run {number} of {len(plan.runs)} ({run.name}): {how}\n{_kept(records, out)}") from None
        except OutputError as error:
            raise OutputError(f"{error.message}\n{_kept(records, out)}", fix=error.fix) from None
        except CohortiumError as error:
            record = record.model_copy(update={"failed": error.message})
        except Exception as error:
            # Its text may quote a patient's cell. The runs that worked are worth keeping all the same.
            if os.environ.get("COHORTIUM_DEBUG"):
                raise
            record = record.model_copy(update={"failed": f"an unforeseen {type(error).__name__}"})
        if record.failed and not quiet:
            progress.print(f"{run.name} failed: {record.failed}")
        records.append(record)
    real, test = sum(map(len, inputs.tables.values())), inputs.held_out
    return assemble(
        plan.base,
        records,
        patients={name: len(table) for name, table in inputs.tables.items()},
        caution=caution(real, None if test is None else len(test)),
        notes=plan.notes,
        has_test=test is not None,
    )


def _run_one(run: PlannedRun, inputs: Inputs, folder: Path, *, quiet: bool) -> RunResult:
    files = claim_output(folder.resolve())
    with show_rounds(run.protocol.study.training.rounds, quiet=quiet) as on_round:
        finished = simulate(run.protocol, inputs.sites, inputs.tables, files, on_round)
    summary = release_simulation(finished, inputs.held_out, thorough=False)
    statement = json.loads(files.privacy.read_text(encoding="utf-8"))
    metrics = json.loads(files.metrics.read_text(encoding="utf-8"))
    return read_result(summary, statement, metrics)


def _kept(records: Sequence[RunRecord], out: Path) -> str:
    done = [record.folder.removeprefix(f"{RUNS}/") for record in records if record.result is not None]
    if not done:
        return f"No run is finished; {out / RUNS} holds what there is."
    return f"Finished and whole on disk in {out / RUNS}: {', '.join(done)}. No comparison was written."


def require_finished(comparison: Comparison) -> None:
    """`FederationError` naming every run that failed, after the comparison of the others is written."""
    failed = [record for record in comparison.runs if record.failed]
    if failed:
        listing = "\n".join(f"  - {record.folder}: {record.failed}" for record in failed)
        raise FederationError(
            f"{len(failed)} of {len(comparison.runs)} runs failed; the comparison holds the others\n{listing}",
            fix="see runtime.log and site-logs in these folders; dpsgd that diverges wants a smaller"
            " --dpsgd training.learning_rate",
        )
