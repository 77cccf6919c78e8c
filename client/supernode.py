"""flower-supernode, wrapped: quick waits, a goodbye for a predecessor that was killed, and word of the last contact.

    python -P -m client.supernode --contact FILE FLAGS-OF-FLOWER-SUPERNODE

The waits are patched in Flower's module; where an upgrade moves them this is slower, not unsafe. FILE is JSON with the
node's id and the time of the last answer of the SuperLink.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from client.worker import end_with_parent

POLL = 0.1  # seconds between questions while messages come; a quarter of the quiet time after that, as Flower at most
HELD = 1.0  # an empty answer that took so long was held back until there would be something: no reason to wait as well
CONTACT_EVERY = 3.0


class Contact:
    """The file with node id and last contact."""

    def __init__(self, path: Path) -> None:
        self._path, self._written = path, 0.0
        self.node: int | None = read_contact(path).get("node")

    def seen(self, node: int | None = None) -> None:
        """The SuperLink has answered just now."""
        new = node is not None and node != self.node
        self.node = node if node is not None else self.node
        if not new and time.monotonic() - self._written < CONTACT_EVERY:
            return
        self._written = time.monotonic()
        temporary = self._path.with_suffix(".new")
        try:
            temporary.write_text(json.dumps({"node": self.node, "time": time.time()}))
            temporary.replace(self._path)
        except OSError:  # a full disk stops no training
            with contextlib.suppress(OSError):
                os.utime(self._path)


def read_contact(path: Path) -> dict[str, Any]:
    """Node id and time of the last contact, as far as they are known."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return {"node": int(document["node"]), "time": float(document["time"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


class Waits:
    """Stands for the module `time` inside Flower's loop: short waits while messages come, Flower's own when idle."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def busy(self) -> None:
        """A message came or went."""
        self.last = time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Sleep for no longer than asked."""
        time.sleep(min(seconds, max(POLL, 0.25 * (time.monotonic() - self.last))))


def patch(module: ModuleType) -> None:
    """Quick waits in flwr.supernode.start_client_internal."""
    from flwr.supercore.inflatable import inflatable_utils

    defaults = getattr(inflatable_utils.pull_objects, "__kwdefaults__", None)
    if defaults and "initial_backoff" in defaults:
        defaults["initial_backoff"] = 0.05
    waits = Waits()
    if getattr(module, "time", None) is time:
        module.time = waits  # type: ignore[attr-defined]

    pull = getattr(module, "_pull_and_store_message", None)
    if pull is not None:

        @functools.wraps(pull)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.monotonic()
            run = pull(*args, **kwargs)
            if run is not None or time.monotonic() - started >= HELD:
                waits.busy()
            return run

        module._pull_and_store_message = timed  # type: ignore[attr-defined]
    after(module, "_push_messages", lambda _: waits.busy())


def watch(client: type, contact: Contact) -> None:
    """Tell `contact` of every answer of the SuperLink to flwr.supernode.fleet_http_client.FleetHttpClient."""
    after(client, "ActivateNode", lambda response: contact.seen(int(response.node_id)))
    after(client, "PullMessages", lambda _: contact.seen())
    after(client, "SendNodeHeartbeat", lambda _: contact.seen())


def end_without_heartbeat(sender: type) -> None:
    """End the process when the thread of flwr.supercore.heartbeat.HeartbeatSender dies of an error.

    It does at an HTTP 500, as of a SuperLink whose disk is full. The SuperLink would soon count the node as gone, while
    its other requests went on, so that nobody noticed. Whoever started the process starts it again.
    """
    run = getattr(sender, "_run", None)
    if run is None:
        return

    @functools.wraps(run)
    def watched(self: Any) -> None:
        try:
            run(self)
        except Exception:
            os.kill(os.getpid(), signal.SIGTERM)
            raise

    sender._run = watched  # type: ignore[attr-defined]


def after(owner: object, name: str, then: Callable[[Any], None]) -> None:
    """Call `then` with the result of every call of `owner.name` that returned; nothing if there is no such name."""
    original = getattr(owner, name, None)
    if original is None:
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        then(result)
        return result

    setattr(owner, name, wrapped)


def deactivate(superlink: str, ca: Path, key: Path, node: int) -> bool:
    """Say goodbye for a predecessor that was killed; the SuperLink would refuse this start for up to a minute.

    False if the SuperLink does not know the key.
    """
    import httpx
    from cryptography.hazmat.primitives.asymmetric import ec
    from flwr.proto.fleet_pb2 import DeactivateNodeRequest
    from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    from common.keys import NODE_KEY, load_p384

    private = load_p384(key, NODE_KEY)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    interceptors = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        NodeAuthHttpInterceptor(private, private.public_key()),
    ]
    try:
        with FleetHttpClient.from_server_address(
            superlink, False, ca.read_bytes(), interceptors=interceptors
        ) as client:
            client.DeactivateNode(DeactivateNodeRequest(node_id=node))
    except httpx.HTTPStatusError as error:
        return error.response.status_code != httpx.codes.UNAUTHORIZED
    except (httpx.HTTPError, RuntimeError, OSError):
        return True  # it was not online, or Flower's own start will say what is wrong
    return True


def main() -> None:
    """Entry point of the process."""
    arguments = sys.argv[1:]
    if arguments[:1] != ["--contact"] or len(arguments) < 2:
        sys.exit("usage: client.supernode --contact FILE FLAGS-OF-FLOWER-SUPERNODE")
    contact, flags = Contact(Path(arguments[1])), arguments[2:]
    end_with_parent(lambda: os.kill(os.getpid(), signal.SIGTERM))
    given = dict(itertools.pairwise(flags))
    if contact.node is not None:
        ca, key = Path(given["--root-certificates"]), Path(given["--auth-supernode-private-key"])
        if not deactivate(given["--superlink"], ca, key, contact.node):
            print(json.dumps({"event": "key-refused"}), flush=True)
    import flwr.supernode.start_client_internal  # noqa: F401
    from flwr.supercore.heartbeat import HeartbeatSender
    from flwr.supernode.cli import flower_supernode
    from flwr.supernode.fleet_http_client import FleetHttpClient

    patch(sys.modules["flwr.supernode.start_client_internal"])
    end_without_heartbeat(HeartbeatSender)
    watch(FleetHttpClient, contact)
    sys.argv = ["flower-supernode", *flags]
    flower_supernode()
    # It returns when its connection broke for good, after a failed handshake for instance; its own API would live on.
    print(json.dumps({"event": "connection-lost"}), flush=True)
    os._exit(1)


if __name__ == "__main__":
    main()
