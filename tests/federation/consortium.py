"""A consortium of real processes and what its people do: enrol, launch, approve, look.

Each site is in a network namespace of its own where this machine allows it.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from client.approvals import Approvals
from client.site import load_site
from common.privacy.ledger import Ledger
from common.privacy.ledger_keys import load_key
from tests.federation.processes import (
    SITE,
    Network,
    Processes,
    children_of,
    cohortium,
    cohortium_site,
    free_port,
    lines,
    processes,
    wait_for,
)

SITES = ["anna", "berta", "clara", "dora"]
SCHEMA = {
    "fields": [
        {"name": "age", "type": "number", "constraints": {"required": True, "minimum": 0, "maximum": 100}},
        {"name": "sex", "type": "string", "constraints": {"required": True, "enum": ["f", "m"]}},
    ]
}
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
min_sites = 3
join_timeout = 90.0
round_timeout = {round_timeout}
[privacy]
delta = 1e-4
[release]
rows = 150
"""


class Consortium:
    """A running consortium and what its people do."""

    def __init__(self, folder: Path, running: Processes, network: Network | None) -> None:
        self.folder, self.running, self.network = folder, running, network
        self.home = folder / "consortium"
        host = network.address if network else "127.0.0.1"
        self.public, self.private = f"{host}:{free_port()}", f"127.0.0.1:{free_port()}"
        cohortium("init-consortium", self.home, "--name", "Test", "--address", host)

    def start_superlink(self) -> None:
        addresses = ("--public", self.public, "--private", self.private)
        self.running.coordinator("superlink", "start-superlink", "--consortium", self.home, *addresses)
        wait_for(lambda: "ready; the code" in self.log("superlink"), 90, lambda: self.log("superlink"))

    def start_site(self, name: str, **environment: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-c", SITE, "start", "--site", str(self.folder / name / "site.toml")]
        return self.running.start(name, command, **environment)

    def enrol(self, name: str) -> None:
        rows = "".join(f"{random.gauss(50, 10):.1f},{random.choice('fm')}\n" for _ in range(40))
        (self.folder / f"{name}.csv").write_text("age,sex\n" + rows)
        site = self.folder / name
        cohortium_site(
            *("init", site, "--site", name, "--data", self.folder / f"{name}.csv", "--superlink", self.public),
            *("--ca", self.home / "ca.pem"),
        )
        request = site / f"enrolment-{name}.json"
        cohortium("enrol", request, "--consortium", self.home, "--superlink", self.private)

    def study(self, name: str, rounds: int, round_timeout: float = 60.0) -> Path:
        (self.folder / "schema.json").write_text(json.dumps(SCHEMA))
        path = self.folder / f"{name}.toml"
        path.write_text(STUDY.format(name=name, rounds=rounds, round_timeout=round_timeout))
        return path

    def launch(self, name: str, rounds: int, round_timeout: float = 60.0, out: Path | None = None) -> Path:
        out, study = out or self.folder / f"out-{name}", self.study(name, rounds, round_timeout)
        self.running.coordinator(f"launch-{name}", "launch", study, "--consortium", self.home, "--out", out)
        return out

    def decide(self, site: str, verdict: Any = "approved") -> set[str]:
        """Decide everything that waits at a site; returns of which kinds it was."""
        config = load_site(self.folder / site / "site.toml")
        approvals, key = Approvals(config.site.state, site), load_key(config.site.state / "ledger.key")
        waiting = [r for r in approvals.requests() if approvals.standing(r.kind, r.digest, key) == "waiting"]
        for request in waiting:
            approvals.decide(request.kind, request.digest, verdict, by="steward", reason="test", key=key)
        return {request.kind for request in waiting}

    def approve_all(self, seconds: float = 90.0, sites: Sequence[str] = SITES) -> None:
        """First the bundle, then the study, at every one of `sites`."""
        open_at = set(sites)
        deadline = time.monotonic() + seconds
        while open_at:
            assert time.monotonic() < deadline, f"{open_at} were not asked: {self.log('superlink')[-3000:]}"
            open_at -= {site for site in open_at if "study" in self.decide(site)}
            time.sleep(0.2)

    def status(self, code: int = 0) -> dict[str, Any]:
        return json.loads(cohortium("status", "--consortium", self.home, "--json", code=code).stdout)

    def log_file(self, name: str) -> Path:
        return self.running.log(name)

    def log(self, name: str) -> str:
        return self.running.text(name)

    def rounds(self, out: Path) -> int:
        return len(lines(out / "rounds.jsonl"))

    def finished(self, out: Path, name: str, seconds: float) -> None:
        """The command that follows the study ends well."""
        process = self.running._running[name]
        wait_for(lambda: process.poll() is not None, seconds, lambda: self.log(name) + self.log("superlink")[-4000:])
        assert process.returncode == 0, self.log(name) + self.log("superlink")[-4000:]
        assert len((out / "cohort.csv").read_text().splitlines()) == 151
        cohortium("verify", out, "--key", self.home / "release.pub")

    def spends(self, site: str, digest: str) -> list[int]:
        with Ledger(self.folder / site / "state" / "ledger.sqlite") as ledger:
            ledger.verify()
            return [entry.round for entry in ledger.entries() if entry.study == digest]

    def child(self, module: str) -> int:
        return children_of(self.running._running["superlink"].pid)[module]


@contextmanager
def running_consortium(
    folder: Path,
    sites: Sequence[str] = SITES,
    prepare: Callable[[Consortium], None] | None = None,
    environments: Mapping[str, Mapping[str, str]] | None = None,
) -> Iterator[Consortium]:
    """A SuperLink with enrolled sites that have started, in `folder`; all of it ends with the context.

    `prepare` may change the consortium's folder before its SuperLink starts; `environments` are variables of single
    sites' own environment.
    """
    try:
        network = Network(list(sites))
    except OSError:
        network = None
    try:
        with processes(folder / "logs", network.prefix if network else None) as running:
            made = Consortium(folder, running, network)
            if prepare is not None:
                prepare(made)
            made.start_superlink()
            with ThreadPoolExecutor(2) as hands:
                list(hands.map(made.enrol, sites))
            for site in sites:
                made.start_site(site, **(environments or {}).get(site, {}))
            yield made
    finally:
        if network:
            network.close()


def digest_of(out: Path) -> str:
    statement = json.loads((out / "privacy.json").read_text())
    return statement["study_digest"]
