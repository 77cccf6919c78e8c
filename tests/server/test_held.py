"""Questions that wait at the SuperLink: when they are answered, and what they may never cost a site."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree, PushObjectRequest, PushObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PushAppMessagesRequest, PushAppMessagesResponse

from server.held import SEND_MESSAGES, SEND_OBJECT, Announcing, Held, ask_and_hold

SHORT, LONG = 0.05, 30.0
TREE = ObjectTree(object_id="m", children=[ObjectTree(object_id="a"), ObjectTree(object_id="b")])
FULL = PullMessagesResponse(messages_list=[Message(metadata=Metadata(dst_node_id=7))]).SerializeToString()


class Flower:
    """The application behind: a message for node 7 once it was pushed, with the objects that it still wants."""

    def __init__(self, wanted: tuple[str, ...] = (), status: int = 200) -> None:
        self.wanted, self.status = wanted, status
        self.asked, self.has_message = 0, False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        scope["state"]["left behind"] = True
        answer = b""
        if scope["path"] == SEND_MESSAGES:
            self.has_message = PushAppMessagesRequest.FromString(body).messages_list[0].metadata.dst_node_id == 7
            answer = PushAppMessagesResponse(objects_to_push=self.wanted).SerializeToString()
        elif scope["path"] == SEND_OBJECT:
            answer = PushObjectResponse(stored=True).SerializeToString()
        else:
            self.asked += 1
            answer = FULL if self.has_message else b""
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": answer})


class Site:
    """One question of node 7 and what became of it."""

    def __init__(self, flower: Flower, held: Held, body: bytes | None = None) -> None:
        self.got: list[Any] = []
        self.left = asyncio.Event()
        question = PullMessagesRequest(node=Node(node_id=7)).SerializeToString() if body is None else body
        scope = {"type": "http", "path": "/v1/fleet/pull-messages", "state": {}}
        self.task = asyncio.ensure_future(ask_and_hold(flower, held, scope, question, self.receive, self.send))

    async def receive(self) -> Any:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, event: Any) -> None:
        self.got.append(event)

    async def answer(self) -> bytes | None:
        """The body that came, None if nothing was sent."""
        await asyncio.wait_for(self.task, 10)
        return b"".join(event.get("body", b"") for event in self.got) if self.got else None


async def push(flower: Flower, held: Held, path: str, message: Any) -> None:
    async def receive() -> Any:
        return {"type": "http.request", "body": message.SerializeToString(), "more_body": False}

    async def send(event: Any) -> None:
        pass

    await Announcing(flower, held)({"type": "http", "path": path, "state": {}}, receive, send)


async def push_message(flower: Flower, held: Held, node: int = 7) -> None:
    message = Message(metadata=Metadata(dst_node_id=node))
    request = PushAppMessagesRequest(messages_list=[message], message_object_trees=[TREE])
    await push(flower, held, SEND_MESSAGES, request)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test(), 20)

    asyncio.run(bounded())


def test_an_empty_answer_comes_after_the_wait_and_flower_is_asked_once() -> None:
    async def test() -> None:
        flower = Flower()
        assert await Site(flower, Held(SHORT)).answer() == b"" and flower.asked == 1

    run(test)


def test_a_message_answers_who_waits_for_it() -> None:
    async def test() -> None:
        flower, held = Flower(), Held(LONG)
        site = Site(flower, held)
        await asyncio.sleep(SHORT)
        assert not site.task.done()
        await push_message(flower, held)
        assert await site.answer() == FULL and flower.asked == 2

    run(test)


def test_a_message_counts_once_all_of_its_objects_are_there() -> None:
    async def test() -> None:
        flower, held = Flower(wanted=("a", "b", "of another message")), Held(LONG)
        site = Site(flower, held)
        await asyncio.sleep(SHORT)
        await push_message(flower, held)
        for name in ("b", "a"):
            await asyncio.sleep(SHORT)
            assert not site.task.done() and flower.asked == 1
            await push(flower, held, SEND_OBJECT, PushObjectRequest(object_id=name))
        assert await site.answer() == FULL

    run(test)


def test_a_message_to_another_node_wakes_nobody_else() -> None:
    async def test() -> None:
        flower, held = Flower(), Held(5 * SHORT)
        site = Site(flower, held)
        await asyncio.sleep(SHORT)
        await push_message(flower, held, node=8)
        assert await site.answer() == b"" and flower.asked == 1

    run(test)


def test_a_message_that_comes_while_flower_answers_is_not_missed() -> None:
    async def test() -> None:
        held = Held(LONG)

        class Slow(Flower):
            async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
                if scope["path"].endswith("pull-messages") and self.asked == 0:
                    before, self.has_message = self.has_message, False
                    await super().__call__(scope, receive, _nowhere)
                    self.has_message = before
                    await push_message(self, held)
                    await send({"type": "http.response.start", "status": 200, "headers": []})
                    await send({"type": "http.response.body", "body": b""})
                else:
                    await super().__call__(scope, receive, send)

        flower = Slow()
        assert await Site(flower, held).answer() == FULL and flower.asked == 2

    run(test)


async def _nowhere(event: Any) -> None:
    pass


def test_nothing_is_asked_for_a_site_that_has_gone() -> None:
    """Flower would take the message for delivered."""

    async def test() -> None:
        flower, held = Flower(), Held(LONG)
        site = Site(flower, held)
        await asyncio.sleep(SHORT)
        site.left.set()
        assert await site.answer() is None
        await push_message(flower, held)
        assert flower.asked == 1
        assert await Site(flower, held).answer() == FULL

    run(test)


def test_a_node_holds_one_question_and_the_later_one() -> None:
    async def test() -> None:
        flower, held = Flower(), Held(LONG)
        sites = [Site(flower, held) for _ in range(3)]
        await asyncio.sleep(SHORT)
        assert [await site.answer() for site in sites[:2]] == [b"", b""] and not sites[2].task.done()
        await push_message(flower, held)
        assert await sites[2].answer() == FULL and flower.asked == 4

    run(test)


def test_what_flower_refuses_or_nobody_can_read_is_not_held() -> None:
    async def test() -> None:
        refusing = Flower(status=401)
        site = Site(refusing, Held(LONG))
        await site.answer()
        assert site.got[0]["status"] == 401 and refusing.asked == 1
        flower = Flower()
        assert await Site(flower, Held(LONG), b"\xff").answer() == b"" and flower.asked == 1

    run(test)


def test_a_superlink_that_stops_answers_everybody() -> None:
    async def test() -> None:
        flower, held = Flower(), Held(LONG)
        site = Site(flower, held)
        await asyncio.sleep(SHORT)
        held.close()
        assert await site.answer() == b"" and await Site(flower, held).answer() == b"" and flower.asked == 2

    run(test)
