"""Ask every site for its two messages of the anchor, and make of them what the study begins or ends with."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid
from numpy.typing import NDArray

from common.anchor.moments import moment_size
from common.anchor_messages import AnchorReply, AnchorRequest
from common.errors import FederationError
from common.files import write_atomic
from common.messages import ANCHOR
from common.privacy.anchor import Step, anchor_round
from common.privacy.channel_release import fit_patients
from common.records import values_digest
from common.study import Protocol
from server.anchor.expectation import require_useful_anchor
from server.anchor.generators import Anchored, make_generators
from server.anchor.statistics import Pooled, Statistics, load_statistics
from server.replies import check_reply, collect_replies
from server.roll import Roll
from server.run import RunFiles
from server.strategy import Member
from server.witness import Witness


def gather_anchor(
    grid: Grid, protocol: Protocol, members: Sequence[Member], witness: Witness, files: RunFiles, roll: Roll
) -> Anchored:
    """Both steps, as far as they are not on disk already, and the generators; anchor.json says what came of it.

    A site that fails is named there, and its patients are not among those counted. `FederationError` if fewer than
    min_sites answer a step.
    """
    require_useful_anchor(protocol, {member.site: member.patients for member in members})
    asking = _Asking(grid, protocol, members, witness, roll)
    statistics = load_statistics(files.anchor_statistics, protocol)
    dropped: dict[str, dict[str, str]] = {}
    if statistics is None:
        cells = Statistics(protocol, Pooled(np.zeros(0), {}))
        first, dropped["marginals"] = asking.ask("marginals", None, cells.counts.size)
        statistics = Statistics(protocol, first)
        statistics.save(files.anchor_statistics)
    if statistics.second is None:
        marginals = np.concatenate(statistics.marginals)
        second, dropped["moments"] = asking.ask("moments", marginals, moment_size(statistics.features.size))
        statistics = Statistics(protocol, statistics.first, second)
        statistics.save(files.anchor_statistics)
    anchored = make_generators(statistics, seed_of(protocol))
    write_anchor(files, anchored.report | {"dropped": dropped})
    return anchored


def remake_anchor(protocol: Protocol, files: RunFiles) -> Anchored:
    """The generators of an anchor that is on disk; `FederationError` if it is not."""
    statistics = load_statistics(files.anchor_statistics, protocol)
    if statistics is None or statistics.second is None:
        raise FederationError(
            f"{files.anchor_statistics}: the statistics of the anchor are missing", fix="restore the file"
        )
    return make_generators(statistics, seed_of(protocol))


def seed_of(protocol: Protocol) -> int:
    """For what comes after the noise: the study's seed, or one from the operating system."""
    seed = protocol.study.study.seed
    return secrets.randbits(60) if seed is None else seed


def write_anchor(files: RunFiles, report: dict[str, Any]) -> None:
    """anchor.json: what was spent, what was asked, and what was made of it."""
    write_atomic(files.anchor, json.dumps(report, indent=1, allow_nan=False))


class _Asking:
    def __init__(self, grid: Grid, protocol: Protocol, members: Sequence[Member], witness: Witness, roll: Roll) -> None:
        self.grid, self.protocol, self.members, self.witness, self.roll = grid, protocol, members, witness, roll

    def ask(self, step: Step, marginals: NDArray[np.float64] | None, values: int) -> tuple[Pooled, dict[str, str]]:
        """The sum of what the sites sent, and why the others sent nothing."""
        enrolments = {member.site: member.enrolment for member in self.members}
        lapsed = self.roll.lapsed(enrolments)
        messages = [
            Message(
                content=AnchorRequest(
                    self.protocol.digest, step, marginals, **self.witness.request_fields(member.site)
                ).to_record(),
                message_type=ANCHOR,
                dst_node_id=member.node_id,
            )
            for member in self.members
            if member.site not in lapsed
        ]
        training = self.protocol.study.training
        replies = self.grid.send_and_receive(messages, timeout=training.round_timeout)
        answers, dropped = collect_replies(
            replies,
            {member.node_id: member.site for member in self.members},
            lambda site, message: self._validated(message, site, step, values),
            self.witness,
            lapsed | self.roll.lapsed(enrolments),
        )
        minimum = min(training.min_sites, len(self.members))
        if len(answers) < minimum:
            listed = "; ".join(f"{site}: {reason}" for site, reason in sorted(dropped.items()))
            raise FederationError(
                f"anchor, {step}: {len(answers)} sites answered, at least {minimum} are needed ({listed})",
                fix="see the logs of the sites named, then `cohortium resume`",
            )
        total = np.zeros(values)
        for site in sorted(answers):
            total += answers[site]
        study = self.protocol.study
        patients = {m.site: fit_patients(study, m.patients) for m in self.members if m.site in answers}
        return Pooled(total, patients), dropped

    def _validated(self, message: Message, site: str, step: Step, values: int) -> NDArray[np.float64]:
        reply = AnchorReply.from_record(message.content, values)
        check_reply(reply, site, self.protocol.digest)
        assert reply.statistics is not None  # `from_record` has read them, since the status is ok
        head = (reply.ledger_length, reply.ledger_head, reply.ledger_signature)
        number = anchor_round(self.protocol.study, step)
        self.witness.spent(site, head, reply.study, number, values_digest(reply.statistics))
        return reply.statistics[0]
