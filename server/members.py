"""Who takes part: sites are invited, their weights are fixed once, and a resumed study goes on with the same ones."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from typing import Any

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from common.errors import FederationError
from common.files import write_atomic
from common.messages import JOIN, JoinReply, JoinRequest, Status
from common.privacy.ledger_keys import SignedHead
from common.records import MessageError
from common.study import Protocol
from server.run import RunFiles, RunSettings
from server.strategy import Member
from server.witness import Witness

POLL_SECONDS, LONGEST_PAUSE = 0.2, 5.0
ASK_SECONDS = 60.0  # a node that hangs does not keep those from being asked again that have not decided
NOT_YET = (Status.AWAITING_APPROVAL, Status.CLOSED_NOW)
NO_REPLY = "no reply before the deadline"


def gather_sites(grid: Grid, settings: RunSettings, files: RunFiles, witness: Witness) -> tuple[Member, ...]:
    """Wait for the sites (bounded), present the protocol, and fix the weights of those that accept.

    `witness` takes down where the ledger of each begins. `FederationError` if fewer than min_sites accept.
    """
    joined, refused = invite(grid, settings.protocol, settings.sites, witness, files)
    members = {member.site: member for member in joined}
    total = sum(member.patients for member in members.values())
    document = {
        "joined": {name: {"patients": m.patients, "weight": m.patients / total} for name, m in sorted(members.items())},
        "not_joined": dict(sorted(refused.items())),
    }
    witness.save()
    write_atomic(files.sites, json.dumps(document, indent=1))
    _remember_nodes(files, members)
    _require_enough(settings, len(members), refused)
    return tuple(members[name] for name in sorted(members))


def gather_again(grid: Grid, settings: RunSettings, files: RunFiles, witness: Witness) -> tuple[Member, ...]:
    """The members of a study that is resumed, with the weights it began with.

    A site that is away keeps its place and its last node: it may return. One that was not part of the study, or that
    now declares another number of patients, is not taken in. `FederationError` if fewer than min_sites are there.
    """
    began, nodes = _read(files)
    joined, refused = invite(grid, settings.protocol, settings.sites, witness, files)
    present: dict[str, Member] = {}
    for member in joined:
        if member.site not in began:
            refused[member.site] = "was not part of the study when it began"
        elif member.patients != began[member.site]:
            refused[member.site] = f"declares another number of patients than the {began[member.site]} it began with"
        else:
            present[member.site] = member
    witness.save()
    away = {name: Member(nodes[name], name, began[name]) for name in began if name not in present}
    members = away | present
    _remember_nodes(files, members)
    _require_enough(settings, len(present), refused | {name: "is away" for name in away if name not in refused})
    return tuple(members[name] for name in sorted(members))


def invite(
    grid: Grid, protocol: Protocol, sites: int, witness: Witness, files: RunFiles
) -> tuple[list[Member], dict[str, str]]:
    """The sites that accept the protocol, and the others with their reasons.

    Waits until as many sites as expected have said yes or no, at most join_timeout. A site that says "not yet" is asked
    again; who that is stands in waiting.json meanwhile.
    """
    training = protocol.study.training
    deadline = time.monotonic() + training.join_timeout
    request = JoinRequest(protocol.to_json()).to_record()
    found = _Answers(protocol, witness)
    pause = POLL_SECONDS
    while True:
        nodes = [node for node in grid.get_node_ids() if node not in found.final]
        left = deadline - time.monotonic()
        if nodes and (left > 0 or not found.asked):
            messages = [Message(content=request, message_type=JOIN, dst_node_id=node) for node in nodes]
            replies = grid.send_and_receive(messages, timeout=min(max(left, POLL_SECONDS), ASK_SECONDS))
            found.take(nodes, replies)
        if len(found.final) >= sites or time.monotonic() >= deadline:
            break
        write_atomic(files.waiting, json.dumps({"expected": sites, "waiting": found.waiting}, indent=1))
        time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        if found.waiting:  # somebody has to decide, which takes its time
            pause = min(2 * pause, LONGEST_PAUSE)
    files.waiting.unlink(missing_ok=True)
    return list(found.members.values()), found.refused | found.waiting


class _Answers:
    """What the nodes have said so far. `waiting` says by name who has not decided, `final` who has, by node."""

    def __init__(self, protocol: Protocol, witness: Witness) -> None:
        self.protocol, self.witness = protocol, witness
        self.members: dict[str, Member] = {}
        self.refused: dict[str, str] = {}
        self.waiting: dict[str, str] = {}
        self.final: set[int] = set()
        self.asked: set[int] = set()

    def take(self, nodes: Iterable[int], replies: Iterable[Message]) -> None:
        """Sort the replies of those that were just asked; a node without a reply is asked again."""
        self.asked |= set(nodes)
        self.waiting = {f"node {node}": NO_REPLY for node in self.asked - self.final}
        for message in replies:
            node = message.metadata.src_node_id
            if node not in self.asked or node in self.final:
                continue
            label = f"node {node}"
            self.waiting.pop(label, None)
            try:
                if message.has_error():
                    if message.error.code == ErrorCode.NODE_UNAVAILABLE:
                        self.waiting[label] = "is not connected"
                        continue
                    raise MessageError(f"Flower reports error {message.error.code}")
                reply = JoinReply.from_record(message.content)
                label = reply.site or label
                if reply.status in NOT_YET:
                    self.waiting[label] = reply.status.value
                    continue
                if reply.status is not Status.OK:
                    raise MessageError(reply.status.value)
                if reply.study != self.protocol.digest:
                    raise MessageError("accepted another study")
                if reply.site in self.members:
                    raise MessageError("another node has joined under this name already")
                signed = (reply.ledger_length, reply.ledger_head, reply.ledger_signature, reply.ledger_key)
                self.witness.joined(SignedHead(reply.site, *signed))
                self.members[reply.site] = Member(node, reply.site, reply.patients)
            except MessageError as error:
                self.refused[label] = str(error)
            self.final.add(node)


def _require_enough(settings: RunSettings, found: int, refused: dict[str, str]) -> None:
    minimum = settings.protocol.study.training.min_sites
    if found < minimum:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(refused.items())) or "nobody answered"
        raise FederationError(
            f"{found} of {settings.sites} sites joined, min_sites is {minimum} ({reasons})",
            fix="mend the sites named, or lower training.min_sites",
        )


def _remember_nodes(files: RunFiles, members: dict[str, Member]) -> None:
    # As text: Flower's node numbers have 64 bits, more than JSON's numbers keep in every reader.
    nodes = {name: str(member.node_id) for name, member in sorted(members.items())}
    write_atomic(files.nodes, json.dumps(nodes, indent=1))


def _read(files: RunFiles) -> tuple[dict[str, int], dict[str, int]]:
    """Patients and node of every site with which the study began."""
    try:
        document: dict[str, Any] = json.loads(files.sites.read_text(encoding="utf-8"))
        began = {str(name): int(site["patients"]) for name, site in document["joined"].items()}
        nodes = {str(name): int(node) for name, node in json.loads(files.nodes.read_text(encoding="utf-8")).items()}
        if set(began) != set(nodes):
            raise KeyError("nodes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise FederationError(
            f"{files.out}: who took part cannot be read from {files.sites.name} and {files.nodes.name}",
            fix="restore these files; a study cannot be resumed without its weights",
        ) from None
    return began, nodes
