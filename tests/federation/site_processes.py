"""A real SuperLink with TLS and node authentication, and a stand-in for the coordinator's ServerApp, on loopback."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from flwr.app import Message, RecordDict
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, context_to_proto, fab_to_proto, run_from_proto
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest, UnregisterNodeRequest
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

BIN = Path(sys.executable).parent
COHORTIUM_SITE = "from client.cli import main; main()"
SECRET = b"0123456789abcdef0123456789abcdef"
PYPROJECT = """[project]
name = "app"
version = "1.0.0"
description = ""
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "somebody"
[tool.flwr.app.components]
serverapp = "stranger.server:app"
clientapp = "stranger.client:app"
[tool.flwr.app.config]
"""


def make_bundle(files: Mapping[str, str]) -> bytes:
    """A bundle packed by hand, as an attacker may."""
    content = {"pyproject.toml": PYPROJECT, **files}
    listing = [f"{n},{hashlib.sha256(t.encode()).hexdigest()},{len(t.encode()) * 8}" for n, t in content.items()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in {**content, ".info/CONTENT": "\n".join(listing)}.items():
            archive.writestr(zipfile.ZipInfo(name, (2024, 10, 1, 0, 0, 0)), text)
    return buffer.getvalue()


def evil_bundle(target: Path) -> bytes:
    """A bundle whose ClientApp writes `target` when it is imported."""
    client = (
        f"from pathlib import Path\nPath({str(target)!r}).write_text('owned')\n"
        "from flwr.clientapp import ClientApp\napp = ClientApp()\n"
    )
    server = "from flwr.serverapp import ServerApp\napp = ServerApp()\n"
    return make_bundle({"stranger/__init__.py": "", "stranger/client.py": client, "stranger/server.py": server})


def environment(home: Path) -> dict[str, str]:
    return os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }


class SuperLink:
    """flower-superlink as a process; `pki` holds ca.pem, server.pem and server.key."""

    def __init__(self, folder: Path, pki: Path, port: int) -> None:
        self.folder, self.pki, self.port = folder, pki, port
        self.address, self.ca = f"localhost:{port}", (pki / "ca.pem").read_bytes()
        (folder / "secret").write_bytes(SECRET)
        (folder / "secret").chmod(0o600)
        self.process: subprocess.Popen[bytes] | None = None
        self._versions = [RuntimeVersionHttpInterceptor(component_name="flwr CLI")]

    def start(self) -> None:
        flags = {
            "--host": "127.0.0.1",
            "--port": self.port,
            "--ssl-certfile": self.pki / "server.pem",
            "--ssl-keyfile": self.pki / "server.key",
            "--ssl-ca-certfile": self.pki / "ca.pem",
            "--database": self.folder / "state.db",
            "--isolation": "process",
            "--superexec-auth-secret-file": self.folder / "secret",
        }
        command = [str(BIN / "flower-superlink"), *(str(part) for pair in flags.items() for part in pair)]
        command += ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
        with (self.folder / "superlink.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment(self.folder / "home"), start_new_session=True
            )
        context = ssl.create_default_context(cafile=str(self.pki / "ca.pem"))
        for _ in range(450):
            if self.process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"https://{self.address}/health", context=context, timeout=2)
                return
            except OSError:
                time.sleep(0.2)
        raise AssertionError((self.folder / "superlink.log").read_text()[-2000:])

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def control(self) -> ControlHttpClient:
        return ControlHttpClient.from_server_address(self.address, False, self.ca, self._versions)

    def register(self, public_key: str) -> int:
        """Register a node key (a line of OpenSSH); its node id."""
        key = serialization.load_ssh_public_key(public_key.strip().encode())
        pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        with self.control() as control:
            return control.RegisterNode(RegisterNodeRequest(public_key=pem)).node_id

    def revoke(self, node: int) -> None:
        with self.control() as control:
            control.UnregisterNode(UnregisterNodeRequest(node_id=node))

    def submit(self, bundle: bytes) -> int:
        with self.control() as control:
            fab = fab_to_proto(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {}))
            return control.StartRun(StartRunRequest(fab=fab)).run_id


class Coordinator:
    """The ServerApp's side of one run: claims its task and sends messages, from this very process."""

    def __init__(self, link: SuperLink, bundle: bytes) -> None:
        self.run = link.submit(bundle)
        method = frozenset({"/flwr.proto.Runtime/AcquireTask"})
        extra = SuperExecAuthHttpInterceptor(master_secret=SECRET, protected_methods=method)
        version = RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")
        base = RuntimeHttpClient.from_server_address(link.address, False, link.ca, [version, extra])
        for _ in range(100):
            response = base.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
            if response.HasField("task") and response.token:
                break
            time.sleep(0.1)
        else:
            raise AssertionError("no task for the ServerApp")
        self.grid: Any = HttpGrid(link.address, False, link.ca, token=response.token)
        self.client: Any = self.grid._runtime_client
        pulled = self.client.PullTaskInput(PullTaskInputRequest())
        self.context = context_from_proto(pulled.context)
        self.grid.set_run(run_from_proto(pulled.run))
        self._identity = (pulled.task_id, pulled.run.run_id, self.context.node_id)
        self._stop = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self._stop.wait(10):
            self.client.SendTaskHeartbeat(SendTaskHeartbeatRequest())

    def nodes(self) -> list[int]:
        return list(self.grid.get_node_ids())

    def wait_for_nodes(self, number: int, limit: float = 90.0) -> list[int]:
        end = time.monotonic() + limit
        while time.monotonic() < end:
            if len(found := self.nodes()) >= number:
                return found
            time.sleep(0.2)
        raise AssertionError(f"{len(self.nodes())} nodes online, expected {number}")

    def ask(self, node: int, kind: str, content: RecordDict, limit: float = 60.0) -> tuple[Message, float]:
        """The reply of a node and the seconds it took."""
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = self._identity
        started = time.monotonic()
        waiting = set(self.grid.push_messages([Message(content=content, dst_node_id=node, message_type=kind)]))
        while time.monotonic() - started < limit:
            for message in self.grid.pull_messages(waiting):
                return message, time.monotonic() - started
            time.sleep(0.1)
        raise AssertionError(f"no reply to {kind} within {limit:g} s")

    def finish(self) -> None:
        self._stop.set()
        context = context_to_proto(self.context)
        self.client.PushTaskOutput(PushTaskOutputRequest(context=context, sub_status=SubStatus.COMPLETED, details=""))
        self.grid.close()


class SiteProcess:
    """`cohortium-site start` as a process, with its log as JSON lines."""

    def __init__(self, folder: Path, *more: str) -> None:
        self.folder = folder
        self.log_path = folder / "start.log"
        command = [sys.executable, "-P", "-c", COHORTIUM_SITE, "start", "--site", str(folder / "site.toml")]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--log-format", "json", *more],
                stdout=log,
                stderr=log,
                env=environment(folder),
                start_new_session=True,
            )

    def events(self) -> list[dict[str, Any]]:
        lines = self.log_path.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def wait_for(self, event: str, limit: float = 120.0, **fields: Any) -> dict[str, Any]:
        end = time.monotonic() + limit
        while time.monotonic() < end:
            for found in self.events():
                if found["event"] == event and fields.items() <= found.items():
                    return found
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise AssertionError(f"no {event} {fields}: {self.log_path.read_text()[-3000:]}")

    def stop(self, number: int = signal.SIGTERM, limit: float = 30.0) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
