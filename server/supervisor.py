"""`cohortium start-superlink`: the SuperLink and the coordinator's executor as two processes, watched over.

Each is started again when it ends, after a pause that grows; the study goes on, since Flower's database and the
checkpoints are on disk. What can be wrong with keys, certificates and addresses is found before either starts.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from common.certificates import check_ca, check_dates, handshake_problem, read_certificates
from common.errors import FederationError, OutputError
from common.keys import read_private_file
from server.consortium import SERVER_KEY, load_facts, load_release_key
from server.processes import SERVICES, StateFolder, environment, split_address, use_json_logs

START_SECONDS = 60.0
STEADY_SECONDS = 60.0
LONGEST_PAUSE = 30.0
GRACE_SECONDS = 8.0
POLL_SECONDS = 0.2
HEALTH_SECONDS = 2.0
LOOK_SECONDS = 5.0  # between two looks at the SuperLink's own health
ANSWERED_FOR = 45.0  # the executor is answered several times a second when idle, and every 10 s in a run
log = logging.getLogger("cohortium.superlink")


def start_superlink(
    consortium: Path,
    public: str,
    private: str,
    *,
    health: str = "127.0.0.1:0",
    json_logs: bool = False,
    reply_mib: int = 64,
) -> None:
    """Run both processes in the foreground until SIGTERM or Ctrl-C; `health` is where probes are answered."""
    from common.health import HealthServer  # with gRPC, which the other commands do not wait for

    if json_logs:
        use_json_logs()
    else:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    consortium = consortium.resolve()
    load_facts(consortium)
    load_release_key(consortium)  # now, and not when the first study is released
    check_certificate(consortium, private)
    require_loopback(private)
    state = StateFolder(consortium)
    state.prepare()
    with _alone(state):
        _require_free(public, private)
        served = HealthServer(health, SERVICES)
        state.write_addresses(public, private, served.address)
        logs = "json" if json_logs else "text"
        ca = consortium / "ca.pem"
        link = Child("the SuperLink", superlink_command(consortium, state, public, private, reply_mib, logs), state)
        executor = Child(
            "the executor", [sys.executable, "-m", "server.executor", str(consortium), private, logs], state
        )
        stopping, look = _Stop(), Look(link, executor, private, ca, state)
        try:
            link.start()
            _await_health(link, private, ca, stopping)
            executor.start()
            if not stopping:
                log.info(
                    "the SuperLink serves sites at %s, and this machine at %s; health at %s",
                    *(public, private, served.address),
                )
            while not stopping:
                link.watch()
                executor.watch()
                served.update(look.well())
                time.sleep(POLL_SECONDS)
        finally:
            served.update({})
            executor.end()
            link.end()
            served.stop()


def superlink_command(
    consortium: Path, state: StateFolder, public: str, private: str, reply_mib: int, logs: str
) -> list[str]:
    """The SuperLink's process: `server.superlink` with flower-superlink's own arguments."""
    host, port = split_address(private)
    return [
        *(sys.executable, "-m", "server.superlink", public, str(reply_mib << 20), logs),
        *("--host", host, "--port", str(port)),
        *("--ssl-certfile", str(consortium / "server.pem"), "--ssl-keyfile", str(consortium / "server.key")),
        *("--ssl-ca-certfile", str(consortium / "ca.pem"), "--enable-supernode-auth"),
        *("--database", str(state.database), "--isolation", "process"),
        *("--superexec-auth-secret-file", str(state.secret), "--disable-runtime-dependency-installation"),
    ]


def check_certificate(consortium: Path, private: str) -> None:
    """`OutputError` unless server.pem is in date, belongs to server.key and ca.pem, and covers the private address."""
    check_ca(consortium / "ca.pem", OutputError)
    read_private_file(consortium / "server.key", SERVER_KEY)
    for certificate in read_certificates(consortium / "server.pem", OutputError):
        try:
            check_dates(consortium / "server.pem", certificate, OutputError)
        except OutputError as error:
            raise OutputError(
                error.message, fix="`cohortium renew-certificate`, or correct this machine's clock"
            ) from None
    host, _ = split_address(private, "--private")
    chain, key, ca = (str(consortium / name) for name in ("server.pem", "server.key", "ca.pem"))
    problem = handshake_problem(chain, key, ca, host)
    if problem:
        raise OutputError(
            f"{chain}: this machine's own processes refuse it at {private}: {problem}",
            fix="`cohortium renew-certificate`; with a CA of your own, the certificate needs the name of --private too",
        )


def require_loopback(private: str) -> None:
    """`FederationError` if the private address is reachable from other machines: whoever reaches it commands."""
    import ipaddress
    import socket

    host, port = split_address(private, "--private")
    try:
        found = {str(where[4][0]) for where in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise FederationError(f"--private {private}: {error.strerror or error}", fix="name 127.0.0.1:PORT") from None
    outside = sorted(address for address in found if not ipaddress.ip_address(address).is_loopback)
    if outside:
        raise FederationError(
            f"--private {private} is {', '.join(outside)}, which other machines may reach; Flower's Control API there"
            " authenticates nobody",
            fix="name an address of the loopback interface, such as 127.0.0.1:8000",
        )


def healthy(private: str, ca: Path) -> bool:
    """Whether the SuperLink answers on its private address."""
    context = ssl.create_default_context(cafile=str(ca))
    # This machine is asked, and never a proxy that the environment names.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(f"https://{private}/health", timeout=HEALTH_SECONDS) as answer:
            return answer.status == 200
    except (OSError, ValueError, urllib.error.URLError):
        return False


class Child:
    """A process that is started again when it ends. It holds a pipe of ours, and ends when we do."""

    def __init__(self, name: str, command: list[str], state: StateFolder) -> None:
        self.name = name
        self._command = command
        self._state = state
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._pause = 1.0
        self._again = 0.0
        self.since = 0.0  # time of the last start

    def start(self) -> None:
        """Start it, in a session of its own: a Ctrl-C at the terminal is ours to handle."""
        self._started, self._again, self.since = time.monotonic(), 0.0, time.time()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            env=environment(self._state),
            cwd=self._state.path,
            start_new_session=True,
        )

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self._process is not None and self.code is None

    @property
    def code(self) -> int | None:
        """Exit code, None while it runs."""
        return None if self._process is None else self._process.poll()

    def watch(self) -> None:
        """Start it again, after a pause that doubles while it keeps ending early."""
        if self.code is None:
            return
        now = time.monotonic()
        if not self._again:
            if now - self._started > STEADY_SECONDS:
                self._pause = 1.0
            log.warning("%s ended with code %s; starts again in %g s", self.name, self.code, self._pause)
            self._again, self._pause = now + self._pause, min(self._pause * 2, LONGEST_PAUSE)
        elif now >= self._again:
            self._release()
            self.start()

    def end(self) -> None:
        """Ask it to stop, then make it."""
        process = self._process
        if process is None:
            return
        for sign in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                process.send_signal(sign)
                try:
                    process.wait(GRACE_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        self._release()

    def _release(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()


class Look:
    """How both processes are, for the health probe."""

    def __init__(
        self,
        link: Child,
        executor: Child,
        private: str,
        ca: Path,
        state: StateFolder,
        ask: Callable[[str, Path], bool] = healthy,
    ) -> None:
        self._link, self._executor, self._state = link, executor, state
        self._ask = lambda: ask(private, ca)
        self._answers, self._next = False, 0.0

    def well(self) -> dict[str, bool]:
        """Whether the SuperLink answers, asked every LOOK_SECONDS, and whether it has answered the executor lately."""
        now = time.monotonic()
        if now >= self._next:
            self._answers, self._next = self._ask(), now + LOOK_SECONDS
        try:
            answered = self._state.answered.stat().st_mtime
        except OSError:
            answered = 0.0
        lately = answered >= self._executor.since and time.time() - answered < ANSWERED_FOR
        return {
            "superlink": self._link.running and self._answers,
            "executor": self._executor.running and lately,
        }


class _Stop:
    """True once SIGTERM or SIGINT came."""

    def __init__(self) -> None:
        self._came = False
        for sign in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sign, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = True

    def __bool__(self) -> bool:
        return self._came


def _await_health(
    link: Child, private: str, ca: Path, stopping: _Stop, ask: Callable[[str, Path], bool] = healthy
) -> None:
    """`FederationError` if the SuperLink ends, or does not answer in time, the first time it is started."""
    deadline = time.monotonic() + START_SECONDS
    while not stopping:
        if link.code is not None:
            raise FederationError(
                f"the SuperLink ended with code {link.code} as it started", fix="see the lines that it printed above"
            )
        if ask(private, ca):
            return
        if time.monotonic() > deadline:
            raise FederationError(
                f"the SuperLink does not answer at {private} after {START_SECONDS:g} s",
                fix="see the lines that it printed above",
            )
        time.sleep(POLL_SECONDS)


@contextmanager
def _alone(state: StateFolder) -> Iterator[None]:
    """One SuperLink a folder; two would share its database."""
    handle = os.open(state.lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise FederationError(
            f"{state.consortium}: its SuperLink runs already", fix="`cohortium status` shows it; stop it first"
        ) from None
    try:
        yield
    finally:
        os.close(handle)


def _require_free(public: str, private: str) -> None:
    from server.superlink import bind

    if split_address(public, "--public") == split_address(private, "--private"):
        raise FederationError(
            f"--public and --private are both {public}: the sites would reach the Control API",
            fix="choose another port for one of them",
        )
    for address in (public, private):
        bind(address).close()
