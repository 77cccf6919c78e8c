"""Wall-clock and peak memory of one `cohortium simulate`, and where the time of its rounds goes."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from pathlib import Path

import psutil

from tests.bench.inputs import simulate


def run(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        peak = _PeakMemory()
        peak.start()
        started = time.perf_counter()
        summary = simulate(arguments.data, out, [*arguments.overrides, "study.seed=0"])
        wall = time.perf_counter() - started
        peak.stop()
        rounds = [json.loads(line) for line in (out / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
        logs = [
            json.loads(line) for path in (out / "site-logs").glob("*.jsonl") for line in path.open(encoding="utf-8")
        ]
    trained = [entry for entry in logs if entry["action"] == "trained"]
    # Sites share the cores: the least wall-clock their work can take is the sum over sites divided by the actors.
    actors = min(os.cpu_count() or 1, len(summary["sites"]))
    total = sum(entry["seconds"] for entry in trained)
    loop = sum(entry["training_seconds"] for entry in trained)
    round_seconds = sum(line["seconds"] for line in rounds)
    server = sum(line["server_seconds"] for line in rounds)
    print(f"{len(summary['sites'])} sites, {len(rounds)} rounds, {actors} actors")
    print(f"wall-clock {wall:.1f} s, peak memory of all processes {peak.megabytes:.0f} MB")
    print(
        f"  rounds {round_seconds:.1f} s; before and after them {wall - round_seconds:.1f} s (Ray, evaluation, report)"
    )
    print(f"  of the rounds: training loops {loop / actors:.1f} s ({loop / actors / round_seconds:.0%})")
    print(
        f"  site work outside training {(total - loop) / actors:.1f} s ({(total - loop) / actors / round_seconds:.1%})"
    )
    print(f"  server work (validate, aggregate, certify, checkpoint) {server:.1f} s ({server / round_seconds:.1%})")
    rest = round_seconds - total / actors - server
    print(f"  Flower, Ray and waiting for the slower actor {rest:.1f} s ({rest / round_seconds:.1%})")
    overhead = ((total - loop) / actors + server) / wall
    print(f"Cohortium outside training and Flower: {overhead:.1%} of wall-clock")


class _PeakMemory:
    """Samples the proportional set size of this process and all its descendants."""

    def __init__(self) -> None:
        self.megabytes = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._done.wait(0.5):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            self.megabytes = max(self.megabytes, total / 1e6)
