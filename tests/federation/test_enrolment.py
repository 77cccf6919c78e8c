"""Enrolment against a real SuperLink with TLS and node authentication, and real SuperNodes, all on loopback."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from server.nodes import Control, NodeInfo, list_nodes

pytestmark = [pytest.mark.federation, pytest.mark.deadlines]
PROGRAMS = Path(sys.executable).parent
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(PROGRAMS / program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def until(found: Callable[[], object], log: Path, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.2)


@contextmanager
def process(log: Path, program: str, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    command = [str(PROGRAMS / program), *map(str, arguments)]
    environment = os.environ | QUIET | {"FLWR_HOME": str(log.with_suffix(".home"))}
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as started:
        try:
            yield started
        finally:
            if started.poll() is None:
                started.send_signal(signal.SIGTERM)
            try:
                started.wait(15)
            except subprocess.TimeoutExpired:
                started.kill()


class Consortium:
    """A SuperLink and the folders of its sites."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack, self.port = folder, stack, free_port()
        self.con = folder / "con"
        made = run("cohortium", "init-consortium", self.con, "--name", "Trial", "--address", "localhost")
        assert made.returncode == 0, made.stderr
        self.address = f"127.0.0.1:{self.port}"
        log = folder / "superlink.log"
        options = ["--ssl-certfile", self.con / "server.pem", "--ssl-keyfile", self.con / "server.key"]
        options += ["--ssl-ca-certfile", self.con / "ca.pem", "--enable-supernode-auth", "--database", folder / "sl.db"]
        options += ["--host", "127.0.0.1", "--port", self.port, "--isolation", "process"]
        stack.enter_context(process(log, "flower-superlink", *options, "--disable-runtime-dependency-installation"))
        until(self.listening, log)

    def listening(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def site(self, name: str) -> Path:
        made = run(
            *("cohortium-site", "init", self.folder / name, "--site", name, "--data", self.folder / "p.csv"),
            *("--superlink", self.address, "--ca", self.con / "ca.pem"),
        )
        assert made.returncode == 0, made.stderr
        return self.folder / name

    def command(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return run("cohortium", *arguments, "--consortium", self.con, "--superlink", self.address, "--json")

    def supernode(self, site: Path, ca: Path | None = None) -> tuple[subprocess.Popen[bytes], Path]:
        log = self.folder / f"{site.name}-{time.monotonic_ns()}.log"
        options = ["--superlink", self.address, "--root-certificates", ca or site / "ca.pem"]
        options += ["--auth-supernode-private-key", site / "keys" / "node.key", "--isolation", "process"]
        options += ["--host", "127.0.0.1", "--port", free_port(), "--max-retries", 1]
        return self.stack.enter_context(process(log, "flower-supernode", *options)), log

    def nodes(self) -> dict[str, list[str]]:
        """Status of every node by name."""
        found: dict[str, list[str]] = {}
        for node in self.listed():
            found.setdefault(node.name, []).append(node.status)
        return {name: sorted(states) for name, states in found.items()}

    def listed(self) -> list[NodeInfo]:
        return list_nodes(Control(self.address, self.con / "ca.pem"))


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Consortium]:
    with ExitStack() as stack:
        yield Consortium(tmp_path_factory.mktemp("consortium"), stack)


def test_an_enrolled_site_connects_until_it_is_revoked(consortium: Consortium) -> None:
    north = consortium.site("north")
    enrolled = consortium.command("enrol", north / "enrolment-north.json")
    assert enrolled.returncode == 0, enrolled.stderr
    node, log = consortium.supernode(north)
    until(lambda: consortium.nodes().get("north") == ["online"], log)
    (listed,) = [found for found in consortium.listed() if found.name == "north"]
    assert listed.node_id == json.loads(enrolled.stdout)["node_id"]
    assert listed.node_key == (north / "keys" / "node.key.pub").read_text().strip()

    assert consortium.command("revoke", "north").returncode == 0
    until(lambda: node.poll() is not None, log, 30)
    assert consortium.nodes()["north"] == ["unregistered"]
    again, log = consortium.supernode(north)
    until(lambda: again.poll() is not None, log)
    assert again.returncode != 0

    refused = consortium.command("enrol", north / "enrolment-north.json", "--replace")
    assert refused.returncode == 11 and "was revoked at" in refused.stderr


def test_a_rotated_node_key_takes_the_place_of_the_old_one(consortium: Consortium) -> None:
    south = consortium.site("south")
    assert consortium.command("enrol", south / "enrolment-south.json").returncode == 0
    assert run("cohortium-site", "rotate-node-key", south).returncode == 0
    unasked = consortium.command("enrol", south / "enrolment-south.json")
    assert unasked.returncode == 2 and "another node key" in unasked.stderr
    time.sleep(1.1)  # requests are dated to the second, and a newer one is needed
    assert run("cohortium-site", "rotate-node-key", south).returncode == 0
    replaced = consortium.command("enrol", south / "enrolment-south.json", "--replace")
    assert replaced.returncode == 0, replaced.stderr
    _, log = consortium.supernode(south)
    until(lambda: consortium.nodes().get("south") == ["online", "unregistered"], log)


def test_who_is_not_enrolled_or_trusts_another_ca_does_not_connect(consortium: Consortium) -> None:
    stranger, west = consortium.site("stranger"), consortium.site("west")
    assert consortium.command("enrol", west / "enrolment-west.json").returncode == 0
    other = consortium.folder / "other"
    assert run("cohortium", "init-consortium", other, "--name", "O", "--address", "localhost").returncode == 0
    for site, ca in ((stranger, None), (west, other / "ca.pem")):
        node, log = consortium.supernode(site, ca)
        until(lambda node=node: node.poll() is not None, log)
        assert node.returncode != 0
    assert consortium.nodes()["west"] == ["registered"] and "stranger" not in consortium.nodes()


def test_what_stops_the_commands(consortium: Consortium, tmp_path: Path) -> None:
    east = consortium.site("east")
    request = east / "enrolment-east.json"
    closed = run(
        "cohortium", "enrol", request, "--consortium", consortium.con, "--superlink", f"localhost:{free_port()}"
    )
    assert closed.returncode == 8 and "flwr supernode register" in closed.stderr
    other = tmp_path / "other"
    assert run("cohortium", "init-consortium", other, "--name", "O", "--address", "localhost").returncode == 0
    foreign = run("cohortium", "enrol", request, "--consortium", other, "--superlink", consortium.address)
    assert foreign.returncode == 8 and "ca.pem is its CA" in foreign.stderr
    assert not (other / "sites.json").exists() and "east" not in consortium.nodes()
    for done in (closed, foreign):
        assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
