"""flower-superlink with two listeners: all APIs on loopback, and for the sites the Fleet API and nothing else.

Open-source Flower authenticates its Control API not at all: whoever reaches it can start runs and register nodes. So
the port that hospitals reach serves exactly the paths of the Fleet API, whose every request a node's key has signed. If
Flower starts its SuperLink in another way than this module knows, it refuses to start.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from types import SimpleNamespace
from typing import Any

import uvicorn

from common.errors import FederationError
from server.held import Announcing, Held, ask_and_hold, replay
from server.processes import end_with_parent, quiet_routine, split_address, use_json_logs

FLEET = "/v1/fleet/"
PULL_MESSAGES = "/v1/fleet/pull-messages"
PUSH_MESSAGES = "/v1/fleet/push-messages"
PUSH_OBJECT = "/v1/fleet/push-object"
LARGEST_REQUEST = 8 << 20
# What announces a reply names its objects and holds none; the SuperLink makes a row of its database for each.
LARGEST_ANNOUNCEMENT = 64 << 10
BODY_SECONDS = 120.0
# A connection that is closed on unread data is reset: the sender hears no 413, and Flower's SuperNode tries for ever.
MOST_DISCARDED, QUIET_SECONDS = 512 << 20, 1.0
MOST_CONNECTIONS = 2000
KEY_HEADER = b"flwr-public-key"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class TooLargeError(Exception):
    """A request exceeds what a site may send."""


class FleetOnly:
    """What the sites reach: an ASGI application that passes on well-formed requests to `paths` and answers 404 else.

    A request has at most LARGEST_REQUEST bytes. The objects that a node sends for one message that it was given have at
    most `reply_bytes`, however often it announces a reply, and be they one or many; only what Flower took, whose
    signature therefore held, is counted against a key, and only such a key may send an object of that size.
    """

    def __init__(self, app: App, paths: frozenset[str], reply_bytes: int, held: Held) -> None:
        self.app = app
        self.held = held
        self.paths = paths
        self.reply_bytes = reply_bytes
        self._sent: dict[bytes, int] = {}
        self._known: set[bytes] = set()
        self._given: set[bytes] = set()  # nodes that were given a message since they last announced a reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            return
        path = str(scope["path"])
        # Exact, and as it stood on the wire: no percent-encoding, no dots, no query that anything could interpret.
        plain = scope.get("raw_path", b"") == path.encode("utf-8", "replace") and not scope.get("query_string")
        if path not in self.paths or scope["method"] != "POST" or not plain:
            await _answer(send, 404)
            return
        headers = dict(scope["headers"])
        node = headers.get(KEY_HEADER, b"")
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _read(headers, receive, self._limit(path, node))
        except TooLargeError:
            await _discard(receive)
            await _answer(send, 413)
            return
        except (TimeoutError, ConnectionError):
            await _answer(send, 408)
            return
        size = len(body) if path == PUSH_OBJECT else 0
        if size and self._sent.get(node, 0) + size > self.reply_bytes:
            await _answer(send, 413)
            return
        counted = self._counting(send, node, path, size)
        if path == PULL_MESSAGES:
            await ask_and_hold(self.app, self.held, scope, body, receive, counted)
            return
        await self.app(scope, replay(body, receive), counted)

    def _limit(self, path: str, node: bytes) -> int:
        """The most bytes of one request."""
        if path == PUSH_MESSAGES:
            return LARGEST_ANNOUNCEMENT
        return (
            max(LARGEST_REQUEST, self.reply_bytes) if path == PUSH_OBJECT and node in self._known else LARGEST_REQUEST
        )

    def _counting(self, send: Send, node: bytes, path: str, size: int) -> Send:
        taken = False

        async def counted(event: MutableMapping[str, Any]) -> None:
            nonlocal taken
            if event["type"] == "http.response.start" and event["status"] < 400:
                taken = True
                self._known.add(node)
                if path == PUSH_MESSAGES and node in self._given:
                    self._given.remove(node)
                    self._sent[node] = 0
                elif path == PUSH_OBJECT:
                    self._sent[node] = self._sent.get(node, 0) + size
            elif taken and path == PULL_MESSAGES and event.get("body"):  # the answer that there is none is empty
                self._given.add(node)
            await send(event)

        return counted


async def _read(headers: dict[bytes, bytes], receive: Receive, limit: int) -> bytes:
    """The whole body; `TooLargeError` as soon as it exceeds `limit` bytes, `ConnectionError` if it breaks off."""
    declared = headers.get(b"content-length", b"0")
    if not declared.isdigit() or int(declared) > limit:
        raise TooLargeError
    body = bytearray()
    while True:
        event = await receive()
        if event["type"] != "http.request":
            raise ConnectionError
        body += event.get("body", b"")
        if len(body) > limit:
            raise TooLargeError
        if not event.get("more_body", False):
            return bytes(body)


async def _discard(receive: Receive) -> None:
    """Read on for a while and keep nothing, so that the sender hears the answer."""
    left = MOST_DISCARDED
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(BODY_SECONDS):
            while left > 0:
                event = await asyncio.wait_for(receive(), QUIET_SECONDS)
                if event["type"] != "http.request" or not event.get("more_body", False):
                    return
                left -= len(event.get("body", b""))


async def _answer(send: Send, status: int) -> None:
    headers = [(b"connection", b"close"), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


class _Second(uvicorn.Server):
    """A server beside another one, which hears the signals for both."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def fleet_paths(app: Any) -> frozenset[str]:
    """Every path of the Fleet API; `FederationError` if they are not where Flower 1.41 has them."""
    from fastapi.routing import iter_route_contexts

    found = {str(getattr(context.route, "path", "")) for context in iter_route_contexts(app.routes)}
    paths = frozenset(path for path in found if path.startswith(FLEET) and "{" not in path)
    if not {PULL_MESSAGES, PUSH_MESSAGES, PUSH_OBJECT} <= paths:
        raise _unknown_flower("its Fleet API has other paths")
    return paths


def require_seam() -> Any:
    """The module of flower-superlink; `FederationError` if this Flower starts its SuperLink in another way."""
    try:
        import flwr.superlink.cli.flower_superlink  # noqa: F401 - the package has a function of the same name

        module = sys.modules["flwr.superlink.cli.flower_superlink"]
        starts = inspect.getsource(module._run_superlink_http_api).count("uvicorn.run(")
        from fastapi.routing import iter_route_contexts  # noqa: F401
    except (ImportError, KeyError, AttributeError, OSError) as error:
        raise _unknown_flower(type(error).__name__) from None
    if getattr(module, "uvicorn", None) is not uvicorn or starts != 1 or not hasattr(module, "flower_superlink"):
        raise _unknown_flower("it does not serve through uvicorn.run")
    if not hasattr(uvicorn.Server, "capture_signals"):
        raise _unknown_flower("uvicorn handles signals differently")
    return module


def _unknown_flower(reason: str) -> FederationError:
    return FederationError(
        f"this version of Flower starts its SuperLink differently ({reason}); it is not exposed to the sites",
        fix="install the versions that Cohortium pins (flwr 1.41)",
    )


def bind(address: str) -> socket.socket:
    """A bound socket; `FederationError` naming the address if it is taken or not of this machine."""
    host, port = split_address(address)
    found: socket.socket | None = None
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(where)
    except OSError as error:
        if found is not None:
            found.close()
        raise FederationError(
            f"{address}: cannot be listened on ({error.strerror or error})",
            fix="choose a free port and an address of this machine; below 1024 the service needs the right to bind it",
        ) from None
    return found


def serve(app: Any, public: str, reply_bytes: int, options: dict[str, Any]) -> None:
    """Serve `app` on the private address of `options`, and its Fleet API on `public`, until a signal ends both."""
    host = options.pop("host")
    private = f"[{host}]:{options.pop('port')}" if ":" in host else f"{host}:{options.pop('port')}"
    for name in ("reload", "workers"):
        options.pop(name, None)
    common = options | {"access_log": False, "proxy_headers": False, "timeout_graceful_shutdown": 3}
    held = Held()
    private_app: Any = Announcing(app, held)
    gate: Any = FleetOnly(app, fleet_paths(app), reply_bytes, held)
    inner = uvicorn.Server(uvicorn.Config(private_app, **common))
    outer = _Second(uvicorn.Config(gate, lifespan="off", limit_concurrency=MOST_CONNECTIONS, **common))
    sockets = bind(private), bind(public)
    if asyncio.run(_both(inner, outer, sockets, held)):
        sys.exit(1)


async def _both(
    inner: uvicorn.Server, outer: uvicorn.Server, sockets: tuple[socket.socket, socket.socket], held: Held
) -> bool:
    """Run until either ends, then end both; whether one of them ended by itself."""
    tasks = [asyncio.create_task(inner.serve([sockets[0]]))]
    while not inner.started and not tasks[0].done():
        await asyncio.sleep(0.02)
    if not tasks[0].done():
        tasks.append(asyncio.create_task(outer.serve([sockets[1]])))
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    failed = not inner.should_exit
    inner.should_exit = outer.should_exit = True
    held.close()
    await asyncio.gather(*tasks)
    return failed


def main(public: str, reply_bytes: int, arguments: list[str], *, json_logs: bool) -> None:
    """Run flower-superlink with `arguments` and the second listener `public`."""
    module = require_seam()
    quiet_routine()
    if json_logs:
        use_json_logs()

    def run(app: Any, **options: Any) -> None:
        if json_logs:
            options["log_config"] = None
        serve(app, public, reply_bytes, options)

    module.uvicorn = SimpleNamespace(run=run)
    sys.argv = ["flower-superlink", *arguments]
    module.flower_superlink()


if __name__ == "__main__":
    end_with_parent()
    main(sys.argv[1], int(sys.argv[2]), sys.argv[4:], json_logs=sys.argv[3] == "json")
