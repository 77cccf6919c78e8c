"""A consortium of real processes: SuperLink with TLS and node authentication, four SuperNodes, commands, and losses.

Each site is in a network namespace of its own where this machine allows it. One deployment serves all tests, in order.
"""

import json
import os
import random
import signal
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from client.approvals import Approvals
from client.site import load_site
from common.audit import read_audit
from common.privacy.ledger import Ledger
from common.privacy.ledger_keys import load_key
from tests.federation.processes import (
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

pytestmark = pytest.mark.federation

SITES = ["anna", "berta", "clara", "dora"]
START_SITE = """
import sys
from pathlib import Path
from client.start import Options, start
folder = Path(sys.argv[1])
start(Options(folder / "site.toml", folder / "connection.toml"))
"""
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
round_timeout = 60.0
[privacy]
delta = 1e-4
[release]
rows = 150
"""
SECOND_ROUNDS = 20  # so many that they outlast the start of a command


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

    def start_site(self, name: str) -> None:
        self.running.start(name, [sys.executable, "-P", "-c", START_SITE, str(self.folder / name)])

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

    def study(self, name: str, rounds: int) -> Path:
        (self.folder / "schema.json").write_text(json.dumps(SCHEMA))
        path = self.folder / f"{name}.toml"
        path.write_text(STUDY.format(name=name, rounds=rounds))
        return path

    def launch(self, name: str, rounds: int) -> Path:
        out, study = self.folder / f"out-{name}", self.study(name, rounds)
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

    def approve_all(self, seconds: float = 90.0) -> None:
        """First the bundle, then the study, at every site."""
        open_at = set(SITES)
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


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    folder = tmp_path_factory.mktemp("deployment")
    try:
        network = Network(SITES)
    except OSError:
        network = None
    try:
        with processes(folder / "logs", network.prefix if network else None) as running:
            made = Consortium(folder, running, network)
            made.start_superlink()
            with ThreadPoolExecutor(2) as hands:
                list(hands.map(made.enrol, SITES))
            for site in SITES:
                made.start_site(site)
            yield made
    finally:
        if network:
            network.close()


def digest_of(out: Path) -> str:
    statement = json.loads((out / "privacy.json").read_text())
    return statement["study_digest"]


def test_a_study_survives_a_superlink_that_is_killed_in_a_round(consortium: Consortium) -> None:
    out = consortium.launch("first", 4)
    wait_for(lambda: (out / "waiting.json").exists(), 60, lambda: consortium.log("launch-first"))
    wait_for(lambda: "awaiting-approval" in (out / "waiting.json").read_text(), 60, "nobody waits")
    consortium.approve_all()
    wait_for(lambda: consortium.rounds(out) >= 1, 90, lambda: consortium.log("superlink")[-4000:])
    os.kill(consortium.child("server.superlink"), signal.SIGKILL)
    consortium.finished(out, "launch-first", 120)
    assert "awaiting-approval" in consortium.log("launch-first")
    assert consortium.rounds(out) == 4
    # A SuperLink that dies while it takes a reply may lose it: then the round names the site, which has paid once.
    answered = {site: [r["round"] for r in lines(out / "rounds.jsonl") if site in r["answered"]] for site in SITES}
    for site in SITES:
        spent = consortium.spends(site, digest_of(out))
        assert spent == sorted(set(spent)) and set(answered[site]) <= set(spent) <= {1, 2, 3, 4}
    missing = [r["dropped"] for r in lines(out / "rounds.jsonl") if len(r["answered"]) < len(SITES)]
    assert sum(map(len, answered.values())) >= 4 * len(SITES) - 1 and all(missing), missing


def test_a_release_claims_what_the_ledgers_hold(consortium: Consortium) -> None:
    out = consortium.folder / "out-first"
    statement = json.loads((out / "privacy.json").read_text())
    for site in SITES:
        entry = next(e for e in statement["entries"] if e["site"] == site)
        # Every round it was asked for counts, since its reply may have left and been lost.
        assert entry["exposure"]["rounds"] == 4 >= len(consortium.spends(site, digest_of(out)))
    payload = json.loads((out / "manifest.dsse.json").read_text())
    assert payload["signatures"] and not (out / "metrics.json").exists()


def test_a_command_and_then_an_executor_that_are_killed(consortium: Consortium) -> None:
    rounds = SECOND_ROUNDS
    out = consortium.launch("second", rounds)
    consortium.approve_all()
    wait_for(lambda: consortium.rounds(out) >= 1, 90, lambda: consortium.log("superlink")[-4000:])
    consortium.running.end("launch-second", signal.SIGKILL)
    run = json.loads((out / "launch.json").read_text())["run"]
    following = consortium.running.coordinator("follow-second", "resume", out, "--consortium", consortium.home)
    wait_for(lambda: "following run" in consortium.log("follow-second"), 60, "nobody follows")
    os.kill(consortium.child("server.executor"), signal.SIGKILL)
    wait_for(lambda: following.poll() is not None, 90, lambda: consortium.log("superlink")[-4000:])
    assert following.returncode == 8, consortium.log("follow-second")
    assert "ended early" in consortium.log("follow-second") and "cohortium resume" in consortium.log("follow-second")
    assert json.loads((out / "launch.json").read_text())["run"] == run  # followed, not started again
    before = consortium.rounds(out)
    consortium.running.coordinator("resume-second", "resume", out, "--consortium", consortium.home)
    consortium.finished(out, "resume-second", 300)
    assert before < rounds == consortium.rounds(out)
    for site in SITES:
        assert consortium.spends(site, digest_of(out)) == list(range(1, rounds + 1))


def test_a_machine_that_loses_power_goes_on_where_it_was(consortium: Consortium) -> None:
    out = consortium.launch("third", 3)
    consortium.approve_all()
    wait_for(lambda: consortium.rounds(out) >= 1, 90, lambda: consortium.log("superlink")[-4000:])
    time.sleep(1.0)  # the next round is on its way
    children = children_of(consortium.running._running["superlink"].pid)
    consortium.running.end("launch-third", signal.SIGKILL)
    consortium.running.end("superlink", signal.SIGKILL)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children.values()), 20, "children went on")
    consortium.log_file("superlink").unlink()
    consortium.start_superlink()
    consortium.running.coordinator("resume-third", "resume", out, "--consortium", consortium.home)
    consortium.finished(out, "resume-third", 120)
    for site in SITES:
        assert consortium.spends(site, digest_of(out)) == [1, 2, 3]


def test_status_names_everybody(consortium: Consortium) -> None:
    found = consortium.status()
    assert found["superlink"]["up"] and set(found["sites"]) == set(SITES)
    assert {site["status"] for site in found["sites"].values()} == {"online"}
    assert (found["study"]["name"], found["study"]["status"], found["study"]["round"]) == ("third", "completed", 3)


def test_the_audit_log_tells_the_story(consortium: Consortium) -> None:
    actions = [entry["action"] for entry in read_audit(consortium.home / "audit.jsonl")]
    assert actions.count("launch") == 3 and actions.count("resume") == 2 and actions.count("release") == 3
    assert actions.count("round") == 4 + SECOND_ROUNDS + 3
    cohortium("audit-log", "verify", "--consortium", consortium.home)


@pytest.mark.parametrize(
    "target",
    [
        "/v1/control/list-nodes",
        "/v1/runtime/acquire-task",
        "/v1/fleet/../control/list-nodes",
        "/v1/fleet/%2e%2e/control/list-nodes",
        "/v1/fleet%2f..%2fcontrol/list-nodes",
        "//v1/control/list-nodes",
        "/health",
        "/docs",
        "/openapi.json",
    ],
)
def test_sites_reach_nothing_but_the_fleet_api(consortium: Consortium, target: str) -> None:
    assert ask(consortium, target) == 404


def test_a_node_without_a_key_is_refused(consortium: Consortium) -> None:
    assert ask(consortium, "/v1/fleet/pull-messages") == 401


def test_secrets_are_private(consortium: Consortium) -> None:
    for path in [*consortium.home.rglob("*.key"), consortium.home / "state" / "executor.secret"]:
        assert path.stat().st_mode & 0o077 == 0, path
    assert (consortium.home / "state").stat().st_mode & 0o077 == 0


def test_no_site_has_an_open_port(consortium: Consortium) -> None:
    if consortium.network is None:
        pytest.skip("this machine does not allow network namespaces (`ip netns add` failed); sites ran on loopback")
    for site in SITES:
        sockets = consortium.network.sockets(site)
        listening = [local for state, local, _ in sockets if state == "0A"]
        assert listening and all(local.startswith("127.0.0.1:") for local in listening), listening
        remote = {far for state, _, far in sockets if state == "01" and not far.startswith("127.0.0.1:")}
        assert remote <= {consortium.public}, remote


def test_a_second_superlink_is_refused(consortium: Consortium) -> None:
    addresses = ("--public", f"127.0.0.1:{free_port()}", "--private", f"127.0.0.1:{free_port()}")
    done = cohortium("start-superlink", "--consortium", consortium.home, *addresses, code=8)
    assert "runs already" in done.stderr


def test_a_superlink_ends_on_sigterm_with_all_it_started(consortium: Consortium) -> None:
    children = children_of(consortium.running._running["superlink"].pid)
    assert set(children) == {"server.superlink", "server.executor"}
    assert consortium.running.end("superlink") == 0
    assert not [pid for pid in children.values() if Path(f"/proc/{pid}").exists()]
    assert consortium.status(code=8)["superlink"]["up"] is False
    done = cohortium(
        "launch",
        consortium.study("late", 2),
        "--consortium",
        consortium.home,
        "--out",
        consortium.folder / "late",
        code=8,
    )
    assert "start-superlink" in done.stderr and not (consortium.folder / "late").exists()


def ask(consortium: Consortium, target: str) -> int:
    """The status with which the public port answers a POST for exactly this target."""
    host, port = consortium.public.rsplit(":", 1)
    context = ssl.create_default_context(cafile=str(consortium.home / "ca.pem"))
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=host) as secure,
    ):
        kind = "Content-Type: application/protobuf\r\nContent-Length: 0"
        secure.sendall(f"POST {target} HTTP/1.1\r\nHost: {host}\r\n{kind}\r\n\r\n".encode())
        return int(secure.recv(64).split()[1])
