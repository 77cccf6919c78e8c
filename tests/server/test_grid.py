"""The grid with short waits, over a fake of what HttpGrid does on the wire."""

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from server.grid import (
    GRACE,
    MOST_OBJECTS,
    TOO_MANY_OBJECTS,
    UNREADABLE,
    QuickGrid,
    error_words,
    shorten_waits,
)


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


class Store:
    """What the SuperLink holds of replies, by the message they answer; `late` parts of them are not here yet."""

    def __init__(self, *replies: tuple[str, dict[str, bytes], ObjectTree]) -> None:
        self.announced = {request: tree for request, _, tree in replies}
        self.objects = {name: content for _, objects, _ in replies for name, content in objects.items()}
        self.late: set[str] = set()
        self.confirmed: list[str] = []

    def PullMessages(self, request: PullAppMessagesRequest) -> PullAppMessagesResponse:  # noqa: N802
        found = PullAppMessagesResponse()
        for identity in [i for i in request.message_ids if i in self.announced]:
            found.messages_list.add().metadata.reply_to_message_id = identity
            found.message_object_trees.append(self.announced.pop(identity))  # told once
        return found

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:  # noqa: N802
        content = self.objects.get(request.object_id)
        here = content is not None and request.object_id not in self.late
        return PullObjectResponse(
            object_found=content is not None, object_available=here, object_content=content or b""
        )

    def ConfirmMessageReceived(self, request: ConfirmMessageReceivedRequest) -> None:  # noqa: N802
        self.confirmed.append(request.message_object_id)


def reply_to(request: str, source: int, content: RecordDict | None = None) -> tuple[str, dict[str, bytes], ObjectTree]:
    """A reply whose own words name `source` as its sender, and another message than the one it answers."""
    about = Metadata(1, "", source, 1, f"{request}-not", "", 0.0, 60.0, "train.round")
    reply = make_message(about, content=content or RecordDict({"c": ConfigRecord({"x": source})}))
    about.__dict__["_message_id"] = reply.object_id
    with no_object_id_recompute():
        objects = {name: part.deflate() for name, part in get_all_nested_objects(reply).items()}
        return request, objects, get_object_tree(reply)


def garbage(request: str) -> tuple[str, dict[str, bytes], ObjectTree]:
    return request, {"root": b"Message  4\x00\xff\xff\xff\xff"}, ObjectTree(object_id="root")


def grid_over(store: Store, monkeypatch: pytest.MonkeyPatch) -> QuickGrid:
    """A grid whose messages to node n are sent as `n`."""
    grid = QuickGrid(token="t")
    monkeypatch.setattr(QuickGrid, "_runtime_client", store)
    monkeypatch.setattr(grid, "push_messages", lambda sent: [str(m.metadata.dst_node_id) for m in sent])
    monkeypatch.setattr(grid, "_run", SimpleNamespace(run_id=1))
    return grid


def test_a_reply_counts_for_the_node_that_was_asked_whatever_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(reply_to("3", source=4), reply_to("4", source=4))
    replies = grid_over(store, monkeypatch).send_and_receive([message(3), message(4)], timeout=5)
    found = {m.metadata.src_node_id: (m.metadata.reply_to_message_id, m.content["c"]["x"]) for m in replies}  # type: ignore[index]
    assert found == {3: ("3", 4), 4: ("4", 4)} and len(store.confirmed) == 2


def test_a_reply_that_is_not_here_whole_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, quick = reply_to("3", source=3), reply_to("4", source=4)
    store = Store(slow, quick)
    store.late = set(slow[1]) - set(quick[1])
    grid = grid_over(store, monkeypatch)
    started = time.monotonic()
    replies = grid.send_and_receive([message(3), message(4)], timeout=0.5)
    assert [m.metadata.src_node_id for m in replies] == [4] and time.monotonic() - started < 3
    assert set(store.confirmed) == {slow[2].object_id, quick[2].object_id}, "its parts are not kept"


def test_the_rest_of_a_reply_is_waited_for_until_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = reply_to("3", source=3)
    store = Store(slow)
    store.late = {slow[2].children[0].object_id}
    threading.Timer(0.4, store.late.clear).start()
    (found,) = grid_over(store, monkeypatch).send_and_receive([message(3)], timeout=5)
    assert found.content["c"]["x"] == 3  # type: ignore[index]


def test_what_is_no_message_is_an_error_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    many = RecordDict({f"c{number}": ConfigRecord({"x": number}) for number in range(MOST_OBJECTS)})
    no_message, objects, tree = reply_to("6", 6)
    store = Store(garbage("3"), reply_to("4", 4), reply_to("5", 5, many), (no_message, objects, tree.children[0]))
    store.announced["7"] = ObjectTree(object_id="given up by the SuperLink")
    asked = [message(number) for number in range(3, 8)]
    replies = grid_over(store, monkeypatch).send_and_receive(asked, timeout=5)
    errors = {m.metadata.src_node_id: m.error.code if m.has_error() else 0 for m in replies}
    assert errors == {3: UNREADABLE, 4: 0, 5: TOO_MANY_OBJECTS, 6: UNREADABLE, 7: UNREADABLE}
    assert "more parts" in error_words(TOO_MANY_OBJECTS) and error_words(8) == "Flower reports error 8"


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
