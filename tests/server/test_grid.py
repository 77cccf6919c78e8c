"""The grid with short waits, over a fake of what HttpGrid does on the wire."""

import time
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse, PushObjectRequest, PushObjectResponse
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from server.grid import GRACE, QuickGrid, shorten_waits


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class Wire(QuickGrid):
    """Messages to node n are answered n/10 s after the first was sent; node 9 never answers, node 8 cannot be sent to.

    The first message to node 7 is lost.
    """

    def __init__(self) -> None:
        super().__init__(token="t")
        self.sent: dict[str, Message] = {}
        self.began, self.pulls = 0.0, 0

    def push_messages(self, messages: Any) -> Any:
        self.began = self.began or time.monotonic()
        identities: list[str | None] = []
        for message in messages:
            node = message.metadata.dst_node_id
            identity = f"id{node}" if f"id{node}" not in self.sent else f"id{node}-again"
            identities.append(identity if node != 8 else None)
            self.sent |= {identity: message} if node != 8 else {}
        return identities

    def pull_messages(self, message_ids: Any) -> Any:
        self.pulls += 1
        elapsed, replies = time.monotonic() - self.began, []
        for identity in message_ids:
            node = self.sent[identity].metadata.dst_node_id
            if node != 9 and identity != "id7" and elapsed >= node / 10:
                self.sent[identity].metadata.__dict__["_message_id"] = identity
                replies.append(Message(RecordDict(), reply_to=self.sent[identity]))
        return replies


def message(node: int) -> Message:
    return Message(RecordDict({"c": ConfigRecord({"x": 1})}), node, "train.round")


def test_replies_are_returned_as_soon_as_all_are_here() -> None:
    wire = Wire()
    started = time.monotonic()
    replies = wire.send_and_receive([message(1), message(3)], timeout=20)
    assert len(replies) == 2 and time.monotonic() - started < 1.0


def test_a_node_that_never_answers_costs_the_timeout_and_not_the_others() -> None:
    wire = Wire()
    started = time.monotonic()
    replies = wire.send_and_receive([message(1), message(9)], timeout=0.8)
    assert [reply.metadata.reply_to_message_id for reply in replies] == ["id1"]
    assert 0.7 < time.monotonic() - started < 1.5


def test_a_node_that_cannot_be_sent_to_is_not_waited_for() -> None:
    started = time.monotonic()
    assert Wire().send_and_receive([message(8)], timeout=5) == [] and time.monotonic() - started < 0.5


def test_a_message_that_was_lost_is_sent_once_more() -> None:
    wire = Wire()
    lost = message(7)
    replies = wire.send_and_receive([message(1), lost, message(9)], timeout=1.2)
    assert sorted(reply.metadata.reply_to_message_id for reply in replies) == ["id1", "id7-again"]
    assert set(wire.sent) == {"id1", "id7", "id7-again", "id9", "id9-again"}, "and who has answered is not asked again"
    again = wire.sent["id7-again"]
    assert again is not lost and again.content == lost.content and again.metadata.ttl < lost.metadata.ttl


def test_a_node_is_sent_one_message_at_a_time() -> None:
    with pytest.raises(ValueError, match="one message a node"):
        Wire().send_and_receive([message(1), message(1)], timeout=1)


def test_a_reply_that_came_just_before_the_deadline_counts() -> None:
    assert len(Wire().send_and_receive([message(4)], timeout=0.45)) == 1


def test_it_asks_less_and_less_often() -> None:
    wire = Wire()
    wire.send_and_receive([message(9)], timeout=3.0)
    assert wire.pulls < 25


def test_a_message_lives_as_long_as_it_is_waited_for() -> None:
    first, forever = message(1), message(1)
    before = forever.metadata.ttl
    Wire().send_and_receive([first], timeout=0.3)
    Wire().send_and_receive([forever])
    assert first.metadata.ttl == 0.3 + GRACE and forever.metadata.ttl == before


def test_an_object_that_the_superlink_stored_before_it_was_killed_counts_as_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored = {"old": b"content", "begun": b""}

    class Client:
        def PushObject(self, request: PushObjectRequest) -> PushObjectResponse:  # noqa: N802
            return PushObjectResponse(stored=request.object_id == "new")

        def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:  # noqa: N802
            content = stored.get(request.object_id)
            return PullObjectResponse(object_found=content is not None, object_available=bool(content))

    monkeypatch.setattr(HttpGrid, "_connect", lambda self: setattr(self, "_client", Client()))
    client = QuickGrid(token="t")._runtime_client
    taken = {name: client.PushObject(PushObjectRequest(object_id=name)).stored for name in ("new", "old", "begun", "x")}
    assert taken == {"new": True, "old": True, "begun": False, "x": False}


def test_the_seam_by_which_waits_are_shortened_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = dict(inflatable_utils.pull_objects.__kwdefaults__ or {})
    monkeypatch.setattr(inflatable_utils.pull_objects, "__kwdefaults__", defaults)
    shorten_waits()
    assert defaults["initial_backoff"] == 0.05
    waits = [wait for wait, _ in zip(QuickGrid(token="t")._retry_invoker.wait_gen_factory(), range(8), strict=False)]
    assert max(waits) <= 2.0
