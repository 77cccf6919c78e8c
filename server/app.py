"""The ServerApp: load the protocol, gather the sites, run the rounds, make the cohort."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ArrayRecord, Context, Message
from flwr.serverapp import Grid, ServerApp

from common.encoding import TableEncoding
from common.errors import CohortiumError, FederationError
from common.files import append_line, write_atomic
from common.generation import sample_prior
from common.messages import JOIN, JoinReply, JoinRequest, Status
from common.model.vae import Decoder
from common.privacy.ledger_keys import SignedHead
from common.records import MessageError
from server.checkpoint import build_decoder, save_checkpoint
from server.cohort import write_cohort
from server.rows import gather_rows
from server.run import RUN_VARIABLE, RunFiles, RunSettings
from server.strategy import LipschitzFedAvg, Member, RoundReport
from server.witness import Witness

app = ServerApp()
POLL_SECONDS = 0.2


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one study; a failure is written to `failure.json` for the command that launched it, then raised."""
    settings = RunSettings.load(Path(str(context.run_config.get("cohortium-run") or os.environ[RUN_VARIABLE])))
    files = RunFiles(settings.out)
    try:
        # The coordinator of a simulation has no identity: his key lives as long as the run.
        run_study(grid, settings, files, Ed25519PrivateKey.generate())
    except CohortiumError as error:
        failure = {"exit_code": int(error.exit_code), "message": error.message, "fix": error.fix}
        with contextlib.suppress(CohortiumError):  # on a full disk the launching command finds that out by itself
            write_atomic(files.failure, json.dumps(failure))
        raise


def run_study(grid: Grid, settings: RunSettings, files: RunFiles, key: Ed25519PrivateKey) -> None:
    """The whole study, in the order of the steps; `key` is the coordinator's and countersigns the sites' ledgers."""
    protocol = settings.protocol
    seed = protocol.study.study.seed
    decoder = build_decoder(protocol, seed)
    witness = Witness(files.ledger_heads, key)
    members = gather_sites(grid, settings, files, witness)

    def observe(report: RoundReport, current: Decoder) -> None:
        # The checkpoint first: a line in rounds.jsonl promises that its decoder is on disk.
        started = time.perf_counter()
        save_checkpoint(files.decoder, protocol, report.round, current)
        seconds = report.server_seconds + time.perf_counter() - started
        append_line(files.rounds, json.dumps(report.to_json() | {"server_seconds": round(seconds, 4)}))

    strategy = LipschitzFedAvg(protocol=protocol, decoder=decoder, members=members, observer=observe, witness=witness)
    training = protocol.study.training
    strategy.start(
        grid,
        initial_arrays=ArrayRecord(),
        num_rounds=training.rounds,
        timeout=training.round_timeout,
    )
    if protocol.study.release.method == "channel":
        tables = gather_rows(grid, protocol, decoder, members, witness, files)
    else:
        tables = sample_prior(decoder, TableEncoding(protocol.schema), protocol.study.release.rows, seed)
    write_cohort(tables, protocol.schema, files.cohort_csv, files.cohort_parquet)


def gather_sites(grid: Grid, settings: RunSettings, files: RunFiles, witness: Witness) -> tuple[Member, ...]:
    """Wait for the sites (bounded), present the protocol, and fix the weights of those that accept.

    `witness` takes down where the ledger of each begins.
    """
    protocol = settings.protocol
    training = protocol.study.training
    deadline = time.monotonic() + training.join_timeout
    nodes = list(grid.get_node_ids())
    while len(nodes) < settings.sites and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        nodes = list(grid.get_node_ids())
    request = JoinRequest(protocol.to_json()).to_record()
    messages = [Message(content=request, message_type=JOIN, dst_node_id=node) for node in nodes]
    replies = grid.send_and_receive(messages, timeout=training.join_timeout) if messages else []

    members: dict[str, Member] = {}
    refused: dict[str, str] = {}
    silent = set(nodes)
    for message in replies:
        node = message.metadata.src_node_id
        silent.discard(node)
        label = f"node {node}"
        try:
            if message.has_error():
                raise MessageError(f"Flower reports error {message.error.code}")
            reply = JoinReply.from_record(message.content)
            label = reply.site or label
            if reply.status is not Status.OK:
                raise MessageError(reply.status.value)
            if reply.study != protocol.digest:
                raise MessageError("accepted another study")
            if reply.site in members:
                raise MessageError("another node has joined under this name already")
            signed = (reply.ledger_length, reply.ledger_head, reply.ledger_signature, reply.ledger_key)
            witness.joined(SignedHead(reply.site, *signed))
            members[reply.site] = Member(node, reply.site, reply.patients)
        except MessageError as error:
            refused[label] = str(error)
    refused |= {f"node {node}": "no reply before the deadline" for node in silent}
    total = sum(member.patients for member in members.values())
    document = {
        "joined": {name: {"patients": m.patients, "weight": m.patients / total} for name, m in sorted(members.items())},
        "not_joined": dict(sorted(refused.items())),
    }
    witness.save()
    write_atomic(files.sites, json.dumps(document, indent=1))
    if len(members) < training.min_sites:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(refused.items())) or "nobody answered"
        raise FederationError(
            f"{len(members)} of {settings.sites} sites joined, min_sites is {training.min_sites} ({reasons})",
            fix="mend the sites named, or lower training.min_sites",
        )
    return tuple(members[name] for name in sorted(members))
