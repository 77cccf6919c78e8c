"""A small study with four sites, and `cohortium simulate` on it as a coordinator starts it."""

import datetime
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common.schema import Schema, load_schema
from tests.signals import interruptible

COHORTIUM = Path(sys.executable).with_name("cohortium")
SECRET = "Zq7731"  # stands for a patient's value: it must not appear anywhere but in the hospital's own file
PATIENCE = 400  # seconds until a hanging run is given up
STAGES, OUTCOMES = ("I", "II", "III"), ("alive", "dead")
BOUND, RADIUS, LOGIT_SCALE = 12.0, 0.5, 5.0
SCHEMA = {
    "cohortium:target": "outcome",
    "missingValues": ["", "NA"],
    "fields": [
        {"name": "age", "type": "number", "constraints": {"minimum": 18, "maximum": 100, "required": True}},
        {
            "name": "lab",
            "type": "number",
            "cohortium:scale": "log",
            "constraints": {"minimum": 0, "maximum": 500},
        },
        {"name": "visits", "type": "integer", "constraints": {"minimum": 0, "maximum": 20}},
        {"name": "stage", "type": "string", "constraints": {"enum": list(STAGES)}},
        {"name": "smoker", "type": "boolean"},
        {
            "name": "admitted",
            "type": "date",
            "constraints": {"minimum": "2020-01-01", "maximum": "2022-12-31", "required": True},
        },
        {"name": "outcome", "type": "string", "constraints": {"enum": list(OUTCOMES), "required": True}},
    ],
}


def patients(seed: int, rows: int, **constant: str) -> str:
    """A CSV of mixed columns that depend on one hidden severity, some cells missing; `constant` overrides a column."""
    random = np.random.default_rng(seed)
    lines = [",".join(f["name"] for f in SCHEMA["fields"])]
    for _ in range(rows):
        severity = random.normal()
        day = datetime.date(2020, 1, 1) + datetime.timedelta(days=int(random.integers(0, 1096)))
        row = {
            "age": f"{np.clip(60 + 12 * severity + random.normal(0, 4), 18, 100):.1f}",
            "lab": "NA" if random.random() < 0.1 else f"{min(500.0, 8 * math.exp(0.8 * severity)):.3f}",
            "visits": "" if random.random() < 0.05 else str(min(20, random.poisson(math.exp(0.5 * severity + 1)))),
            "stage": "" if random.random() < 0.05 else STAGES[int(np.digitize(severity, (-0.5, 0.8)))],
            "smoker": "" if random.random() < 0.08 else str(bool(random.random() < 1 / (1 + math.exp(-severity)))),
            "admitted": day.isoformat(),
            "outcome": OUTCOMES[int(random.random() < 1 / (1 + math.exp(1 - 2 * severity)))],
        } | constant
        lines.append(",".join(row.values()))
    return "\n".join(lines) + "\n"


SITES = {
    "north": patients(1, 300),
    "east": patients(2, 220, lab=""),  # a column without a value in any row
    "south": patients(3, 250, outcome="alive"),  # a single outcome class
    "tiny": patients(4, 30),
}
ROWS = {name: len(text.splitlines()) - 1 for name, text in SITES.items()}


@dataclass(frozen=True)
class Inputs:
    """What a coordinator has on disk before a run."""

    folder: Path

    @classmethod
    def lay_out(cls, folder: Path, rounds: int, min_sites: int, declared: dict[str, int] | None = None) -> "Inputs":
        (folder / "sites").mkdir()
        for name, text in SITES.items():
            (folder / "sites" / f"{name}.csv").write_text(text)
        (folder / "test.csv").write_text(patients(5, 200))
        (folder / "schema.json").write_text(json.dumps(SCHEMA))
        study = f"""[study]
name = "severity"
schema = "schema.json"
seed = 7
[model]
latent_dim = 4
hidden = [16, 16]
decoder_lipschitz = {BOUND}
logit_scale = {LOGIT_SCALE}
[training]
rounds = {rounds}
local_epochs = 1
batch_size = 64
learning_rate = 0.01
update_norm = {RADIUS}
min_sites = {min_sites}
[release]
rows = 700
"""
        if declared:
            study += "[sites]\n" + "".join(f"{name} = {number}\n" for name, number in declared.items())
        (folder / "study.toml").write_text(study)
        return cls(folder)

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def schema(self) -> Schema:
        return load_schema(self.folder / "schema.json")

    def start(self, *options: str) -> "subprocess.Popen[str]":
        command = [str(COHORTIUM), "simulate", str(self.folder / "study.toml")]
        command += ["--sites", str(self.folder / "sites"), "--out", str(self.out), *options]
        # A process group of its own, as a shell gives every job: Ctrl-C reaches this group and no other.
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=self.folder,
            preexec_fn=interruptible,
        )


@dataclass(frozen=True)
class Finished:
    """A run that has ended."""

    inputs: Inputs
    code: int
    stdout: str
    stderr: str
    left_running: list[str] = field(default_factory=list)

    def json(self, name: str) -> Any:
        return json.loads((self.inputs.out / name).read_text())

    @property
    def rounds(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.inputs.out / "rounds.jsonl").read_text().splitlines()]

    @property
    def explanation(self) -> str:
        log = self.inputs.out / "runtime.log"
        return f"exit {self.code}\n{self.stderr}\n{log.read_text()[-4000:] if log.exists() else 'no runtime.log'}"


def processes_of(out: Path) -> list[str]:
    """Command lines of all living processes that inherited the environment of the run into `out`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(out).encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
        except OSError:
            continue  # it ended meanwhile, or is another user's
    return found


def finish(inputs: Inputs, process: "subprocess.Popen[str]") -> Finished:
    try:
        stdout, stderr = process.communicate(timeout=PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    # The kernel may take a moment to remove what was killed.
    deadline = time.monotonic() + 10
    while processes_of(inputs.out) and time.monotonic() < deadline:
        time.sleep(0.1)
    return Finished(inputs, process.returncode, stdout, stderr, processes_of(inputs.out))


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, "the run ended before what the test waits for"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def read_all(folder: Path) -> Iterator[tuple[Path, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path, path.read_bytes()
