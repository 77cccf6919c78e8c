"""The cohort of release.method = "channel": rows that every site makes itself, asked for, checked and pooled."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid
from numpy.typing import NDArray

from common.errors import CohortiumError, FederationError
from common.files import write_atomic
from common.generation import BATCH_ROWS, check_rows
from common.messages import RELEASE, ReleaseReply, ReleaseRequest, Status
from common.model.vae import Decoder
from common.records import MessageError, values_digest
from common.study import Protocol
from common.table import Table
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
    grid: Grid, protocol: Protocol, decoder: Decoder, members: Sequence[Member], witness: Witness, files: RunFiles
) -> Iterator[Table]:
    """Ask every site once, check what comes, and return the pooled rows in random order, in batches.

    A site that fails is named in release.json and its rows are missing: asking others for more would cost them more
    than they approved. `FederationError` if fewer than min_sites sites answer.
    """
    wanted = {site: rows for site, rows in share_rows(protocol.study.release.rows, members).items() if rows > 0}
    arrays = decoder.arrays()
    messages = []
    for member in members:
        if member.site in wanted:
            seen = witness.countersigned(member.site)
            signed = (seen.length, seen.head, seen.signature, seen.key)
            request = ReleaseRequest(protocol.digest, wanted[member.site], arrays, *signed)
            messages.append(Message(content=request.to_record(), message_type=RELEASE, dst_node_id=member.node_id))
    replies = grid.send_and_receive(messages, timeout=protocol.study.training.round_timeout)
    nodes = {member.node_id: member.site for member in members if member.site in wanted}
    received, dropped = collect_rows(replies, nodes, wanted, protocol, witness)
    document = {
        "method": "channel",
        "rows": {site: len(received[site]) for site in sorted(received)},
        "dropped": dict(sorted(dropped.items())),
    }
    write_atomic(files.release, json.dumps(document, indent=1))
    minimum = min(protocol.study.training.min_sites, len(wanted))
    if len(received) < minimum:
        reasons = "; ".join(f"{site}: {reason}" for site, reason in sorted(dropped.items()))
        raise FederationError(
            f"release: {len(received)} sites sent valid rows, at least {minimum} are needed ({reasons})",
            fix="see the logs of the sites named",
        )
    pooled = np.vstack([received[site] for site in sorted(received)])
    seed = protocol.study.study.seed
    order = np.random.default_rng(secrets.randbits(128) if seed is None else seed).permutation(len(pooled))
    batches = (order[start : start + BATCH_ROWS] for start in range(0, len(order), BATCH_ROWS))
    return (Table(protocol.schema, pooled[batch]) for batch in batches)


def collect_rows(
    replies: Iterable[Message],
    nodes: Mapping[int, str],
    wanted: Mapping[str, int],
    protocol: Protocol,
    witness: Witness,
) -> tuple[dict[str, NDArray[np.float64]], dict[str, str]]:
    """Valid rows by site, and for every other site that was asked the reason why it has none."""
    received: dict[str, NDArray[np.float64]] = {}
    dropped: dict[str, str] = {}
    for message in replies:
        site = nodes.get(message.metadata.src_node_id)
        if site is None or site in received or site in dropped:
            continue  # not asked, or a second answer: the first one counts
        try:
            received[site] = _validated(message, site, wanted[site], protocol, witness)
        except MessageError as error:
            dropped[site] = str(error)
        except Exception as error:  # whatever one site sends, the others' study goes on; the text may quote it
            dropped[site] = f"the reply cannot be read ({type(error).__name__})"
    for site in nodes.values():
        if site not in received and site not in dropped:
            dropped[site] = "no reply before the deadline"
    witness.save()
    return received, dropped


def _validated(message: Message, site: str, rows: int, protocol: Protocol, witness: Witness) -> NDArray[np.float64]:
    if message.has_error():
        raise MessageError(f"Flower reports error {message.error.code}")  # its text may quote a site's data
    reply = ReleaseReply.from_record(message.content, (rows, len(protocol.schema.columns)))
    if reply.status is not Status.OK or reply.rows is None:
        raise MessageError(reply.status.value)
    if reply.study != protocol.digest:
        raise MessageError("answers another study")
    if reply.site != site:
        raise MessageError("answers under another site's name")
    head = (reply.ledger_length, reply.ledger_head, reply.ledger_signature)
    number = protocol.study.training.rounds + 1
    witness.spent(site, head, reply.study, number, values_digest(reply.rows))
    try:
        check_rows(Table(protocol.schema, reply.rows))
    except CohortiumError as error:
        raise MessageError(error.message) from None
    return reply.rows
