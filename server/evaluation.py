"""Ask every site how the cohort compares with its patients, check what comes, and say what it means."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid
from numpy.typing import NDArray

from common.errors import FederationError
from common.evaluation.plan import count_plan
from common.evaluation.results import evaluation_results, populations_of, values_expected
from common.evaluation_messages import EvaluateReply, EvaluateRequest
from common.files import write_atomic
from common.messages import EVALUATE
from common.privacy.evaluation_release import evaluation_round
from common.records import MessageError, values_digest
from common.study import Protocol
from common.table import Table, read_table
from server.replies import check_reply, collect_replies
from server.roll import Roll
from server.run import RunFiles
from server.strategy import Member
from server.witness import Witness


def gather_evaluation(
    grid: Grid, protocol: Protocol, members: Sequence[Member], witness: Witness, files: RunFiles, roll: Roll
) -> dict[str, Any]:
    """Send the first rows of the cohort to every member and write evaluation.json; returns it.

    A site that fails is named there. `FederationError` if fewer than min_sites answer: the cohort stays unreleased.
    """
    cohort = evaluated_rows(protocol, files)
    enrolments = {member.site: member.enrolment for member in members}
    lapsed = roll.lapsed(enrolments)
    messages = [
        Message(
            content=EvaluateRequest(protocol.digest, cohort.values, **witness.request_fields(member.site)).to_record(),
            message_type=EVALUATE,
            dst_node_id=member.node_id,
        )
        for member in members
        if member.site not in lapsed
    ]
    replies = grid.send_and_receive(messages, timeout=protocol.study.training.round_timeout)
    patients = {member.site: member.patients for member in members}
    answers, dropped = collect_replies(
        replies,
        {member.node_id: member.site for member in members},
        lambda site, message: _validated(message, site, patients[site], protocol, witness),
        witness,
        lapsed | roll.lapsed(enrolments),
    )
    minimum = min(protocol.study.training.min_sites, len(members))
    if len(answers) < minimum:
        listed = "; ".join(f"{site}: {reason}" for site, reason in sorted(dropped.items()))
        raise FederationError(
            f"evaluation: {len(answers)} sites answered, at least {minimum} are needed ({listed})",
            fix="see the logs of the sites named, then `cohortium resume`",
        )
    document = evaluation_results(protocol, cohort, answers, patients)
    document["dropped"] = dict(sorted(dropped.items()))
    write_atomic(files.evaluation, json.dumps(document, indent=1, allow_nan=False))
    return document


def evaluated_rows(protocol: Protocol, files: RunFiles) -> Table:
    """The rows of the cohort that the sites are sent: its first ones, which are in random order."""
    table, _ = read_table(files.cohort_parquet, protocol.schema)
    return Table(table.schema, table.values[: protocol.study.evaluation.rows])


def _validated(message: Message, site: str, patients: int, protocol: Protocol, witness: Witness) -> NDArray[np.float64]:
    reply = EvaluateReply.from_record(message.content, values_expected(protocol))
    check_reply(reply, site, protocol.digest)
    assert reply.aggregates is not None  # `from_record` has read them, since the status is ok
    head = (reply.ledger_length, reply.ledger_head, reply.ledger_signature)
    number = evaluation_round(protocol.study)
    witness.spent(site, head, reply.study, number, values_digest(reply.aggregates))
    plan, people = count_plan(protocol), populations_of(protocol, patients)
    cells = reply.aggregates[0, : plan.size]
    if protocol.study.evaluation.method == "accounted":
        if np.isnan(cells).any():
            raise MessageError("noised counts have hidden cells")
        return reply.aggregates
    shown = cells[~np.isnan(cells)]
    floor = protocol.study.evaluation.min_count
    if (shown < floor).any():
        raise MessageError(f"the site sent counts under the study's floor of {floor}; they were not kept")
    if (shown != np.floor(shown)).any():
        raise MessageError("the site sent counts that are not whole numbers")
    for table, part in zip(plan.tables, plan.split(cells).values(), strict=True):
        if np.nansum(part) > people[table.population]:
            raise MessageError("the site counted more patients than it declared")
    scores = reply.aggregates[0, plan.size :]
    if ((scores < 0) | (scores > 1)).any():
        raise MessageError("the site sent scores outside 0 and 1")
    return reply.aggregates
