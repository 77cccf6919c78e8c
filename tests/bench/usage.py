"""What the processes of a deployment use: processor time by kind, and memory, from /proc."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# What a command line holds, and what such a process is called; the first that fits.
KINDS = {
    "server.superlink": "SuperLink",
    "server.executor": "executor of the server",
    "start-superlink": "commands of the server",
    "launch": "commands of the server",
    "client.supernode": "SuperNodes",
    "client.executor": "executors of the sites",
    "client.worker": "workers",
}
TICK = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Process:
    """A process: its kind, the seconds of processor it has used, and when it began (clock ticks since boot)."""

    kind: str
    seconds: float
    began: int


def kind_of(command: str) -> str | None:
    """What the process with this command line is in a deployment, None if it is not part of one."""
    words = command.split("\0")
    if any("from client.start import" in word for word in words):
        return "commands of the sites"
    return next((kind for word, kind in KINDS.items() if word in words), None)


def processes_of(folder: Path) -> dict[int, Process]:
    """The live processes of the deployment in `folder`, which all of their command lines name, by id."""
    found: dict[int, Process] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace")
            if str(folder) not in command:
                continue
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended
            continue
        kind = kind_of(command)
        if kind is not None:
            found[int(entry.name)] = Process(kind, (int(fields[11]) + int(fields[12])) * TICK, int(fields[19]))
    return found


def used(before: Mapping[int, Process], after: Mapping[int, Process]) -> dict[str, float]:
    """Seconds of processor between two looks, by kind, largest first; of processes alive at the second."""
    total: dict[str, float] = defaultdict(float)
    for pid, process in after.items():
        first = before.get(pid)
        total[process.kind] += process.seconds - (first.seconds if first and first.began == process.began else 0.0)
    return {kind: round(total[kind], 2) for kind in sorted(total, key=lambda kind: -total[kind])}


class PeakMemory:
    """Samples the proportional set size of a deployment: shared pages are counted once."""

    def __init__(self, folder: Path, every: float) -> None:
        self.peak: dict[str, float] = {}
        self._folder, self._every = folder, every
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @property
    def megabytes(self) -> float:
        """The largest total of all samples."""
        return sum(self.peak.values())

    def _watch(self) -> None:
        while not self._done.wait(self._every):
            sample: dict[str, float] = defaultdict(float)
            for pid, process in processes_of(self._folder).items():
                sample[process.kind] += _pss(pid) / 1e3
            if sum(sample.values()) > self.megabytes:
                self.peak = {kind: round(sample[kind]) for kind in sorted(sample, key=lambda kind: -sample[kind])}


def _pss(pid: int) -> int:
    """Kilobytes."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
