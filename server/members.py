"""Who takes part: sites are invited, their weights are fixed once, and a resumed study goes on with the same ones.

In a deployment only those are invited whose node key is enrolled, and only those taken in that answer from that node,
under their enrolled name and with the enrolled ledger key (server/roll.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
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
from server.replies import NO_REPLY
from server.roll import NOT_ENROLLED, Roll
from server.run import RunFiles, RunSettings
from server.strategy import Member
from server.witness import Witness

POLL_SECONDS, LONGEST_PAUSE = 0.2, 5.0
ASK_SECONDS = 60.0  # a node that hangs does not keep those from being asked again that have not decided
NOT_YET = (Status.AWAITING_APPROVAL, Status.CLOSED_NOW)


def gather_sites(grid: Grid, settings: RunSettings, files: RunFiles, witness: Witness) -> tuple[Member, ...]:
    """Wait for the sites (bounded), present the protocol, and fix the weights of those that accept.

    `witness` takes down where the ledger of each begins. `FederationError` if fewer than min_sites accept.
    """
    joined, refused = invite(grid, settings.protocol, settings.sites, witness, files, Roll.of(settings))
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

    A site that is away keeps its place and its last node: it may return while it is enrolled. One that was not part of
    the study, or that now declares another number of patients, is not taken in. `FederationError` if fewer than
    min_sites are there.
    """
    began = _read(files)
    roll = Roll.of(settings)
    joined, refused = invite(grid, settings.protocol, settings.sites, witness, files, roll)
    present: dict[str, Member] = {}
    for member in joined:
        if member.site not in began:
            refused[member.site] = "was not part of the study when it began"
        elif member.patients != (patients := began[member.site].patients):
            refused[member.site] = f"declares another number of patients than the {patients} it began with"
        else:
            present[member.site] = member
    witness.save()
    away = {name: member for name, member in began.items() if name not in present}
    gone = roll.lapsed({name: member.enrolment for name, member in away.items()})
    members = away | present
    _remember_nodes(files, members)
    _require_enough(settings, len(present), dict.fromkeys(away, "is away") | gone | refused)
    return tuple(members[name] for name in sorted(members))


def invite(
    grid: Grid, protocol: Protocol, sites: int, witness: Witness, files: RunFiles, roll: Roll
) -> tuple[list[Member], dict[str, str]]:
    """The sites that accept the protocol, and the others with their reasons.

    Waits until as many sites as expected have said yes or no, at most join_timeout. A site that says "not yet" is asked
    again; who that is stands in waiting.json meanwhile. A node that is not enrolled is not asked, and is not one of the
    sites that are expected.
    """
    training = protocol.study.training
    deadline = time.monotonic() + training.join_timeout
    request = JoinRequest(protocol.to_json()).to_record()
    found = _Answers(protocol, witness, roll)
    pause = POLL_SECONDS
    while True:
        nodes = found.open(roll.nodes(grid))
        left = deadline - time.monotonic()
        if nodes and (left > 0 or not found.asked):
            messages = [Message(content=request, message_type=JOIN, dst_node_id=node) for node in nodes]
            replies = grid.send_and_receive(messages, timeout=min(max(left, POLL_SECONDS), ASK_SECONDS))
            found.take(nodes, replies)
        if len(found.final) >= sites or time.monotonic() >= deadline:
            break
        undecided = {"expected": sites, "waiting": found.waiting, "refused": found.refused}
        write_atomic(files.waiting, json.dumps(undecided, indent=1))
        time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        if found.waiting:  # somebody has to decide, which takes its time
            pause = min(2 * pause, LONGEST_PAUSE)
    files.waiting.unlink(missing_ok=True)
    lapsed = roll.lapsed({name: member.enrolment for name, member in found.members.items()})  # while others decided
    members = [member for name, member in found.members.items() if name not in lapsed]
    return members, found.strangers | found.refused | found.waiting | lapsed


class _Answers:
    """What the nodes have said so far. `waiting` says by name who has not decided, `final` who has, by node."""

    def __init__(self, protocol: Protocol, witness: Witness, roll: Roll) -> None:
        self.protocol, self.witness, self.roll = protocol, witness, roll
        self.keys: dict[int, str] = {}
        self.strangers: dict[str, str] = {}
        self.members: dict[str, Member] = {}
        self.refused: dict[str, str] = {}
        self.waiting: dict[str, str] = {}
        self.final: set[int] = set()
        self.asked: set[int] = set()

    def open(self, connected: Mapping[int, str]) -> list[int]:
        """Whom to ask of the nodes with these keys: enrolled ones that have not decided."""
        strangers = self.roll.strangers(connected)
        self.strangers = {name or f"node {node}": NOT_ENROLLED for node, name in strangers.items()}
        self.keys |= connected
        return [node for node in connected if node not in self.final and node not in strangers]

    def take(self, nodes: Iterable[int], replies: Iterable[Message]) -> None:
        """Sort the replies of those that were just asked; a node without a reply is asked again."""
        self.asked |= set(nodes)
        self.waiting = {self._label(node): NO_REPLY for node in self.asked - self.final}
        for message in replies:
            node = message.metadata.src_node_id
            if node not in self.asked or node in self.final:
                continue
            label = self._label(node)
            self.waiting.pop(label, None)
            try:
                if message.has_error():
                    if message.error.code == ErrorCode.NODE_UNAVAILABLE:
                        self.waiting[label] = "is not connected"
                        continue
                    raise MessageError(f"Flower reports error {message.error.code}")
                reply = JoinReply.from_record(message.content)
                label = reply.site or label
                refusal = self.roll.refusal(label, self.keys[node], reply.ledger_key)
                if refusal is not None:
                    raise MessageError(refusal)
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
                self.members[reply.site] = Member(node, reply.site, reply.patients, self.roll.enrolment(reply.site))
            except MessageError as error:
                self.refused[label] = str(error)
            self.final.add(node)

    def _label(self, node: int) -> str:
        """By the name that is enrolled with the node's key, where there is one."""
        return self.roll.name(self.keys[node]) or f"node {node}"


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
    nodes = {name: {"node": str(m.node_id), "enrolment": m.enrolment} for name, m in sorted(members.items())}
    write_atomic(files.nodes, json.dumps(nodes, indent=1))


def _read(files: RunFiles) -> dict[str, Member]:
    """The sites with which the study began, each with its last node and the enrolment under which it took part."""
    try:
        document: dict[str, Any] = json.loads(files.sites.read_text(encoding="utf-8"))
        patients = {str(name): int(site["patients"]) for name, site in document["joined"].items()}
        nodes: dict[str, Any] = json.loads(files.nodes.read_text(encoding="utf-8"))
        if set(patients) != set(nodes):
            raise KeyError("nodes")
        return {
            name: Member(int(nodes[name]["node"]), name, count, str(nodes[name]["enrolment"]))
            for name, count in patients.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise FederationError(
            f"{files.out}: who took part cannot be read from {files.sites.name} and {files.nodes.name}",
            fix="restore these files; a study cannot be resumed without its weights",
        ) from None
