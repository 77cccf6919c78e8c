"""Looking before connecting, one start on one state, children that end, and the words for what goes wrong."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from flwr.supernode import start_client_internal as _internal  # noqa: F401

from client.children import Child, Log
from client.connection import ConnectionSection
from client.init_site import init_site
from client.preflight import UnreachableError, check_files, check_superlink, split_address
from client.site import load_site
from client.site_status import render_status, site_status
from client.start import SILENT_FOR, Options, Run, Supervisor
from client.supernode import Contact, after, patch, read_contact
from client.trouble import Trouble
from common.errors import FederationError, SiteError
from server.consortium import init_consortium
from tests.client.hospital import table
from tests.tls import serving

SOURCE = Path("connection.toml")


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("consortium") / "con"
    init_consortium(folder, "Trial", ["localhost"])
    return folder


def web_server(chain: Path, key: Path, seconds: float = 0.0) -> AbstractContextManager[int]:
    """A TLS server that answers 404 with a Date of so many seconds from now; gives its port."""

    def answer(secure: ssl.SSLSocket) -> None:
        secure.recv(4096)
        date = format_datetime(datetime.fromtimestamp(time.time() + seconds, UTC), usegmt=True)
        secure.sendall(f"HTTP/1.1 404 Not Found\r\ndate: {date}\r\n\r\n".encode())

    return serving(chain, key, answer, host="")


def connection(consortium: Path, port: int, host: str = "localhost", ca: Path | None = None) -> ConnectionSection:
    return ConnectionSection(
        superlink=f"{host}:{port}", root_certificates=ca or consortium / "ca.pem", node_key=Path("node.key")
    )


def test_a_superlink_that_is_right(consortium: Path) -> None:
    with web_server(consortium / "server.pem", consortium / "server.key") as port:
        check_superlink(connection(consortium, port), SOURCE)
    assert split_address("[::1]:443") == ("::1", 443)


def test_another_authority(consortium: Path, tmp_path: Path) -> None:
    init_consortium(tmp_path / "other", "Other", ["localhost"])
    with (
        web_server(tmp_path / "other/server.pem", tmp_path / "other/server.key") as port,
        pytest.raises(SiteError, match=r"a certificate that .*ca\.pem has not signed"),
    ):
        check_superlink(connection(consortium, port), SOURCE)


def test_another_name(consortium: Path) -> None:
    with (
        web_server(consortium / "server.pem", consortium / "server.key") as port,
        pytest.raises(SiteError, match="is not for the name"),
    ):
        check_superlink(connection(consortium, port, "127.0.0.2"), SOURCE)


@pytest.mark.parametrize(
    ("seconds", "words"), [(-600, "60. s ahead of|599 s ahead of"), (600, "600 s behind|599 s behind")]
)
def test_a_wrong_clock(consortium: Path, seconds: float, words: str) -> None:
    with (
        web_server(consortium / "server.pem", consortium / "server.key", seconds) as port,
        pytest.raises(SiteError, match=words),
    ):
        check_superlink(connection(consortium, port), SOURCE)


@pytest.mark.parametrize("seconds", [-4.0, 0.0, 250.0])
def test_a_clock_that_flower_tolerates(consortium: Path, seconds: float) -> None:
    with web_server(consortium / "server.pem", consortium / "server.key", seconds) as port:
        check_superlink(connection(consortium, port), SOURCE)


def test_nobody_there(consortium: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(UnreachableError, match="cannot be reached"):
        check_superlink(connection(consortium, port), SOURCE)
    with pytest.raises(UnreachableError, match="cannot be reached"):
        check_superlink(connection(consortium, port, "no-such-host.invalid"), SOURCE)


class Started:
    """A site's folder as `cohortium-site init` makes it, and a supervisor that has started nothing."""

    def __init__(self, folder: Path, consortium: Path, give_up: float | None = None) -> None:
        (folder / "patients.csv").write_text(table())
        self.folder = folder / "anna"
        init_site(self.folder, "anna", folder / "patients.csv", "localhost:1", consortium / "ca.pem")
        config = load_site(self.folder / "site.toml")
        from client.connection import load_connection

        self.connection = load_connection(self.folder / "connection.toml")
        self.run = Run(config.site.state)
        self.run.folder.mkdir()
        self.logged: list[str] = []
        log = Log("text")
        options = Options(self.folder / "site.toml", self.folder / "connection.toml", give_up=give_up)
        self.supervisor = Supervisor(options, config, self.connection, self.run, log)


@pytest.fixture
def started(tmp_path: Path, consortium: Path) -> Started:
    return Started(tmp_path, consortium)


def test_one_start_on_one_state(started: Started) -> None:
    other = Run(started.run.folder.parent)
    assert not other.running
    with started.run.held():
        started.run.facts.write_text('{"pid": 4711}')
        assert other.running
        with pytest.raises(SiteError, match=r"running already \(process 4711\)"), other.held():
            raise AssertionError("two starts on one state")
    with other.held():
        pass


def test_the_secret_is_new_and_private(started: Started) -> None:
    os.umask(0)
    try:
        started.run.new_secret()
    finally:
        os.umask(0o022)
    first = started.run.secret.read_bytes()
    assert started.run.secret.stat().st_mode & 0o777 == 0o600 and len(first) == 64 and not first.endswith(b"\n")
    started.run.new_secret()
    assert started.run.secret.read_bytes() != first


def test_what_the_children_get(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = started.supervisor.supernode.command
    assert "--insecure" not in flags and "--isolation" in flags and "process" in flags
    assert flags[flags.index("--host") + 1] == "127.0.0.1"
    environment = started.supervisor.supernode._environment
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0" and environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environment["FLWR_HOME"] == str(started.run.folder.parent / "flower")
    assert str(started.connection.node_key) not in " ".join(started.supervisor.executor.command)


def test_files_that_cannot_be_used(started: Started) -> None:
    check_files(started.connection)
    started.connection.node_key.chmod(0o640)
    with pytest.raises(SiteError, match="permissions 0640"):
        check_files(started.connection)
    started.connection.root_certificates.write_text("nothing")
    with pytest.raises(SiteError, match=r"ca\.pem"):
        check_files(started.connection)


def test_an_unknown_key_ends_the_start(started: Started) -> None:
    supervisor = started.supervisor
    supervisor.supernode.last.append("[code: 2004] Failed to activate SuperNode.")
    with pytest.raises(FederationError, match="not enrolled, or was revoked"):
        supervisor._why_it_ended()
    started.run.contact.write_text('{"node": 5, "time": 1.0}')
    supervisor._why_it_ended()  # one that was killed may count as online for a minute
    supervisor._hear_supernode({"event": "key-refused"}, "")
    with pytest.raises(FederationError, match="not enrolled, or was revoked"):
        supervisor._why_it_ended()


def test_an_executor_that_dies_with_a_message_takes_the_supernode_along(started: Started) -> None:
    supervisor = started.supervisor
    for owing in (False, True):
        quiet = "import time; time.sleep(60)"
        supervisor.supernode, supervisor.executor = child(quiet), child("raise SystemExit(9)")
        supervisor.supernode.start()
        supervisor.executor.start()
        if owing:
            supervisor._hear_executor({"event": "received"}, "")
        assert supervisor.executor.process is not None
        supervisor.executor.process.wait()
        supervisor.executor.not_before = supervisor._next_look = time.monotonic() + 60
        supervisor.step()
        assert supervisor.supernode.running is not owing
        supervisor.supernode.stop(1.0)


def test_a_supernode_that_hears_nothing_any_more_is_started_anew(started: Started) -> None:
    """Behind a proxy Flower's SuperNode may lose its connection for good and stay alive."""
    supervisor = started.supervisor
    supervisor.supernode, supervisor.executor = (child("import time; time.sleep(60)") for _ in range(2))
    supervisor.supernode.start()
    supervisor._next_look = time.monotonic() + 60
    supervisor.step()
    assert supervisor.supernode.running, "it has just been started"
    supervisor.supernode.since -= SILENT_FOR + 1
    started.run.contact.write_text("{}")
    supervisor.step()
    assert supervisor.supernode.running, "it was answered a moment ago"
    os.utime(started.run.contact, (0, time.time() - SILENT_FOR - 1))
    supervisor.step()
    assert not supervisor.supernode.running
    supervisor.executor.stop(1.0)


def test_an_unreachable_superlink_is_waited_for(started: Started, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        started.supervisor._look_and_start()
    assert capfd.readouterr().err.count("cannot be reached") == 1, "said once"
    assert not started.supervisor.supernode.running


def test_what_is_wrong_is_said_until_it_is_mended(
    started: Started, consortium: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """At first another authority ends the start; in a site that was connected before it is waited for."""
    init_consortium(tmp_path / "other", "Other", ["localhost"])
    supervisor, trouble = started.supervisor, Trouble(started.run.folder.parent)
    supervisor.supernode = child("import time; time.sleep(60)")
    with web_server(tmp_path / "other/server.pem", tmp_path / "other/server.key") as port:
        supervisor.connection = started.connection.model_copy(update={"superlink": f"localhost:{port}"})
        with pytest.raises(SiteError, match="has not signed"):
            supervisor._look_and_start()
        supervisor._was_connected = True
        for _ in range(2):
            supervisor._look_and_start()
    assert capfd.readouterr().err.count("has not signed") == 1 and not supervisor.supernode.running
    found = trouble.read()
    assert found is not None and "has not signed" in found["message"] and "ca.pem" in found["fix"]
    status = site_status(load_site(started.folder / "site.toml"))
    assert status["trouble"] == found and any("has not signed" in line for line in render_status(status))
    with web_server(consortium / "server.pem", consortium / "server.key") as port:
        supervisor.connection = started.connection.model_copy(update={"superlink": f"localhost:{port}"})
        supervisor._look_and_start()
    assert supervisor.supernode.running
    started.run.contact.write_text(json.dumps({"node": 1, "time": time.time() + 1}))
    supervisor._next_look = time.monotonic() + 60
    supervisor.step()
    assert trouble.read() is None
    supervisor.supernode.stop(1.0)
    supervisor.executor.stop(1.0)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"message": 1}'])
def test_a_damaged_note_of_trouble_is_none(tmp_path: Path, text: str) -> None:
    trouble = Trouble(tmp_path)
    trouble.path.parent.mkdir()
    trouble.path.write_text(text)
    assert trouble.read() is None


def test_a_superlink_that_fails_inside_is_said_once(started: Started, capfd: pytest.CaptureFixture[str]) -> None:
    supervisor = started.supervisor
    for _ in range(2):
        supervisor.supernode.last.append("Server error '500 Internal Server Error' for url 'https://localhost:1/v1'")
        supervisor._why_it_ended()
    found = supervisor.trouble.read()
    assert found is not None and "something is wrong in it" in found["message"]
    assert capfd.readouterr().err.count("something is wrong in it") == 1


def test_giving_up(tmp_path: Path, consortium: Path) -> None:
    started = Started(tmp_path, consortium, give_up=0.0)
    with pytest.raises(UnreachableError):
        started.supervisor._look_and_start()


def child(code: str, heard: Callable[..., None] = lambda fields, text: None) -> Child:
    return Child("name", [sys.executable, "-c", code], os.environ, Log("json"), heard)


def test_a_child_is_heard_and_its_end_noticed(capfd: pytest.CaptureFixture[str]) -> None:
    events: list[Any] = []
    made = child(
        "import json; print('INFO :      hello'); print('\\x1b[92mERROR \\x1b[0m:   bad'); "
        "print(json.dumps({'event': 'answered', 'round': 3})); print('{\"event\": 5')\nraise SystemExit(4)",
        lambda fields, text: events.append(fields),
    )
    made.start()
    while (code := made.ended()) is None:
        time.sleep(0.05)
    assert code == 4 and made.process is None
    assert list(made.last) == ["hello", "bad", '{"event": 5']
    assert [fields for fields in events if fields] == [{"event": "answered", "round": 3}]
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert {"source": "name", "event": "answered", "round": 3}.items() <= lines[3].items()
    assert 0.5 < made.not_before - time.monotonic() <= 1.0
    made.start()
    while made.ended() is None:
        time.sleep(0.05)
    assert 1.5 < made.not_before - time.monotonic() <= 2.0, "the pause grows"


def test_what_a_dead_child_leaves_behind_is_ended() -> None:
    code = (
        "import subprocess, sys; left = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(left.pid, flush=True); raise SystemExit(3)"
    )
    made = child(code)
    began = time.monotonic()
    made.start()
    while (found := made.ended()) is None:
        time.sleep(0.05)
    assert found == 3 and time.monotonic() - began < 20
    state = Path(f"/proc/{made.last[0]}/stat")
    for _ in range(100):
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the worker lives on")


def test_a_child_that_ignores_sigterm_is_killed() -> None:
    ready = threading.Event()
    made = child(
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('x', flush=True); time.sleep(60)",
        lambda fields, text: ready.set(),
    )
    made.start()
    assert made.process is not None and ready.wait(20)
    made.stop(0.3)
    assert made.process.returncode == -signal.SIGKILL


def test_a_child_ends_with_its_parent() -> None:
    inner = (
        "import os, time; from client.worker import end_with_parent\n"
        "end_with_parent(lambda: os._exit(0)); time.sleep(99)"
    )
    outer = (
        f"import os, subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', {inner!r}])\n"
        "print(child.pid, flush=True); time.sleep(2); os.kill(os.getpid(), 9)"
    )
    with subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.wait(30)
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the child lives on")


def test_the_contact_file(tmp_path: Path) -> None:
    path = tmp_path / "contact.json"
    assert read_contact(path) == {}
    contact = Contact(path)
    contact.seen(5)
    assert read_contact(path)["node"] == 5 and Contact(path).node == 5
    path.write_text("{")
    assert read_contact(path) == {}


def test_flowers_waits_can_still_be_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract with flwr 1.41: without these names a round is slower by seconds."""
    from flwr.supernode.fleet_http_client import FleetHttpClient

    module = sys.modules["flwr.supernode.start_client_internal"]
    for name in ("time", "_push_messages", "_pull_and_store_message"):
        monkeypatch.setattr(module, name, getattr(module, name))
    patch(module)
    began = time.monotonic()
    module.time.sleep(3)  # type: ignore[attr-defined]
    assert time.monotonic() - began < 1
    for name in ("ActivateNode", "PullMessages", "SendNodeHeartbeat", "DeactivateNode"):
        assert callable(getattr(FleetHttpClient, name))
    seen: list[Any] = []

    class Owner:
        def method(self) -> int:
            return 3

    after(Owner, "method", seen.append)
    after(Owner, "missing", seen.append)
    assert Owner().method() == 3 and seen == [3] and not hasattr(Owner, "missing")


def test_a_supernode_whose_heartbeat_dies_ends() -> None:
    """An error that Flower does not retry ends the thread; the process must not live on without it."""
    program = (
        "import time; from flwr.supercore.heartbeat import HeartbeatSender\n"
        "from client.supernode import end_without_heartbeat\n"
        "def broken(): raise RuntimeError('500')\n"
        "end_without_heartbeat(HeartbeatSender); HeartbeatSender(broken).start(); time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=50, check=False)
    assert done.returncode == -signal.SIGTERM
