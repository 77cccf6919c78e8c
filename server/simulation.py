"""A whole study on one machine under Flower's simulation runtime: the ServerApp and ClientApp of a deployment."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from common.audit import AUDIT_LOG
from common.errors import CohortiumError, DataError, ExitCode, FederationError, OutputError
from common.files import write_atomic
from common.study import SITE_NAME, Mode, Protocol, Study
from common.table import Table, read_table
from server.run import RUN_VARIABLE, RunFiles, RunSettings

POLL_SECONDS = 0.2
GRACE_SECONDS = 5.0
WORK, SITES = ".work", "sites"
LEAST_FREE_BYTES = 1 << 20
MOST_ROWS = 1 << 40


@dataclass(frozen=True)
class RoundProgress:
    """A finished round with the diagnostics that exist in a simulation only (a real site never sends them)."""

    report: dict[str, Any]
    loss: float | None
    update_norm: float | None


@dataclass(frozen=True)
class SimulationResult:
    """What a finished simulation leaves for the release: files, the pooled real table and timings (seconds).

    `patients` counts the rows of every site, in the order in which they are pooled.
    """

    protocol: Protocol
    files: RunFiles
    real: Table
    seconds: dict[str, float]
    patients: Mapping[str, int]


class StoppedError(CohortiumError):
    """Ctrl-C."""

    exit_code = ExitCode.INTERRUPTED


def load_sites(directory: Path, protocol: Protocol) -> dict[str, Table]:
    """Read `directory/*.csv`, one site a file; `DataError` listing the problems of every site at once."""
    paths = sorted(directory.glob("*.csv")) if directory.is_dir() else []
    if not paths:
        raise DataError(f"{directory}: no *.csv files found", fix="put one CSV file a site into this directory")
    tables: dict[str, Table] = {}
    problems: list[str] = []
    for path in paths:
        if not re.fullmatch(SITE_NAME, path.stem):
            problems.append(
                f"site {path.stem!r}: a site's name is made of at most 64 letters, digits, dots, hyphens and"
                " underscores; rename the file"
            )
            continue
        try:
            tables[path.stem], _ = read_table(path, protocol.schema)
        except DataError as error:
            problems.append(f"site {path.stem!r}: {error.message}")
    if problems:
        raise DataError("\n".join(problems), fix="`cohortium-site check` shows every column of a site's file")
    least = protocol.study.training.min_sites
    if len(tables) < least:
        raise FederationError(
            f"{directory}: {len(tables)} site(s), training.min_sites is {least}",
            fix="add sites or lower training.min_sites",
        )
    return tables


def simulate(
    protocol: Protocol,
    directory: Path,
    tables: Mapping[str, Table],
    files: RunFiles,
    on_round: Callable[[RoundProgress], None],
    record: str | None = None,
) -> SimulationResult:
    """Run the study over `directory`'s sites, read by `load_sites`; `on_round` hears of every round.

    `record` names a site whose messages are kept for an audit.

    Raises `FederationError` or what the ServerApp failed with; `StoppedError` on Ctrl-C. Whatever happens, the sites'
    working folders (encoders, optimiser states) are removed, their ledgers and logs kept.
    """
    write_atomic(files.study, json.dumps(protocol.to_json(), indent=1))
    started = time.perf_counter()
    work = files.out / WORK
    try:
        _lay_out_sites(work, directory, list(tables))
        RunSettings(protocol, files.out, len(tables), simulation=True, record=record).save(work / "run.json")
        with _worker(work, files) as process:
            _follow(process, protocol.study, files, work, list(tables), on_round)
    except KeyboardInterrupt:
        raise StoppedError(_stopped_message(files)) from None
    finally:
        _collect(work, files)
    real = Table(protocol.schema, np.vstack([table.values for table in tables.values()]))
    patients = {name: len(table) for name, table in tables.items()}
    return SimulationResult(protocol, files, real, {"federation": time.perf_counter() - started}, patients)


def _lay_out_sites(work: Path, directory: Path, names: list[str]) -> None:
    """A site.toml for every virtual hospital, and the list by which the ClientApp finds its own."""
    paths = []
    for name in names:
        path = work / SITES / name / "site.toml"
        data = json.dumps(str((directory / f"{name}.csv").resolve()))  # a JSON string is a valid TOML string
        write_atomic(
            path,
            f'[site]\nname = {json.dumps(name)}\ndata = {data}\nstate = "state"\nthreads = 1\n'
            "[policy]\nsimulation = true\nmin_patients = 1\nmin_count = 1\n"
            f"modes = {json.dumps(get_args(Mode))}\n"
            f"max_update_norm = 1e9\nmax_release_rows = {MOST_ROWS}\n",
        )
        paths.append(str(path))
    write_atomic(work / "sites.json", json.dumps(paths))


@contextmanager
def _worker(work: Path, files: RunFiles) -> Iterator[subprocess.Popen[bytes]]:
    """The runtime in a process group of its own, its output in `runtime.log`; always gone afterwards."""
    environment = os.environ | {
        RUN_VARIABLE: str(work / "run.json"),
        "COHORTIUM_SIMULATION": str(work / "sites.json"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # see `cwd` below
    }
    with files.log.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "server.worker"],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            # Python and Ray import from the working directory: a `server` or `common` in the user's is not ours.
            cwd=work,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the group to stop, then make it."""
    for sign, patience in ((signal.SIGINT, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
        if process.poll() is not None:
            break
        os.killpg(process.pid, sign)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def _follow(
    process: subprocess.Popen[bytes],
    study: Study,
    files: RunFiles,
    work: Path,
    names: list[str],
    on_round: Callable[[RoundProgress], None],
) -> None:
    """Report rounds as they appear until the worker ends; raise what it failed with."""
    seen = 0
    while True:
        ended = process.poll() is not None
        reports = _json_lines(files.rounds)
        for report in reports[seen:]:
            on_round(RoundProgress(report, *_diagnostics(work, names, report["round"])))
        seen = len(reports)
        if ended:
            break
        time.sleep(POLL_SECONDS)
    if files.failure.exists():
        failure = json.loads(files.failure.read_text(encoding="utf-8"))
        error = FederationError(failure["message"], fix=failure["fix"])
        error.exit_code = ExitCode(failure["exit_code"])
        raise error
    if shutil.disk_usage(files.out).free < LEAST_FREE_BYTES:
        raise OutputError(f"{files.out}: the disk is full", fix="free space, or name another --out, and run it again")
    if process.returncode != 0 or not files.complete(study):
        raise FederationError(
            f"the simulation runtime ended with code {process.returncode} before the study did",
            fix=f"see {files.log}",
        )


def _diagnostics(work: Path, names: list[str], number: int) -> tuple[float | None, float | None]:
    """Mean loss a row and mean update norm before projection over the sites' own logs of this round.

    No loss where the mode computes none, as dpsgd does not.
    """
    found = []
    for name in names:
        entries = _json_lines(work / SITES / name / "state" / AUDIT_LOG)
        found += [e for e in entries if e["action"] == "trained" and e["round"] == number]
    if not found:
        return None, None
    losses = [e["loss"] for e in found if "loss" in e]
    norms = [e.get("update_norm_before", e["update_norm"]) for e in found]
    return sum(losses) / len(losses) if losses else None, sum(norms) / len(norms)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file that another process may be appending to; none if there is no file yet."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _collect(work: Path, files: RunFiles) -> None:
    """Keep every site's ledger and log, remove the rest: encoders are made of patient data."""
    for site in sorted((work / SITES).glob("*/state")):
        name = site.parent.name
        for source, target in (
            (site / "ledger.sqlite", files.ledgers / f"{name}.sqlite"),
            # Left by a site that was killed while it wrote; without it SQLite could not undo the unfinished spend.
            (site / "ledger.sqlite-journal", files.ledgers / f"{name}.sqlite-journal"),
            (site / AUDIT_LOG, files.out / "site-logs" / f"{name}.jsonl"),
        ):
            if source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(source, target)
    shutil.rmtree(work, ignore_errors=True)


def _stopped_message(files: RunFiles) -> str:
    rounds = len(_json_lines(files.rounds))
    kept = f"the decoder after round {rounds} ({files.decoder}) and " if rounds else ""
    return f"stopped by Ctrl-C after {rounds} finished round(s); on disk: {kept}the logs and ledgers in {files.out}"
