"""Questions of the sites that wait at the SuperLink for their answer, instead of being asked again and again.

A SuperNode asks `pull-messages` until there is something. Flower answers at once, mostly with nothing, and each answer
costs a signature to verify and a transaction: with many sites that is most of what the SuperLink does. So an empty
answer is held back for up to HOLD_SECONDS, and Flower is asked again as soon as the coordinator has sent that node a
message with all of its objects. Only what Flower took is held: its first answer has verified the node's signature. If
nothing is ever announced here, a site hears of a message when the wait is over: later, no more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HOLD_SECONDS = 10.0  # SuperNodes wait 30 s for an answer
M = TypeVar("M", bound=Message)
SEND_MESSAGES = "/v1/runtime/push-messages"
SEND_OBJECT = "/v1/runtime/push-object"


class Held:
    """Who waits for a message, and for which objects the message to a node still waits."""

    def __init__(self, seconds: float = HOLD_SECONDS) -> None:
        self._seconds = seconds
        self._waiting: dict[int, asyncio.Future[bool]] = {}
        self._sent: dict[int, int] = {}  # messages announced to a node
        self._missing: dict[int, set[str]] = {}
        self._closed = False

    def announce(self, trees: Iterable[tuple[int, set[str]]], missing: set[str]) -> None:
        """The coordinator sent messages: node and object ids of each, and which objects are still to come."""
        for node, objects in trees:
            self._missing[node] = objects & missing
        self._tell_complete()

    def arrived(self, object_id: str) -> None:
        """An object of the coordinator is there."""
        for objects in self._missing.values():
            objects.discard(object_id)
        self._tell_complete()

    def close(self) -> None:
        """Answer everybody now, and hold nobody any more."""
        self._closed = True
        for waiting in self._waiting.values():
            _settle(waiting, False)

    def mark(self, node: int) -> int:
        """To be given to `news`; taken before Flower is asked, so that nothing in between is missed."""
        return self._sent.get(node, 0)

    async def news(self, node: int, mark: int, receive: Receive) -> bool | None:
        """Wait. True: ask Flower again; False: there is nothing; None: whoever asked is gone.

        One question a node waits: a later one takes its place, so that a node holds no more than it could use.
        """
        if self._sent.get(node, 0) != mark:
            return True
        if self._closed:
            return False
        told: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        before = self._waiting.get(node)
        if before is not None:
            _settle(before, False)
        self._waiting[node] = told
        gone = asyncio.ensure_future(receive())  # the body has been read: all that can come is the end
        try:
            await asyncio.wait({told, gone}, timeout=self._seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone_first = gone.done()
            gone.cancel()
            if self._waiting.get(node) is told:
                del self._waiting[node]
        if gone_first:
            return None
        return told.result() if told.done() else False

    def _tell_complete(self) -> None:
        for node in [node for node, objects in self._missing.items() if not objects]:
            del self._missing[node]
            self._sent[node] = self._sent.get(node, 0) + 1
            if node in self._waiting:
                _settle(self._waiting[node], True)


async def ask_and_hold(app: App, held: Held, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
    """Answer one `pull-messages` with that body, later if there is nothing yet."""
    from flwr.proto.fleet_pb2 import PullMessagesRequest

    request = _parsed(PullMessagesRequest(), body)
    mark = held.mark(request.node.node_id) if request else 0
    answer = await _answer(app, scope, body, receive)
    if request and answer.empty:
        news = await held.news(request.node.node_id, mark, receive)
        if news is None:  # not to be asked again: Flower would take a message for delivered
            return
        if news:
            answer = await _answer(app, scope, body, receive)
    for event in answer.events:
        await send(event)


class Announcing:
    """The SuperLink for the coordinator's own processes: what they send to the sites is announced to `held`."""

    def __init__(self, app: App, held: Held) -> None:
        self.app, self.held = app, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or scope["path"] not in (SEND_MESSAGES, SEND_OBJECT):
            await self.app(scope, receive, send)
            return
        body = bytearray()
        answer = _Answer()

        async def overheard() -> Event:
            event = await receive()
            if event["type"] == "http.request":
                body.extend(event.get("body", b""))
            return event

        async def sent(event: Event) -> None:
            await answer.take(event)
            await send(event)

        await self.app(scope, overheard, sent)
        if answer.status == 200:
            self._announce(str(scope["path"]), bytes(body), bytes(answer.body))

    def _announce(self, path: str, body: bytes, answered: bytes) -> None:
        from flwr.proto.message_pb2 import PushObjectRequest
        from flwr.proto.runtime_pb2 import PushAppMessagesRequest, PushAppMessagesResponse
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

        if path == SEND_OBJECT:
            request = _parsed(PushObjectRequest(), body)
            if request:
                self.held.arrived(request.object_id)
            return
        request, response = _parsed(PushAppMessagesRequest(), body), _parsed(PushAppMessagesResponse(), answered)
        if request and response:
            trees = [
                (message.metadata.dst_node_id, {part.object_id for part in iterate_object_tree(tree)})
                for message, tree in zip(request.messages_list, request.message_object_trees, strict=False)
            ]
            self.held.announce(trees, set(response.objects_to_push))


class _Answer:
    """An answer of the application behind."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.status = 0
        self.body = bytearray()

    async def take(self, event: Event) -> None:
        self.events.append(event)
        self.status = event.get("status", self.status)
        self.body += event.get("body", b"")

    @property
    def empty(self) -> bool:
        return self.status == 200 and not self.body


async def _answer(app: App, scope: Scope, body: bytes, receive: Receive) -> _Answer:
    answer = _Answer()
    # Starlette writes into the scope.
    await app({**scope, "state": dict(scope.get("state", {}))}, replay(body, receive), answer.take)
    return answer


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, then whatever comes."""
    given = False

    async def replayed() -> Event:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _parsed(message: M, data: bytes) -> M | None:
    try:
        message.ParseFromString(data)
    except DecodeError:
        return None
    return message


def _settle(future: asyncio.Future[bool], value: bool) -> None:
    if not future.done():
        future.set_result(value)
