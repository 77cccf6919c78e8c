"""The gate in front of the Fleet API, on a real listener with raw sockets, and what start-superlink refuses."""

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

from common.errors import CohortiumError, FederationError, OutputError, UsageError
from server import superlink, supervisor
from server.consortium import init_consortium
from server.held import Held
from server.processes import JsonFormatter, StateFolder, split_address
from server.superlink import (
    LARGEST_ANNOUNCEMENT,
    LARGEST_REQUEST,
    PULL_MESSAGES,
    PUSH_MESSAGES,
    PUSH_OBJECT,
    FleetOnly,
    fleet_paths,
    require_seam,
)
from server.supervisor import check_certificate, require_loopback, start_superlink

PATHS = frozenset({PUSH_MESSAGES, PUSH_OBJECT, PULL_MESSAGES})
BUDGET = 3 << 20


class Behind:
    """The application behind the gate: takes down what reaches it, answers 200, or 401 without a key.

    `messages` is how often somebody who asks for a message is given one.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.messages = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            event = await receive()
            body, more = body + event.get("body", b""), event.get("more_body", False)
        self.seen.append((scope["path"], len(body)))
        status, answer = 200 if dict(scope["headers"]).get(b"flwr-public-key") else 401, b""
        if scope["path"] == PULL_MESSAGES and self.messages:
            self.messages, answer = self.messages - 1, b"message"
        head = [(b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": head})
        await send({"type": "http.response.body", "body": answer})


@contextlib.contextmanager
def serving(gate: Any) -> Iterator[int]:
    """The port on which `gate` listens."""
    server = uvicorn.Server(uvicorn.Config(gate, host="127.0.0.1", port=0, lifespan="off", log_level="error"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def gate() -> Iterator[tuple[Behind, int]]:
    behind = Behind()
    with serving(FleetOnly(behind, PATHS, BUDGET, Held(0.2))) as port:
        yield behind, port


def ask(port: int, head: str, body: bytes = b"", *, key: str = "k") -> int:
    """The status that comes back for exactly these bytes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        lines = f"{head} HTTP/1.1\r\nHost: x\r\nflwr-public-key: {key}\r\n"
        if "\r\n" not in head and "ength" not in head:
            lines += f"Content-Length: {len(body)}\r\n"
        connection.sendall(lines.encode("latin-1") + b"\r\n")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # answered before the end
            connection.sendall(body)
        return int(connection.recv(100).split()[1])


def chunked(port: int, path: str, size: int) -> int:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nflwr-public-key: k\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(head.encode())
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(size >> 16):
                connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            connection.sendall(b"0\r\n\r\n")
        return int(connection.recv(100).split()[1])


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "/health",
        "/docs",
        "/openapi.json",
        "/v1/control/list-nodes",
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/v1/fleet/",
        "/v1/fleet/unknown",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages?x=1",
        "/v1/fleet/pull-messages/../../control/start-run",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/%2E%2E%2Fcontrol/start-run",
        "/v1/fleet/..%2fcontrol%2fstart-run",
        "/v1/fleet/..\\control\\start-run",
        "/v1/fleet/pull%2dmessages",
        "/v1/%66leet/pull-messages",
        "//v1/fleet/pull-messages",
        "http://x/v1/control/start-run",
    ],
)
def test_nothing_but_the_fleet_api_is_served(gate: tuple[Behind, int], target: str) -> None:
    behind, port = gate
    assert ask(port, f"POST {target}") == 404 and behind.seen == []


@pytest.mark.parametrize("method", ["GET", "PUT", "HEAD", "OPTIONS"])
def test_other_methods_are_not_served(gate: tuple[Behind, int], method: str) -> None:
    behind, port = gate
    assert ask(port, f"{method} /v1/fleet/pull-messages") == 404 and behind.seen == []


def test_the_fleet_api_is_served_with_its_whole_body(gate: tuple[Behind, int]) -> None:
    behind, port = gate
    assert ask(port, "POST /v1/fleet/pull-messages", b"x" * 300_000) == 200
    assert behind.seen == [("/v1/fleet/pull-messages", 300_000)]


def test_who_sends_far_too_much_hears_the_answer(gate: tuple[Behind, int]) -> None:
    """All of it is taken off the wire and nothing kept, so that the connection is not reset under the answer."""
    behind, port = gate
    assert ask(port, f"POST {PUSH_OBJECT}", bytes(5 * LARGEST_REQUEST)) == 413 and behind.seen == []


def test_a_known_node_may_send_a_whole_reply_as_one_object() -> None:
    behind, large = Behind(), 2 * LARGEST_REQUEST
    with serving(FleetOnly(behind, PATHS, 3 * LARGEST_REQUEST, Held(0.2))) as port:
        assert ask(port, f"POST {PUSH_OBJECT}", bytes(large)) == 413
        assert ask(port, f"POST {PULL_MESSAGES}") == 200
        assert ask(port, f"POST {PUSH_OBJECT}", bytes(large)) == 200
        assert ask(port, f"POST {PUSH_OBJECT}", bytes(large)) == 413
        assert ask(port, f"POST {PULL_MESSAGES}", bytes(large)) == 413


def test_a_request_that_declares_too_much_is_not_even_read(gate: tuple[Behind, int]) -> None:
    behind, port = gate
    head = f"POST {PUSH_OBJECT} HTTP/1.1\r\nHost: x\r\nContent-Length: {LARGEST_REQUEST + 1}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(head.encode())
        assert connection.recv(100).split()[1] == b"413"
    assert behind.seen == []


def test_a_request_without_a_declared_size_is_cut_at_the_limit(gate: tuple[Behind, int]) -> None:
    behind, port = gate
    assert chunked(port, "/v1/fleet/pull-messages", 1 << 20) == 200
    assert chunked(port, "/v1/fleet/pull-messages", LARGEST_REQUEST + (1 << 20)) == 413
    assert behind.seen == [("/v1/fleet/pull-messages", 1 << 20)]


def test_what_a_node_sends_for_one_message_is_bounded(gate: tuple[Behind, int]) -> None:
    behind, port = gate
    part, behind.messages = b"x" * (1 << 20), 2
    for _ in range(2):
        assert ask(port, f"POST {PULL_MESSAGES}") == 200
        assert ask(port, f"POST {PUSH_MESSAGES}") == 200
        assert [ask(port, f"POST {PUSH_OBJECT}", part) for _ in range(4)] == [200, 200, 200, 413]
    assert ask(port, f"POST {PUSH_OBJECT}", part, key="another") == 200
    assert sum(size for path, size in behind.seen if path == PUSH_OBJECT) == 7 << 20


def test_announcing_a_reply_again_does_not_renew_what_a_node_may_send(gate: tuple[Behind, int]) -> None:
    behind, port = gate
    part = b"x" * (1 << 20)
    sent = [
        ask(port, f"POST {target}", part if target == PUSH_OBJECT else b"")
        for target in [PUSH_MESSAGES, PUSH_OBJECT] * 5
    ]
    assert sent[1::2] == [200, 200, 200, 413, 413]
    assert ask(port, f"POST {PULL_MESSAGES}") == ask(port, f"POST {PUSH_MESSAGES}") == 200, "it was given no message"
    assert ask(port, f"POST {PUSH_OBJECT}", part) == 413
    behind.messages = 1
    assert ask(port, f"POST {PULL_MESSAGES}") == ask(port, f"POST {PUSH_MESSAGES}") == 200
    assert ask(port, f"POST {PUSH_OBJECT}", part) == 200


def test_an_announcement_holds_no_more_than_names(gate: tuple[Behind, int]) -> None:
    behind, port = gate
    assert ask(port, f"POST {PUSH_MESSAGES}", b"x" * LARGEST_ANNOUNCEMENT) == 200
    assert ask(port, f"POST {PUSH_MESSAGES}", b"x" * (LARGEST_ANNOUNCEMENT + 1)) == 413
    assert behind.seen == [(PUSH_MESSAGES, LARGEST_ANNOUNCEMENT)]


def test_a_stranger_cannot_use_up_the_budget_of_a_node(gate: tuple[Behind, int]) -> None:
    class Refusing(Behind):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    filtered = FleetOnly(Refusing(), PATHS, BUDGET, Held(0.2))
    scope = {"type": "http", "path": PUSH_OBJECT, "raw_path": PUSH_OBJECT.encode(), "method": "POST"}
    scope |= {"headers": [(b"flwr-public-key", b"victim")], "query_string": b""}
    answers: list[int] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"x" * (1 << 20), "more_body": False}

    async def send(event: Any) -> None:
        answers.extend([event["status"]] if "status" in event else [])

    for _ in range(6):
        asyncio.run(filtered(dict(scope), receive, send))
    assert answers == [401] * 6


def test_a_websocket_is_closed() -> None:
    sent: list[Any] = []

    async def send(event: Any) -> None:
        sent.append(event["type"])

    asyncio.run(FleetOnly(Behind(), PATHS, BUDGET, Held(0.2))({"type": "websocket", "path": PUSH_OBJECT}, None, send))  # type: ignore[arg-type]
    assert sent == ["websocket.close"]


# What this relies on in Flower and uvicorn: an upgrade that changes it has to fail here.
def test_the_seam_is_there() -> None:
    assert callable(require_seam().flower_superlink)


def test_the_fleet_api_has_the_paths_we_know() -> None:
    from flwr.superlink.routers.fleet.router import router

    app = SimpleNamespace(routes=router.routes)
    assert {PUSH_MESSAGES, PUSH_OBJECT} <= fleet_paths(app) and len(fleet_paths(app)) == 12
    with pytest.raises(FederationError, match="starts its SuperLink differently"):
        fleet_paths(SimpleNamespace(routes=[]))


def test_a_flower_that_starts_otherwise_is_not_exposed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = require_seam()
    monkeypatch.setattr(module, "uvicorn", SimpleNamespace())
    with pytest.raises(FederationError, match="not exposed to the sites"):
        superlink.main("127.0.0.1:1", 1, [], json_logs=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    init_consortium(tmp_path / "c", "Test", ["127.0.0.1"])
    return tmp_path / "c"


@pytest.mark.parametrize("private", ["0.0.0.0:8000", "[::]:8000"])
def test_the_private_address_must_not_leave_the_machine(private: str) -> None:
    with pytest.raises(FederationError, match="authenticates nobody"):
        require_loopback(private)


@pytest.mark.parametrize("address", ["", "x", "x:", ":80", "x:0", "x:65536", "x:a", "::1:80", "x:-1"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(UsageError, match="--public"):
        split_address(address, "--public")


def test_addresses() -> None:
    assert split_address("[::1]:80") == ("::1", 80) and split_address("a.example:443") == ("a.example", 443)


def test_one_address_for_both_listeners_is_refused(folder: Path) -> None:
    with pytest.raises(FederationError, match="would reach the Control API"):
        start_superlink(folder, "127.0.0.1:8123", "127.0.0.1:8123")


def test_a_port_that_is_taken_is_named(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(FederationError, match=f"{address}: cannot be listened on"):
            start_superlink(folder, address, "127.0.0.1:8124")


@pytest.mark.parametrize("name", ["server.key", "release.key"])
def test_a_key_that_others_can_read_is_refused(folder: Path, name: str) -> None:
    (folder / name).chmod(0o640)
    with pytest.raises(OutputError, match=name):
        start_superlink(folder, "127.0.0.1:8125", "127.0.0.1:8126")


def test_a_certificate_that_does_not_cover_this_machine_is_refused(folder: Path) -> None:
    check_certificate(folder, "localhost:8000")
    with pytest.raises(OutputError, match="refuse it at other"):
        check_certificate(folder, "other.example:8000")


def test_the_state_folder_is_private(folder: Path) -> None:
    state = StateFolder(folder)
    state.prepare()
    first = state.secret.read_bytes()
    state.prepare()
    assert state.secret.read_bytes() == first and len(first) == 64
    assert stat.S_IMODE(state.secret.stat().st_mode) == 0o600 and stat.S_IMODE(state.path.stat().st_mode) == 0o700
    state.secret.chmod(0o644)
    with pytest.raises(CohortiumError, match="nobody but its owner"):
        state.prepare()


def test_a_child_that_ends_is_started_again_later_and_later(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = StateFolder(folder)
    state.prepare()
    now = [0.0]
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: now[0])
    child = supervisor.Child("x", [sys.executable, "-c", "pass"], state)
    starts: list[float] = []
    start = child.start
    monkeypatch.setattr(child, "start", lambda: (starts.append(now[0]), start()))
    child.start()
    for _ in range(400):
        if child._process is not None:
            child._process.wait()
        child.watch()
        now[0] += 0.5
    child.end()
    gaps = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert gaps[:4] == sorted(gaps[:4]) and gaps[0] <= 2 and max(gaps) <= supervisor.LONGEST_PAUSE + 1


def test_a_process_ends_with_its_parent(tmp_path: Path) -> None:
    child = "from server.processes import end_with_parent; end_with_parent(); import time; time.sleep(60)"
    parent = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], stdin=subprocess.PIPE)\n"
        "print(p.pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _runs(pid):
        time.sleep(0.05)
    assert not _runs(pid)


def test_a_json_line_has_no_text_of_an_exception() -> None:
    import logging

    try:
        raise ValueError("Zq7731")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 1, "failed", (), sys.exc_info())
    line = JsonFormatter().format(record)
    assert "Zq7731" not in line and "ValueError" in line


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
