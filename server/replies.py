"""What came back from the sites that were asked: one valid answer by site, and the reason for every other one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from flwr.app import Message

from common.anchor_messages import AnchorReply
from common.evaluation_messages import EvaluateReply
from common.messages import ReleaseReply, Status, TrainReply
from common.records import MessageError
from server.grid import error_words
from server.witness import Witness

NO_REPLY = "no reply before the deadline"
Answer = TypeVar("Answer")


def collect_replies(
    replies: Iterable[Message],
    nodes: Mapping[int, str],
    read: Callable[[str, Message], Answer],
    witness: Witness,
    lapsed: Mapping[str, str],
) -> tuple[dict[str, Answer], dict[str, str]]:
    """Valid answers by site, and for every other site of `nodes` the reason why it has none.

    `read` checks the reply of a site and raises `MessageError` if it must not be used. Those in `lapsed` are not heard,
    for the reason given there. What the replies showed of the ledgers is on disk when this returns.
    """
    answers: dict[str, Answer] = {}
    dropped = {site: lapsed[site] for site in nodes.values() if site in lapsed}
    for message in replies:
        site = nodes.get(message.metadata.src_node_id)
        if site is None or site in answers or site in dropped:
            continue  # not asked, no longer enrolled, or a second answer: the first one counts
        try:
            if message.has_error():
                raise MessageError(error_words(message.error.code))  # its own text may quote a site's data
            answers[site] = read(site, message)
        except MessageError as error:
            dropped[site] = str(error)
        except Exception as error:  # whatever one site sends, the others' study goes on; the text may quote it
            dropped[site] = f"the reply cannot be read ({type(error).__name__})"
    dropped |= {site: NO_REPLY for site in nodes.values() if site not in answers and site not in dropped}
    witness.save()
    return answers, dropped


def check_reply(reply: AnchorReply | TrainReply | ReleaseReply | EvaluateReply, site: str, study: str) -> None:
    """`MessageError` unless `site` answers with a result, for this study and under its own name."""
    if reply.status is not Status.OK:
        raise MessageError(reply.status.value)
    if reply.study != study:
        raise MessageError("answers another study")
    if reply.site != site:
        raise MessageError("answers under another site's name")
