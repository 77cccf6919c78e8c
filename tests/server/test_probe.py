"""The health of a running server: how both processes are looked at, and how a probe finds the answer."""

import os
import ssl
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from common.errors import UsageError
from common.health import HealthServer
from server import supervisor
from server.consortium import init_consortium
from server.probe import ask_health, health_code
from server.processes import SERVICES, StateFolder
from server.supervisor import start_superlink

QUIET = "import time; time.sleep(60)"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    init_consortium(tmp_path / "c", "Test", ["127.0.0.1"])
    StateFolder(tmp_path / "c").prepare()
    return tmp_path / "c"


def test_both_processes_are_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = StateFolder(folder)
    link, executor = (supervisor.Child(name, [sys.executable, "-c", QUIET], state) for name in ("link", "executor"))
    up = [True]
    look = supervisor.Look(link, executor, "127.0.0.1:1", folder / "ca.pem", state, lambda private, ca: up[0])

    def well() -> tuple[bool, bool]:
        look._next = 0.0  # ask the SuperLink now
        found = look.well()
        return found["superlink"], found["executor"]

    try:
        assert well() == (False, False), "nothing was started"
        link.start()
        assert well() == (True, False)
        state.answered.touch()
        assert well() == (True, False), "no executor runs; another one was answered"
        os.utime(state.answered, (0, time.time() - 1))
        executor.start()
        assert well() == (True, False), "this one was not answered yet"
        os.utime(state.answered, (0, time.time() + 1))
        assert well() == (True, True)
        later = time.time() + supervisor.ANSWERED_FOR + 2
        monkeypatch.setattr(supervisor.time, "time", lambda: later)
        assert well() == (True, False), "the SuperLink has not answered it for long"
        monkeypatch.undo()
        up[0] = False
        assert well() == (False, True)
        up[0] = True
        assert link._process is not None
        link._process.kill()
        link._process.wait()
        assert well() == (False, True), "what answers there is not ours"
    finally:
        link.end()
        executor.end()


def test_the_health_of_a_server_is_found_through_its_folder(folder: Path) -> None:
    state = StateFolder(folder)
    assert ask_health(folder) is None and health_code(None) == 8, "it was never started"
    served = HealthServer("127.0.0.1:0", SERVICES)
    try:
        state.write_addresses("127.0.0.1:9443", "127.0.0.1:8000", served.address)
        served.update({"superlink": True})
        assert ask_health(folder) == {"superlink": True, "executor": False}
        assert health_code(ask_health(folder)) == 8
        served.update(dict.fromkeys(SERVICES, True))
        assert health_code(ask_health(folder)) == 0
    finally:
        served.stop()
    assert health_code(ask_health(folder)) == 8


def test_a_health_address_that_cannot_be_had_is_named(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"--health 192\.0\.2\.1:9096: cannot listen"):
        start_superlink(folder, "127.0.0.1:8127", "127.0.0.1:8128", health="192.0.2.1:9096")
    assert not StateFolder(folder).addresses.exists()


def test_a_proxy_of_the_environment_is_not_asked_for_the_superlink(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")

    class Well(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Well) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert supervisor.healthy(f"127.0.0.1:{server.server_port}", folder / "ca.pem")
        server.shutdown()
    assert not supervisor.healthy(f"127.0.0.1:{server.server_port}", folder / "ca.pem")
