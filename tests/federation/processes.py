"""Real processes for the tests of a deployment: SuperLink, sites, commands; started, watched, killed, always ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COORDINATOR = "from server.cli import main; main()"
SITE = "from client.cli import main; main()"
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONSAFEPATH": "1",
    "NO_COLOR": "1",
}


class Processes:
    """Processes by name, each in a group of its own with its output in FOLDER/NAME.log."""

    def __init__(self, folder: Path, prefix: Mapping[str, list[str]] | None = None) -> None:
        self.folder = folder
        self._prefix = prefix or {}  # what a process's command line begins with, `ip netns exec NAME` for example
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, command: list[str], **environment: str) -> subprocess.Popen[bytes]:
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                [*self._prefix.get(name, []), *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | ENVIRONMENT | environment,
                cwd=self.folder,
                start_new_session=True,
            )
        self._running[name] = process
        return process

    def coordinator(self, name: str, *arguments: object) -> subprocess.Popen[bytes]:
        return self.start(name, [sys.executable, "-c", COORDINATOR, *map(str, arguments)])

    def site(self, name: str, *arguments: object) -> subprocess.Popen[bytes]:
        return self.start(name, [sys.executable, "-c", SITE, *map(str, arguments)])

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def text(self, name: str) -> str:
        return self.log(name).read_text(errors="replace") if self.log(name).exists() else ""

    def end(self, name: str, sign: signal.Signals = signal.SIGTERM, patience: float = 15.0) -> int:
        process = self._running.pop(name)
        if process.poll() is None:
            process.send_signal(sign)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return process.returncode

    def end_all(self) -> None:
        for process in self._running.values():
            if process.poll() is None:
                process.terminate()
        for name in list(self._running):
            self.end(name)


@contextmanager
def processes(folder: Path, prefix: Mapping[str, list[str]] | None = None) -> Iterator[Processes]:
    """Processes that are gone afterwards, whatever happens."""
    running = Processes(folder, prefix)
    try:
        yield running
    finally:
        running.end_all()


def run(program: str, *arguments: object, code: int = 0, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
    """A command to its end; fails unless it exits with `code`."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | ENVIRONMENT,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def cohortium(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    return run(COORDINATOR, *arguments, code=code)


def cohortium_site(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    return run(SITE, *arguments, code=code)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(condition: Callable[[], Any], seconds: float, what: Callable[[], str] | str) -> Any:
    """The first true value of `condition`; fails with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds:g} s: {what if isinstance(what, str) else what()}")


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole JSON lines of a file that may be growing."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def children_of(pid: int) -> dict[str, int]:
    """The live children of a process: module that `python -m` runs, and pid."""
    found: dict[str, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == pid and fields[0] != "Z":
                command = (stat.parent / "cmdline").read_bytes().decode().split("\0")
                found[command[command.index("-m") + 1]] = int(stat.parent.name)
        except (OSError, ValueError, IndexError):
            continue
    return found


class Network:
    """A network namespace a site with a point-to-point link to this machine, and nothing between the sites.

    `prefix` begins the command line of a process in the namespace of a site. `OSError` where namespaces cannot be had.
    """

    def __init__(self, sites: list[str]) -> None:
        octet = os.getpid() % 200 + 20
        self.address = f"10.{octet}.255.1"
        self.names = {site: f"coh{os.getpid()}-{number}" for number, site in enumerate(sites)}
        self._links = {site: f"c{os.getpid()}x{number}"[-15:] for number, site in enumerate(sites)}
        try:
            self._ip("addr", "add", f"{self.address}/32", "dev", "lo")
            for number, site in enumerate(sites):
                name, link, inner = self.names[site], self._links[site], f"10.{octet}.{number}."
                self._ip("netns", "add", name)
                self._ip("link", "add", link, "type", "veth", "peer", "name", "uplink", "netns", name)
                self._ip("addr", "add", f"{inner}1/30", "dev", link)
                self._ip("link", "set", link, "up")
                for arguments in (
                    ("addr", "add", f"{inner}2/30", "dev", "uplink"),
                    ("link", "set", "uplink", "up"),
                    ("link", "set", "lo", "up"),
                    ("route", "add", "default", "via", f"{inner}1"),
                ):
                    self._ip("-n", name, *arguments)
        except OSError:
            self.close()
            raise
        self.prefix = {site: ["ip", "netns", "exec", name] for site, name in self.names.items()}

    def sockets(self, site: str) -> list[tuple[str, str, str]]:
        """State (hexadecimal; 0A: listens, 01: connected), local and remote address of every TCP socket at a site."""
        found = []
        for family in ("tcp", "tcp6"):
            text = subprocess.run(
                [*self.prefix[site], "cat", f"/proc/net/{family}"], capture_output=True, text=True, check=False
            ).stdout
            rows = [line.split() for line in text.splitlines()[1:]]
            found += [(row[3], _plain(row[1]), _plain(row[2])) for row in rows]
        return found

    def cut(self, site: str, *, off: bool) -> None:
        """Take the site's link down, or up again."""
        self._ip("link", "set", self._links[site], "down" if off else "up")

    def close(self) -> None:
        """Remove everything; a link goes with its namespace."""
        for name in self.names.values():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        for link in self._links.values():
            subprocess.run(["ip", "link", "del", link], capture_output=True, check=False)
        subprocess.run(["ip", "addr", "del", f"{self.address}/32", "dev", "lo"], capture_output=True, check=False)

    def _ip(self, *arguments: str) -> None:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _plain(address: str) -> str:
    """HOST:PORT of /proc/net/tcp; IPv6 only as far as loopback and mapped IPv4 addresses need it."""
    host, port = address.split(":")
    if len(host) == 32 and host[:24] not in ("0" * 16 + "FFFF0000", "0" * 24):
        return f"[{host}]:{int(port, 16)}"
    octets = bytes.fromhex(host[-8:])[::-1]
    text = ".".join(map(str, octets))
    return f"{'127.0.0.1' if len(host) == 32 and text == '1.0.0.0' else text}:{int(port, 16)}"
