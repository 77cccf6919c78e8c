"""What accountant and ledger cost in a study of 18 sites and 60 rounds, beside its wall-clock.

Two ways to run: one process that answers for all sites (an actor of a simulation), and a fresh process for every
message (a deployed Flower client), with the memory of `common.privacy.memory` and without. A fresh process pays for the
imports that only accounting needs as well. The wall-clock is that of the given run, scaled to 60 rounds, and for the
deployment in addition the time in which its processes start.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.schema import parse_schema
from common.study import Protocol, Study

# The 18 sites of the International Stroke Trial's table.
PATIENTS = (156, 161, 196, 214, 282, 305, 317, 320, 367, 390, 422, 432, 498, 521, 991, 1167, 2355, 4405)
FRESH = 156  # its schedule takes longest to account
# Flower's program for one message, and what a client needs whatever it accounts.
IMPORTED_ANYWAY = ("flwr.supernode.cli", "torch", "pandas", "common.schema", "common.table", "common.model.vae")
IMPORTED_TO_ACCOUNT = ("common.privacy.channel_release", "common.privacy.dpsgd", "common.privacy.ledger")
ROUNDS = 60
ROWS = 10_000
MODES: Mapping[str, Mapping[str, Any]] = {
    "constrained": {},
    "constrained, noise": {"privacy": {"update_noise": 20.0, "accept_useless_noise": True}},
    "constrained, noise, limit": {"privacy": {"update_noise": 20.0, "accept_useless_noise": True, "max_epsilon": 50.0}},
    "dpsgd": {"training": {"mode": "dpsgd"}, "privacy": {"epsilon": 3.0}},
    "dpsgd, limit": {"training": {"mode": "dpsgd"}, "privacy": {"epsilon": 3.0, "max_epsilon": 50.0}},
}
# A limit needs an unconditional channel: release patients of their own.
CHANNEL = {"release": {"method": "channel", "rows": ROWS}, "channel": {"epsilon": 1.0, "encoder": "synthetic"}}


@dataclass
class Work:
    """What one process is asked for: these messages of these sites, in a folder that holds their ledgers."""

    folder: str
    mode: str
    channel: bool
    patients: tuple[int, ...] = PATIENTS
    rounds: tuple[int, ...] = tuple(range(1, ROUNDS + 1))
    join: bool = True
    release: bool = True
    memory: bool = True
    payload: str = field(default="d" * 64)


def run(arguments: argparse.Namespace) -> None:
    wall, start = _wall_clock(arguments), _process_start()
    deployed_wall = wall + (ROUNDS + 1) * start
    print(f"{len(PATIENTS)} sites, {ROUNDS} rounds, seconds and share of wall-clock")
    print(f"  simulation: all sites, shared by 2 actors; wall-clock {wall:.0f} s")
    print(f"  deployed: one site of {FRESH} patients, a process a message, {start:.1f} s to start one: ", end="")
    print(f"wall-clock {deployed_wall:.0f} s")
    for channel in (False, True):
        for mode in MODES:
            name = f"{mode}, channel" if channel else mode
            simulated, busy = (seconds / 2 for seconds in _in_process(Work("", mode, channel)))
            without = _deployed(mode, channel, FRESH, memory=False)
            remembered = _deployed(mode, channel, FRESH, memory=True)
            print(
                f"  {name:36} simulation {simulated:5.2f} s ({simulated / wall:6.2%}), processor {busy:5.2f} s"
                f" ({busy / wall:6.2%})   deployed {remembered:5.2f} s"
                f" ({remembered / deployed_wall:6.2%}), without memory {without:6.2f} s"
                f" ({without / deployed_wall:6.2%})",
                flush=True,
            )


def _wall_clock(arguments: argparse.Namespace) -> float:
    if arguments.wall_clock is not None:
        return float(arguments.wall_clock)
    if arguments.run is None:
        raise SystemExit("name the folder of a finished `simulate`, or give --wall-clock")
    lines = (arguments.run / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    return sum(seconds) * ROUNDS / len(seconds)


def _process_start() -> float:
    """Seconds until a fresh process has imported what a client needs whatever it accounts."""
    program = f"import {', '.join(IMPORTED_ANYWAY)}"
    return _timed(lambda: subprocess.run([sys.executable, "-c", program], check=True))


def _in_process(work: Work) -> tuple[float, float]:
    """Seconds of a fresh process that answers all of `work`: by the clock, and of the processor alone.

    The difference is waiting for the disk, on which every spend must be before its message leaves.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _spawn(Work(**{**asdict(work), "folder": folder}))


def _deployed(mode: str, channel: bool, patients: int, *, memory: bool) -> float:
    """Seconds of one site in the whole study, every message in a process of its own; round 2 stands for the others."""
    with tempfile.TemporaryDirectory() as folder:

        def message(**which: Any) -> float:
            which = {"rounds": (), "join": False, "release": False, **which}
            return _spawn(Work(folder, mode, channel, (patients,), memory=memory, **which))[0]

        total = message(join=True) + message(rounds=(1,)) + (ROUNDS - 1) * message(rounds=(2,))
        return total + message(release=True) if channel else total


def _spawn(work: Work) -> tuple[float, float]:
    command = [sys.executable, "-m", "tests.bench.accounting", json.dumps(asdict(work))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    seconds, busy = map(float, done.stdout.split())
    return seconds, busy


def answer(work: Work) -> tuple[float, float]:
    """Seconds of accounting and ledger, imports included, as in `client/handlers.py`: by the clock, and of the CPU."""
    for name in IMPORTED_ANYWAY:
        importlib.import_module(name)
    if MODES[work.mode] or work.channel:
        importlib.import_module("scipy.special")  # the noise is drawn with it
    processor = time.process_time()
    seconds = _timed(lambda: [importlib.import_module(name) for name in IMPORTED_TO_ACCOUNT])
    busy = time.process_time() - processor
    importlib.import_module("client.budget")
    protocol = _protocol(work.mode, work.channel)
    processor = time.process_time()
    for patients in work.patients:
        seconds += _timed(lambda n=patients: _site(work, protocol, n))
    return seconds, busy + time.process_time() - processor


def _timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _site(work: Work, protocol: Protocol, patients: int) -> None:
    from client.budget import Budget
    from client.site import PolicySection
    from client.trainers import MODES as TRAINERS
    from common.encoding import TableEncoding
    from common.privacy.channel_release import channel_event, fit_patients
    from common.privacy.ledger import Ledger
    from common.privacy.ledger_entries import Entry
    from common.privacy.ledger_keys import load_key
    from common.privacy.memory import remembering

    state, site, study = Path(work.folder), f"site{patients}", protocol.study
    messages = [*(["join"] if work.join else []), *work.rounds, *(["release"] if work.release and work.channel else [])]
    for message in messages:
        budget = Budget.of(protocol, PolicySection(), patients)
        with contextlib.ExitStack() as stack:
            entries: list[Entry] = []
            if message == "join" or budget.limited:
                with Ledger(state / f"{site}.sqlite", site) as ledger:
                    entries = ledger.entries()
            key = load_key(state / f"{site}.key")
            if work.memory:
                stack.enter_context(remembering(state / f"{site}.json", site, key))
            if message == "join":
                budget.approve(entries)
                continue
            if message == "release":
                event = channel_event(study, TableEncoding(protocol.schema).diameter, patients, ROWS // len(PATIENTS))
            else:
                trained = fit_patients(study, patients)
                event = TRAINERS[study.training.mode].event(study, int(message), 1 / len(PATIENTS), trained)
            approve = budget.approve if budget.limited else None
            if approve is not None:
                approve(entries)
            with Ledger(state / f"{site}.sqlite", site) as ledger:
                ledger.record(protocol.digest, event, work.payload, approve)
                ledger.head()


def _protocol(mode: str, channel: bool) -> Protocol:
    document: dict[str, Any] = {"study": {"name": "bench", "schema": "s.json"}}
    document |= {"training": {"rounds": ROUNDS, **MODES[mode].get("training", {})}}
    document["privacy"] = dict(MODES[mode].get("privacy", {}))
    if channel:
        document |= {name: dict(section) for name, section in CHANNEL.items()}
        if "max_epsilon" in document["privacy"]:
            document["channel"]["release_share"] = 0.5
    fields = [{"name": f"x{i}", "type": "boolean"} for i in range(20)]
    return Protocol(Study.model_validate(document), parse_schema({"fields": fields}))


if __name__ == "__main__":
    print(*answer(Work(**json.loads(sys.argv[1]))))
