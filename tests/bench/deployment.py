"""Seconds, processor time and memory of a real deployment on this machine: every site with all of its processes.

A consortium of N sites is enrolled at a SuperLink with TLS and node keys, all on loopback; its stewards approve at
once; a study of a tiny model, whose training takes next to nothing, runs to its cohort. So what is measured is the
deployment engine: Flower, our processes and the protocol, on the cores that this machine has for all of them together.

The consortium stays in the folder: a second run in it skips the enrolment. Results are added to FOLDER/results.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from server.launch import complete_lines
from tests.bench.usage import PeakMemory, processes_of, used
from tests.federation.consortium import Consortium
from tests.federation.processes import COORDINATOR, Processes, processes, wait_for

STUDY = """
[study]
name = "{name}"
schema = "schema.json"
[model]
latent_dim = 2
hidden = [8]
decoder_lipschitz = 12.0
[training]
rounds = {rounds}
batch_size = 16
local_epochs = 1
min_sites = {sites}
join_timeout = 1200.0
round_timeout = 600.0
[privacy]
delta = 1e-4
[release]
rows = 150
"""
PATIENCE = 900.0
STARTING = 4  # sites that start at the same time: their imports keep the cores busy
SAMPLE_SECONDS = 5.0
LEAST_FREE = 1 << 30  # bytes of memory below which no further site starts


@dataclass
class Result:
    """One run: wall-clock in seconds, processor seconds by kind of process, memory in MB, requests by path."""

    sites: int
    rounds: int
    cores: int
    load: float
    seconds: dict[str, float] = field(default_factory=dict)
    round_seconds: list[float] = field(default_factory=list)
    processor_start: dict[str, float] = field(default_factory=dict)
    processor_a_round: dict[str, float] = field(default_factory=dict)
    requests_a_round: dict[str, float] = field(default_factory=dict)
    idle_seconds: float = 0.0
    processor_idle: dict[str, float] = field(default_factory=dict)
    peak_memory: dict[str, float] = field(default_factory=dict)


class Bench(Consortium):
    """A consortium of many sites with patience, which stays in its folder."""

    def __init__(self, folder: Path, running: Processes, sites: int) -> None:
        addresses = folder / "addresses.json"
        if addresses.exists():
            self.folder, self.running, self.network, self.home = folder, running, None, folder / "consortium"
            self.public, self.private = json.loads(addresses.read_text(encoding="utf-8"))
        else:
            super().__init__(folder, running, None)
            addresses.write_text(json.dumps([self.public, self.private]), encoding="utf-8")
        self.sites = [f"site{number:02}" for number in range(sites)]
        self.counts = folder / "requests.json"

    def start_superlink(self) -> None:
        arguments = ("--consortium", self.home, "--public", self.public, "--private", self.private)
        counting = {"PYTHONPATH": str(Path(__file__).parent / "counting"), "COHORTIUM_BENCH_REQUESTS": str(self.counts)}
        self.running.log("superlink").unlink(missing_ok=True)
        command = [sys.executable, "-c", COORDINATOR, "start-superlink", *map(str, arguments)]
        self.running.start("superlink", command, **counting)
        wait_for(lambda: "ready; the code" in self.log("superlink"), PATIENCE, lambda: self.log("superlink"))

    def start_sites(self) -> None:
        """A few at a time, each until all its services are well."""
        starting: list[str] = []
        for site in self.sites:
            _require_memory()
            self.running.log(site).unlink(missing_ok=True)
            self.start_site(site)
            starting.append(site)
            wait_for(lambda: len(self._not_up(starting)) < STARTING, PATIENCE, f"{starting} do not start")
        wait_for(lambda: not self._not_up(starting), PATIENCE, lambda: self.log(starting[0]))

    def _not_up(self, starting: list[str]) -> list[str]:
        starting[:] = [site for site in starting if not {"worker-ready", "supernode-reached"} <= self.heard(site)]
        return starting

    def heard(self, site: str) -> set[str]:
        """Events of executor and SuperNode so far, out of a site's log."""
        words = set(self.log(site).split())
        contact = self.folder / site / "state" / "run" / "contact.json"
        return words if contact.exists() else set()

    def enrol_all(self) -> None:
        for site in self.sites:
            if not (self.folder / site).exists():
                self.enrol(site)

    def study(self, name: str, rounds: int, round_timeout: float = 60.0) -> Path:
        path = super().study(name, rounds, round_timeout)
        path.write_text(STUDY.format(name=name, rounds=rounds, sites=len(self.sites)), encoding="utf-8")
        return path

    def approve_until(self, joined: Callable[[], bool]) -> None:
        """Stewards who decide at once, until the study has its members."""
        deadline = time.monotonic() + PATIENCE
        while not joined():
            assert time.monotonic() < deadline, self.log("superlink")[-3000:]
            for site in self.sites:
                self.decide(site)
            time.sleep(0.5)

    def requests(self) -> Counter[str]:
        """HTTP requests at the SuperLink so far, by listener and path."""
        return Counter(json.loads(self.counts.read_text(encoding="utf-8"))) if self.counts.exists() else Counter()


def run(arguments: argparse.Namespace) -> None:
    folder: Path = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything it started ends with it
    result = Result(arguments.sites, arguments.rounds, os.cpu_count() or 1, round(os.getloadavg()[0], 2))
    with processes(folder / "logs") as running, PeakMemory(folder, SAMPLE_SECONDS) as memory:
        bench = Bench(folder, running, arguments.sites)
        bench.counts.unlink(missing_ok=True)
        clock = _Clock(result.seconds)
        bench.start_superlink()
        clock.lap("start of the SuperLink")
        bench.enrol_all()
        clock.lap("enrolment")
        bench.start_sites()
        clock.lap("start of the sites")
        result.processor_start = used({}, processes_of(folder))
        if arguments.idle:
            before = processes_of(folder)
            time.sleep(arguments.idle)
            result.idle_seconds, result.processor_idle = arguments.idle, used(before, processes_of(folder))
            clock.lap("idle")
        _study(bench, result, clock)
        result.peak_memory = memory.peak
    clock.lap("stop")
    with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result)) + "\n")
    _print(result)


def _study(bench: Bench, result: Result, clock: _Clock) -> None:
    name = f"bench-{time.time_ns()}"
    out = bench.launch(name, result.rounds)
    bench.approve_until(lambda: (out / "sites.json").exists())
    clock.lap("join")
    looks = [(processes_of(bench.folder), bench.requests())]
    for number in range(1, result.rounds + 1):
        wait_for(lambda n=number: bench.rounds(out) >= n, PATIENCE, lambda: bench.log("superlink")[-3000:])
        looks.append((processes_of(bench.folder), bench.requests()))
    clock.lap("rounds")
    bench.finished(out, f"launch-{name}", PATIENCE)
    clock.lap("release")
    result.round_seconds = [line["seconds"] for line in complete_lines(out / "rounds.jsonl")]
    # The first round comes with what is done once; where there are more, the others stand for a round.
    first = min(1, result.rounds - 1)
    counted = result.rounds - first
    (before, asked), (after, answered) = looks[first], looks[-1]
    result.processor_a_round = {kind: round(s / counted, 2) for kind, s in used(before, after).items()}
    requests = answered - asked
    result.requests_a_round = {path: round(count / counted, 1) for path, count in requests.most_common()}


class _Clock:
    """Seconds since the last lap, by name."""

    def __init__(self, laps: dict[str, float]) -> None:
        self._laps, self._last = laps, time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self._laps[name], self._last = round(now - self._last, 2), now
        print(f"  {name}: {self._laps[name]:.1f} s", flush=True)


def _require_memory() -> None:
    text = Path("/proc/meminfo").read_text(encoding="utf-8")
    free = next(int(line.split()[1]) for line in text.splitlines() if line.startswith("MemAvailable:")) << 10
    if free < LEAST_FREE:
        raise SystemExit(f"{free >> 20} MiB of memory are left: too little for another site")


def _print(result: Result) -> None:
    times = result.round_seconds
    print(f"{result.sites} sites, {result.rounds} rounds, {result.cores} cores, load {result.load} before")
    print(f"  round: median {statistics.median(times):.2f} s; each: {' '.join(f'{t:.2f}' for t in times)}")
    print(f"  peak memory {sum(result.peak_memory.values()):.0f} MB: {_listed(result.peak_memory)}")
    print(f"  processor to start {sum(result.processor_start.values()):.0f} s: {_listed(result.processor_start)}")
    if result.processor_idle:
        print(f"  processor in {result.idle_seconds:g} s idle: {_listed(result.processor_idle)}")
    print(f"  processor a round {sum(result.processor_a_round.values()):.2f} s: {_listed(result.processor_a_round)}")
    print(f"  requests a round {sum(result.requests_a_round.values()):.0f}:")
    for path, count in result.requests_a_round.items():
        print(f"    {count:8.1f}  {path}")


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())
