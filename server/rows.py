"""The cohort of release.method = "channel": rows that every site makes itself, asked for, checked and pooled."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid
from numpy.typing import NDArray

from common.errors import CohortiumError, FederationError
from common.files import write_atomic
from common.generation import BATCH_ROWS, check_rows
from common.messages import RELEASE, ReleaseReply, ReleaseRequest
from common.model.vae import Decoder
from common.records import MessageError, values_digest
from common.study import Protocol
from common.table import Table
from server.replies import check_reply, collect_replies
from server.roll import Roll
from server.run import RunFiles
from server.strategy import Member
from server.witness import Witness


def share_rows(rows: int, members: Sequence[Member]) -> dict[str, int]:
    """The rows of each site, in proportion to its patients: largest remainders, ties to the first name."""
    total = sum(member.patients for member in members)
    exact = {member.site: rows * member.patients for member in members}
    shares = {site: value // total for site, value in exact.items()}
    left = rows - sum(shares.values())
    for site in sorted(exact, key=lambda site: (-(exact[site] % total), site))[:left]:
        shares[site] += 1
    return shares


def gather_rows(
    grid: Grid,
    protocol: Protocol,
    decoder: Decoder,
    members: Sequence[Member],
    witness: Witness,
    files: RunFiles,
    roll: Roll | None = None,
) -> Iterator[Table]:
    """Ask every site once, check what comes, and return the pooled rows in random order, in batches.

    A site that fails is named in release.json and its rows are missing: asking others for more would cost them more
    than they approved. The same holds for one that `roll` no longer has, which is not asked. `FederationError` if fewer
    than min_sites sites answer.
    """
    roll = roll or Roll()
    wanted = {site: rows for site, rows in share_rows(protocol.study.release.rows, members).items() if rows > 0}
    arrays = decoder.arrays()
    asked = [member for member in members if member.site in wanted]
    enrolments = {member.site: member.enrolment for member in asked}
    messages, lapsed = [], roll.lapsed(enrolments)
    for member in asked:
        if member.site not in lapsed:
            seen = witness.request_fields(member.site)
            request = ReleaseRequest(protocol.digest, wanted[member.site], arrays, **seen)
            messages.append(Message(content=request.to_record(), message_type=RELEASE, dst_node_id=member.node_id))
    minimum = min(protocol.study.training.min_sites, len(wanted))
    _require_enough(len(messages), minimum, "sites may be asked", lapsed)  # before anybody spends
    replies = grid.send_and_receive(messages, timeout=protocol.study.training.round_timeout)
    received, dropped = collect_replies(
        replies,
        {member.node_id: member.site for member in asked},
        lambda site, message: _validated(message, site, wanted[site], protocol, witness),
        witness,
        lapsed | roll.lapsed(enrolments),
    )
    document = {
        "method": "channel",
        "rows": {site: len(received[site]) for site in sorted(received)},
        "dropped": dict(sorted(dropped.items())),
    }
    write_atomic(files.release, json.dumps(document, indent=1))
    _require_enough(len(received), minimum, "sites sent valid rows", dropped)
    pooled = np.vstack([received[site] for site in sorted(received)])
    seed = protocol.study.study.seed
    order = np.random.default_rng(secrets.randbits(128) if seed is None else seed).permutation(len(pooled))
    batches = (order[start : start + BATCH_ROWS] for start in range(0, len(order), BATCH_ROWS))
    return (Table(protocol.schema, pooled[batch]) for batch in batches)


def _require_enough(found: int, minimum: int, what: str, reasons: Mapping[str, str]) -> None:
    if found < minimum:
        listed = "; ".join(f"{site}: {reason}" for site, reason in sorted(reasons.items()))
        raise FederationError(
            f"release: {found} {what}, at least {minimum} are needed ({listed})", fix="see the logs of the sites named"
        )


def _validated(message: Message, site: str, rows: int, protocol: Protocol, witness: Witness) -> NDArray[np.float64]:
    reply = ReleaseReply.from_record(message.content, (rows, len(protocol.schema.columns)))
    check_reply(reply, site, protocol.digest)
    assert reply.rows is not None  # `from_record` has read them, since the status is ok
    head = (reply.ledger_length, reply.ledger_head, reply.ledger_signature)
    number = protocol.study.training.rounds + 1
    witness.spent(site, head, reply.study, number, values_digest(reply.rows))
    try:
        check_rows(Table(protocol.schema, reply.rows))
    except CohortiumError as error:
        raise MessageError(error.message) from None
    return reply.rows
