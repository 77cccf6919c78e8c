"""The cohort of release.method = "channel": rows that every site makes itself, asked for, checked and pooled."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid
from numpy.typing import NDArray

from common.errors import CohortiumError
from common.files import write_atomic
from common.generation import BATCH_ROWS, check_rows
from common.messages import RELEASE, ReleaseReply, ReleaseRequest
from common.model.vae import Decoder
from common.records import MessageError, values_digest
from common.study import Protocol
from common.table import Table
from server.replies import ask_once, check_reply, require_enough
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
    minimum = min(protocol.study.training.min_sites, len(wanted))
    received, dropped = ask_once(
        grid,
        RELEASE,
        asked,
        lambda site: ReleaseRequest(protocol.digest, wanted[site], arrays, **witness.request_fields(site)).to_record(),
        lambda site, message: _validated(message, site, wanted[site], protocol, witness),
        witness,
        roll,
        minimum=minimum,
        timeout=protocol.study.training.round_timeout,
    )
    document = {
        "method": "channel",
        "rows": {site: len(received[site]) for site in sorted(received)},
        "dropped": dict(sorted(dropped.items())),
    }
    write_atomic(files.release, json.dumps(document, indent=1))
    require_enough(RELEASE, len(received), minimum, "sites sent valid rows", dropped)
    pooled = np.vstack([received[site] for site in sorted(received)])
    seed = protocol.study.study.seed
    order = np.random.default_rng(secrets.randbits(128) if seed is None else seed).permutation(len(pooled))
    batches = (order[start : start + BATCH_ROWS] for start in range(0, len(order), BATCH_ROWS))
    return (Table(protocol.schema, pooled[batch]) for batch in batches)


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
