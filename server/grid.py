"""Flower's grid with short waits: HttpGrid asks for replies every 3 seconds, which dominates a short round."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from flwr.app import Message
from flwr.proto.message_pb2 import PullObjectRequest, PushObjectRequest, PushObjectResponse
from flwr.supercore.inflatable import inflatable_utils
from flwr.superlink.grid import HttpGrid

FIRST_WAIT, LONGEST_WAIT = 0.1, 1.0
# A message that nobody fetched in time must not be worked on later: it would cost a spend for a round that is over.
GRACE = 5.0
RETRY_SECONDS = 2.0
# A SuperLink that is killed may lose a message that it has taken. After this share of the time it is sent once more: a
# site answers the same request with the identical bytes and without a spend, and the first answer counts.
RESEND_AFTER = 1 / 3


def shorten_waits() -> None:
    """Objects of a reply are asked for again after 50 ms and not 1 s; without this seam rounds are slower, no more."""
    defaults = getattr(inflatable_utils.pull_objects, "__kwdefaults__", None)
    if defaults and "initial_backoff" in defaults:
        defaults["initial_backoff"] = 0.05


class QuickGrid(HttpGrid):
    """`send_and_receive` asks after 0.1 s, then less and less often, at most every second."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
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
            arrived = list(self.pull_messages(open_))
            first = {open_[m.metadata.reply_to_message_id].metadata.dst_node_id: m for m in reversed(arrived)}
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
        return replies


def _again(message: Message, ttl: float) -> Message:
    """The same content to the same node, as a message of its own."""
    about = message.metadata
    return Message(message.content, about.dst_node_id, about.message_type, ttl=ttl)
