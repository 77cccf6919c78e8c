"""Flower's register of SuperNodes: `flwr supernode register` and `unregister`, and the list with public keys.

The `flwr` command beside this Python runs with a FLWR_HOME and a working folder of its own, removed afterwards: it
would otherwise create ~/.flwr and edit a pyproject.toml where it stands. It finds the SuperLink in a config.toml there.
`flwr supernode list` prints neither keys nor names, so the list is asked of the same API.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from common.errors import FederationError, UsageError

TIMEOUT = 60.0
CONNECTION = "consortium"
IN_USE = "already in use"
CHECK = (
    "check that the SuperLink runs, that --superlink is HOST:PORT of its Control API under a name of its certificate,"
    " and that ca.pem is its CA"
)


@dataclass(frozen=True)
class Control:
    """The SuperLink's Control API: HOST:PORT, and the CA that its certificate must come from."""

    address: str
    ca: Path
    timeout: float = TIMEOUT


@dataclass(frozen=True)
class NodeInfo:
    """A SuperNode as the SuperLink knows it; `status` is registered, online, offline or unregistered.

    Times are ISO 8601, empty if there is none: `activated_at`, when it last came online; `last_heartbeat`, when it last
    said that it is alive, while it is online; `deactivated_at`, when it signed off, or, if it fell silent, `patience`
    seconds after its last heartbeat: the SuperLink does not note which of the two it was.
    """

    node_id: str
    status: str
    node_key: str
    name: str
    activated_at: str
    last_heartbeat: str = ""
    deactivated_at: str = ""
    patience: float = 0.0


def register_node(public_key: Path, control: Control, name: str) -> str:
    """Register an OpenSSH public key file; returns the node's id. `FederationError` if the SuperLink refuses.

    A key that was unregistered once is refused for ever: the SuperLink keeps it.
    """
    answer = _flwr(control, ["register", str(public_key.resolve()), CONNECTION, f"--name={name}"])
    node_id = answer.get("node-id")
    if not node_id:
        raise FederationError(f"{control.address}: the SuperLink registered the key but gave no node id")
    return str(node_id)


def unregister_node(node_id: str, control: Control) -> None:
    """Remove a node: its key is refused from now on. `FederationError` if the SuperLink refuses."""
    _flwr(control, ["unregister", node_id, CONNECTION])


def list_nodes(control: Control) -> list[NodeInfo]:
    """Every node the SuperLink knows, unregistered ones included; `FederationError` if it cannot be asked."""
    import httpx
    from flwr.common.constant import HEARTBEAT_PATIENCE
    from flwr.proto.control_pb2 import ListNodesRequest
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

    client = ControlHttpClient.from_server_address(
        control.address,
        insecure=False,
        root_certificates=_require_ca(control),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="cohortium")],
    )
    try:
        nodes = client.ListNodes(ListNodesRequest()).nodes_info
    except httpx.HTTPError as error:
        raise FederationError(
            f"{control.address}: the SuperLink's list of nodes cannot be had ({type(error).__name__})", fix=CHECK
        ) from None
    finally:
        client.close()
    found = []
    for node in nodes:
        patience = HEARTBEAT_PATIENCE * node.heartbeat_interval
        # Flower keeps until when it waits for the next heartbeat: its patience after the last one.
        beat = datetime.fromtimestamp(node.online_until - patience, UTC) if node.status == "online" else None
        found.append(
            NodeInfo(
                *(str(node.node_id), node.status, openssh_line(node.public_key), node.name, node.last_activated_at),
                last_heartbeat=beat.isoformat() if beat else "",
                deactivated_at=node.last_deactivated_at if node.status == "offline" else "",
                patience=patience,
            )
        )
    return found


def openssh_line(pem: bytes) -> str:
    """A public key as Flower keeps it (PEM), as the line of OpenSSH that enrolment has; "" if it is none."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_pem_public_key(pem)
        return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    except (ValueError, UnsupportedAlgorithm):  # a SuperNode without authentication registers random bytes
        return ""


def find_node(node_key: str, control: Control) -> NodeInfo | None:
    """The node with this public key (a line of OpenSSH), if the SuperLink knows it."""
    return next((node for node in list_nodes(control) if node.node_key == node_key), None)


def _require_ca(control: Control) -> bytes:
    try:
        return control.ca.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{control.ca}: the consortium's CA cannot be read ({error.strerror})", fix="name the consortium's folder"
        ) from None


def _flwr(control: Control, arguments: Sequence[str]) -> dict[str, object]:
    """Run `flwr supernode ...` and return what it prints as JSON; `FederationError` with its reason otherwise."""
    executable = Path(sys.executable).with_name("flwr")
    if not executable.exists():
        raise FederationError(
            f"{executable}: Flower's command is missing", fix="install Cohortium into this environment"
        )
    _require_ca(control)
    with tempfile.TemporaryDirectory(prefix="cohortium-flwr-") as home:
        connection = {"address": control.address, "root-certificates": str(control.ca.resolve())}
        lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in connection.items()]
        (Path(home) / "config.toml").write_text("\n".join([f"[superlink.{CONNECTION}]", *lines, ""]), encoding="utf-8")
        environment = os.environ | {
            "FLWR_HOME": home,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "NO_COLOR": "1",
        }
        try:
            done = subprocess.run(
                [str(executable), "supernode", *arguments, "--format", "json"],
                capture_output=True,
                text=True,
                encoding="utf-8",
                errors="replace",
                env=environment,
                cwd=home,
                stdin=subprocess.DEVNULL,
                timeout=control.timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise FederationError(
                f"{control.address}: the SuperLink did not answer within {control.timeout:g} s",
                fix=CHECK,
            ) from None
    try:
        answer = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        answer = {}
    if done.returncode == 0 and answer.get("success") is True:
        return answer
    said = str(answer.get("error-message") or done.stderr.strip() or done.stdout.strip() or "no reason given")
    said = " ".join(said.split()).removeprefix(f"Using SuperLink: {CONNECTION} ({control.address}) ")
    raise FederationError(f"{control.address}: `flwr supernode {arguments[0]}` failed: {said[:400]}", fix=CHECK)
