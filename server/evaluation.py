"""Ask every site how the cohort compares with its patients, check what comes, and say what it means."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from common.evaluation.plan import count_plan
from common.evaluation.results import evaluation_results, populations_of, values_expected
from common.evaluation_messages import EvaluateReply, EvaluateRequest
from common.files import write_atomic
from common.messages import EVALUATE
from common.privacy.evaluation_release import evaluation_round
from common.records import MessageError, values_digest
from common.study import Protocol
from common.table import Table, read_table
from server.replies import ask_once, check_reply, require_enough
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
    patients = {member.site: member.patients for member in members}
    minimum = min(protocol.study.training.min_sites, len(members))

    def request(site: str) -> RecordDict:
        return EvaluateRequest(protocol.digest, cohort.values, **witness.request_fields(site)).to_record()

    answers, dropped = ask_once(
        grid,
        EVALUATE,
        members,
        request,
        lambda site, message: _validated(message, site, patients[site], protocol, witness),
        witness,
        roll,
        minimum=minimum,
        timeout=protocol.study.training.round_timeout,
    )
    require_enough(EVALUATE, len(answers), minimum, "sites answered", dropped)
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
