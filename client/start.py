"""`cohortium-site start`: flower-supernode, executor and worker under one process in the foreground.

It holds the lock on the site's state, looks before it lets the SuperNode connect, starts again what ends, says in one
sentence what is wrong, and ends everything on SIGTERM. One connection leaves the machine: the SuperNode's.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import IO, Any

from client.children import Child, Log, LogFormat
from client.connection import ConnectionSection, load_connection
from client.preflight import UnreachableError, check_files, check_superlink
from client.site import SiteConfig, load_site
from client.supernode import read_contact
from client.trouble import Trouble
from client.worker import KEPT_OUT, TIME_LIMIT
from common.errors import CohortiumError, ExitCode, FederationError, OutputError, SiteError
from common.files import write_atomic
from common.health import HealthServer
from common.keys import create_private
from common.privacy.ledger_keys import load_key

LOOPBACK = "127.0.0.1"
SERVICES = ("supernode", "executor", "worker", "superlink")  # of the health protocol
TICK = 0.25
CONTACT_LASTS = 75.0  # seconds without an answer of the SuperLink until it counts as not reached
SILENT_FOR = 150.0  # then the SuperNode is started anew: Flower's may outlive its own connection and never notice
REFUSED_FOR = 75.0  # a SuperNode that was killed counts as online for a minute
LONGEST_WAIT = 60.0


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    site: Path
    connection: Path
    log_format: LogFormat = "text"
    health: str = f"{LOOPBACK}:0"
    time_limit: float = TIME_LIMIT
    give_up: float | None = None


class Run:
    """The files of a running site, in state/run."""

    def __init__(self, state: Path) -> None:
        self.folder = state / "run"
        self.lock = self.folder / "lock"
        self.facts = self.folder / "start.json"
        self.contact = self.folder / "contact.json"
        self.secret = self.folder / "superexec.secret"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock; `SiteError` if another start does."""
        with self._open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                facts = self.read_facts()
                raise SiteError(
                    f"{self.folder.parent}: this site is running already (process {facts.get('pid', 'unknown')})",
                    fix="stop it first; `cohortium-site status` shows it. Two on one state would spend twice",
                ) from None
            yield

    @property
    def running(self) -> bool:
        """Whether a start holds the lock."""
        try:
            with self.lock.open("r") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    def read_facts(self) -> dict[str, Any]:
        """Process, time of start and health address of the running start."""
        try:
            facts = json.loads(self.facts.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return facts if isinstance(facts, dict) else {}

    def new_secret(self) -> None:
        """A new secret between SuperNode and executor; raw bytes, mode 0600 from the first."""
        self.secret.unlink(missing_ok=True)
        create_private(self.secret, secrets.token_hex(32).encode())

    def _open(self) -> IO[str]:
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return self.lock.open("a")
        except OSError as error:
            raise OutputError(
                f"{self.folder}: cannot be made ({error.strerror})", fix="free disk space or correct the permissions"
            ) from None


class Supervisor:
    """The children of one start and what is known about them."""

    def __init__(self, options: Options, config: SiteConfig, connection: ConnectionSection, run: Run, log: Log) -> None:
        self.options, self.connection, self.run, self.log = options, connection, run, log
        self.stopping = threading.Event()
        self._worker_ready = False
        self._executor_reached = False
        self._owes_an_answer = False
        self._refused = False
        self._refused_since: float | None = None
        self._was_connected = False
        self.trouble = Trouble(config.site.state)
        self._trouble_since: float | None = None
        self._next_look, self._wait, self._said = 0.0, 1.0, ""
        address = f"{LOOPBACK}:{_free_port()}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith(KEPT_OUT)}
        environment |= {
            "FLWR_HOME": str(config.site.state / "flower"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PYTHONUNBUFFERED": "1",
        }
        python = [sys.executable, "-P", "-m"]
        supernode = [*python, "client.supernode", "--contact", str(run.contact), *_flags(connection, address, run)]
        executor = [*python, "client.executor", "--runtime", address, "--secret-file", str(run.secret)]
        executor += ["--site", str(options.site.resolve()), "--time-limit", str(options.time_limit)]
        self.supernode = Child("supernode", supernode, environment, log, self._hear_supernode)
        self.executor = Child("executor", executor, environment, log, self._hear_executor)

    def step(self) -> None:
        """Look after both children once; `CohortiumError` if going on makes no sense."""
        now = time.monotonic()
        if self.executor.ended() is not None:
            self._worker_ready = self._executor_reached = False
            if self._owes_an_answer:  # nobody can give it any more; a new SuperNode makes the SuperLink say so at once
                self._owes_an_answer = False
                self.supernode.stop(5.0)
        if self.executor.process is None and now >= self.executor.not_before:
            self.executor.start()
        if self.supernode.ended() is not None:
            self._why_it_ended()
        if self.supernode.process is None and now >= max(self.supernode.not_before, self._next_look):
            self._look_and_start()
        if self.supernode.running and self._silent_for() > SILENT_FOR:
            self.log(
                "start", "silent", message="no answer of the SuperLink for too long; the SuperNode is started anew"
            )
            self.supernode.stop(5.0)
        if self.supernode.running and self.connected:
            self._refused, self._refused_since, self._trouble_since = False, None, None
            self._wait, self._said = 1.0, ""
            self._was_connected = True
            self.trouble.clear()

    @property
    def connected(self) -> bool:
        """Whether the SuperLink has answered this SuperNode lately."""
        last = read_contact(self.run.contact).get("time", 0.0)
        return last > self.supernode.since and time.time() - last < CONTACT_LASTS

    def _silent_for(self) -> float:
        """Seconds since the SuperLink last answered this SuperNode, or since its start."""
        last = self.run.contact.stat().st_mtime if self.run.contact.exists() else 0.0
        return time.time() - max(last, self.supernode.since)

    def well(self) -> dict[str, bool]:
        """Each service of the health protocol; "superlink" is well if it has answered lately."""
        return {
            "supernode": self.supernode.running,
            "executor": self.executor.running and self._executor_reached,
            "worker": self.executor.running and self._worker_ready,
            "superlink": self.supernode.running and self.connected,
        }

    def stop(self) -> None:
        """End both, the executor first: it answers the message it has."""
        busy = self._executor_reached
        self.executor.stop(10.0)
        if busy:
            time.sleep(1.0)  # for the SuperNode to send that answer on
        self.supernode.stop(10.0)

    def _look_and_start(self) -> None:
        try:
            check_files(self.connection)
            check_superlink(self.connection, self.options.connection)
        except (UnreachableError, SiteError) as error:
            # At first somebody looks on, and hears at once what to mend. Later it may mend itself: a clock that is set,
            # a certificate that the coordinator renews.
            if not self._was_connected and not isinstance(error, UnreachableError):
                raise
            self._later(error)
            return
        self.supernode.start()

    def _later(self, error: CohortiumError) -> None:
        """Say it once, wait longer each time, give up if that was asked for."""
        now = time.monotonic()
        self._trouble_since = self._trouble_since or now
        if self.options.give_up is not None and now - self._trouble_since >= self.options.give_up:
            raise error
        self._say(error)
        self._next_look = now + self._wait
        self._wait = min(LONGEST_WAIT, 2 * self._wait)

    def _say(self, error: CohortiumError) -> None:
        if error.message != self._said:
            self.log("start", "waiting", message=str(error).replace("\n", " "))
            self.trouble.note(error)
            self._said = error.message

    def _why_it_ended(self) -> None:
        """In one sentence, from what Flower wrote; an error only where another start would change nothing.

        What is wrong with a certificate or a clock is found before the next start.
        """
        text = "\n".join(self.supernode.last)
        now = time.monotonic()
        if "code: 2004" in text:
            self._refused_since = self._refused_since or now
            error = FederationError(
                "the SuperLink does not accept this site's key: it is not enrolled, or was revoked",
                fix="send the coordinator the enrolment request, or ask whether the key was revoked; a revoked key"
                " never comes back: `cohortium-site rotate-node-key` makes a new one",
            )
            known = bool(read_contact(self.run.contact)) and not self._refused  # then it may only count as online still
            if not known or now - self._refused_since >= REFUSED_FOR:
                raise error
            self.log("start", "waiting", message=error.message + "; or the one before still counts as online")
        elif "Server error '5" in text:
            self._say(
                UnreachableError(
                    f"the SuperLink {self.connection.superlink} answers that something is wrong in it",
                    fix="tell the coordinator, whose log says what, a full disk for instance; this site tries again",
                )
            )

    def _hear_supernode(self, fields: dict[str, Any] | None, _text: str) -> None:
        self._refused = self._refused or (fields is not None and fields["event"] == "key-refused")

    def _hear_executor(self, fields: dict[str, Any] | None, _text: str) -> None:
        event = fields and fields["event"]
        if event in ("worker-ready", "worker-started", "worker-lost"):
            self._worker_ready = event == "worker-ready"
        elif event in ("supernode-reached", "supernode-unreachable"):
            self._executor_reached = event == "supernode-reached"
        elif event in ("received", "answered", "task-lost", "task-failed"):
            self._owes_an_answer = event == "received"


def start(options: Options) -> None:
    """Run until SIGTERM or SIGINT, or until a `CohortiumError` says why it cannot go on."""
    config, connection = load_site(options.site), load_connection(options.connection)
    load_key(config.site.state / "ledger.key")  # without it no decision could be read and nothing be spent
    check_files(connection)
    log, run = Log(options.log_format), Run(config.site.state)
    with run.held():
        run.new_secret()
        supervisor = Supervisor(options, config, connection, run, log)
        health = HealthServer(options.health, SERVICES)
        facts = {
            "pid": os.getpid(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "health": health.address,
        }
        write_atomic(run.facts, json.dumps(facts))
        log("start", "running", site=config.site.name, superlink=connection.superlink, health=health.address)
        try:
            with _signals(supervisor.stopping):
                while not supervisor.stopping.is_set():
                    supervisor.step()
                    health.update(supervisor.well())
                    supervisor.stopping.wait(TICK)
            supervisor.trouble.clear()
        except CohortiumError as error:
            supervisor.trouble.note(error)
            raise
        finally:
            health.update({})
            supervisor.stop()
            health.stop()
            run.secret.unlink(missing_ok=True)
            run.facts.unlink(missing_ok=True)
            log("start", "stopped")


@contextlib.contextmanager
def _signals(stopping: threading.Event) -> Iterator[None]:
    def stop(_number: int, _frame: FrameType | None) -> None:
        stopping.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _flags(connection: ConnectionSection, address: str, run: Run) -> list[str]:
    host, _, port = address.rpartition(":")
    flags = {
        "--superlink": connection.superlink,
        "--root-certificates": connection.root_certificates,
        "--auth-supernode-private-key": connection.node_key,
        "--host": host,
        "--port": port,
        "--isolation": "process",
        "--superexec-auth-secret-file": run.secret,
    }
    return [str(part) for pair in flags.items() for part in pair]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((LOOPBACK, 0))
        return int(found.getsockname()[1])


def exit_code_of(well: dict[str, bool] | None) -> ExitCode:
    """Of `cohortium-site status`: 0 if everything is well."""
    return ExitCode.OK if well is not None and all(well.values()) else ExitCode.FEDERATION
