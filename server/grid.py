"""Flower's grid with short waits, and so that no site can hold up or end the round of the others.

HttpGrid asks for replies every 3 seconds, which dominates a short round. It waits for the parts of one reply as long as
its sender likes, ends the run on a reply that it cannot read, and believes the sender that a reply itself names.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
from flwr.app import Error, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.superlink.grid import HttpGrid

FIRST_WAIT, LONGEST_WAIT = 0.1, 1.0
HANDS = 2  # replies that are fetched at a time
# A message that nobody fetched in time must not be worked on later: it would cost a spend for a round that is over.
GRACE = 5.0
RETRY_SECONDS = 2.0
# A SuperLink that is killed may lose a message that it has taken. After this share of the time it is sent once more: a
# site answers the same request with the identical bytes and without a spend, and the first answer counts.
RESEND_AFTER = 1 / 3
# A reply of ours is 4 of Flower's objects: the message, its records, their header and the one document of its arrays.
MOST_OBJECTS = 8
# Error codes beside Flower's own, which end at 8.
UNREADABLE, TOO_MANY_OBJECTS = 1001, 1002
WORDS = {
    ErrorCode.NODE_UNAVAILABLE: "is not connected",
    UNREADABLE: "the reply cannot be read",
    TOO_MANY_OBJECTS: "the reply has more parts than a reply of this protocol",
}


def error_words(code: int) -> str:
    """What an error in place of a reply says, in fixed words: its own text may quote a site's data."""
    return WORDS.get(code, f"Flower reports error {code}")


@dataclass
class _Arriving:
    """A reply to the message `request` that was announced; `missing` are its objects that are not here yet."""

    request: str
    tree: ObjectTree
    missing: list[str]
    here: dict[str, bytes] = field(default_factory=dict)


def shorten_waits() -> None:
    """Objects of a reply are asked for again after 50 ms and not 1 s; without this seam rounds are slower, no more."""
    defaults = getattr(inflatable_utils.pull_objects, "__kwdefaults__", None)
    if defaults and "initial_backoff" in defaults:
        defaults["initial_backoff"] = 0.05


class QuickGrid(HttpGrid):
    """`send_and_receive` asks after 0.1 s, then less and less often, at most every second."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._arriving: dict[str, _Arriving] = {}
        # After an outage of the SuperLink Flower would wait up to 20 s between two attempts.
        invoker: Any = self._retry_invoker
        if hasattr(invoker, "wait_gen_factory"):
            factory = invoker.wait_gen_factory
            invoker.wait_gen_factory = lambda: (min(wait, RETRY_SECONDS) for wait in factory())

    def _connect(self) -> None:
        super()._connect()
        client: Any = self._client
        push, pull = client.PushObject, client.PullObject

        def push_once(request: PushObjectRequest) -> PushObjectResponse:
            """A SuperLink that was killed after it stored an object refuses the same one when it is sent again."""
            response = push(request)
            if not response.stored:
                again = PullObjectRequest(node=request.node, run_id=request.run_id, object_id=request.object_id)
                there = pull(again)
                if there.object_found and there.object_available:
                    return PushObjectResponse(stored=True)
            return response

        client.PushObject = push_once

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send, and return the replies that came within `timeout` seconds; each message lives as long.

        At most one message a node: who has not answered after a third of the time is sent his once more.
        """
        messages = list(messages)
        if len({message.metadata.dst_node_id for message in messages}) < len(messages):
            raise ValueError("expected at most one message a node")
        if timeout is not None:
            for message in messages:
                message.metadata.ttl = min(message.metadata.ttl, timeout + GRACE)
        # None stands for a message that the SuperLink did not take, to a node that is gone for instance.
        open_ = {identity: m for identity, m in zip(self.push_messages(messages), messages, strict=True) if identity}
        started = time.monotonic()
        replies: list[Message] = []
        resend_at = float("inf") if timeout is None else timeout * RESEND_AFTER
        while open_:
            first: dict[int, Message] = {}
            for reply in self.pull_messages(open_):
                # The node that was asked; whom the reply itself names as its sender, the site has written there.
                node = open_[reply.metadata.reply_to_message_id].metadata.dst_node_id
                reply.metadata.__dict__["_src_node_id"] = node
                first.setdefault(node, reply)
            replies += first.values()
            open_ = {identity: m for identity, m in open_.items() if m.metadata.dst_node_id not in first}
            elapsed = time.monotonic() - started
            if timeout is not None and elapsed >= timeout:
                break
            if open_ and elapsed >= resend_at:
                resend_at = float("inf")
                again = [_again(message, message.metadata.ttl - elapsed) for message in open_.values()]
                open_ |= {i: m for i, m in zip(self.push_messages(again), again, strict=True) if i}
            if open_:
                left = float("inf") if timeout is None else timeout - elapsed
                time.sleep(min(left, LONGEST_WAIT, max(FIRST_WAIT, elapsed / 10)))
        for late in self._arriving.values():  # what is here of them leaves the SuperLink's database, the rest stays out
            with contextlib.suppress(httpx.HTTPError):
                self._confirm(late)
        self._arriving.clear()
        return replies

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to these messages that are here whole; never waits for the parts of one that is not.

        One that cannot be read is an error in its place. What a reply says it answers is what the SuperLink checked.
        """
        wanted = set(message_ids)
        self._arriving = {request: reply for request, reply in self._arriving.items() if request in wanted}
        wanted -= self._arriving.keys()
        if wanted:  # who was announced once is not announced again
            found = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=wanted))
            for message, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                request = message.metadata.reply_to_message_id
                if request in wanted:
                    self._arriving[request] = _Arriving(request, tree, [t.object_id for t in iterate_object_tree(tree)])
        arriving = list(self._arriving.values())
        with ThreadPoolExecutor(HANDS) as hands:
            whole = [reply for reply, done in zip(arriving, hands.map(self._gather, arriving), strict=True) if done]
        for reply in whole:
            del self._arriving[reply.request]
        return [_read(reply) for reply in whole]

    def _gather(self, reply: _Arriving) -> bool:
        """Fetch what is here of a reply; whether there is nothing more to wait for."""
        assert self._run is not None
        while reply.missing and len(reply.missing) + len(reply.here) <= MOST_OBJECTS:
            request = PullObjectRequest(node=self.node, run_id=self._run.run_id, object_id=reply.missing[0])
            answer = self._runtime_client.PullObject(request)
            if not answer.object_found:  # given up by the SuperLink: it will never come
                break
            if not answer.object_available:
                return False
            reply.here[reply.missing.pop(0)] = answer.object_content
        self._confirm(reply)
        return True

    def _confirm(self, reply: _Arriving) -> None:
        """The SuperLink deletes the reply's objects, and takes no more of them."""
        assert self._run is not None
        self._runtime_client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self.node, run_id=self._run.run_id, message_object_id=reply.tree.object_id
            )
        )


def _read(reply: _Arriving) -> Message:
    """The reply as a message that answers `reply.request`, whatever else it says."""
    if len(reply.missing) + len(reply.here) > MOST_OBJECTS:
        return _error(TOO_MANY_OBJECTS, reply.request)
    try:
        message = inflatable_utils.inflate_object_from_contents(reply.tree.object_id, reply.here)
        if not isinstance(message, Message) or not (message.has_error() or isinstance(message.content, RecordDict)):
            return _error(UNREADABLE, reply.request)
    except Exception:  # whatever Flower makes of hostile bytes, the others' study goes on
        return _error(UNREADABLE, reply.request)
    message.metadata.__dict__ |= {"_message_id": reply.tree.object_id, "_reply_to_message_id": reply.request}
    return message


def _error(code: int, request: str) -> Message:
    about = Metadata(0, "", 0, 0, request, "", time.time(), 0.0, SYSTEM_MESSAGE_TYPE)
    return make_message(about, error=Error(code, ""))


def _again(message: Message, ttl: float) -> Message:
    """The same content to the same node, as a message of its own."""
    about = message.metadata
    return Message(message.content, about.dst_node_id, about.message_type, ttl=ttl)
