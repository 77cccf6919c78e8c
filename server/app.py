"""The ServerApp: load the protocol, gather the sites, run the rounds, make the cohort."""

from __future__ import annotations

import contextlib
import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from common.certificates import timestamp
from common.encoding import TableEncoding
from common.errors import CohortiumError
from common.files import append_line, write_atomic
from common.generation import sample_prior
from common.keys import load_ed25519
from common.model.vae import Decoder
from server.anchor.gather import gather_anchor, remake_anchor, seed_of
from server.checkpoint import build_decoder, complete_rounds, load_checkpoint, save_checkpoint
from server.cohort import write_cohort
from server.consortium import RELEASE_KEY, audit_of
from server.evaluation import gather_evaluation
from server.members import gather_again, gather_sites
from server.recording import RecordingFedAvg
from server.roll import Roll
from server.rows import gather_rows
from server.run import RUN_VARIABLE, RunFiles, RunSettings
from server.strategy import LipschitzFedAvg, RoundReport
from server.witness import Witness

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one study; a failure is written to `failure.json` for the command that launched it, then raised."""
    settings = RunSettings.load(Path(str(context.run_config.get("cohortium-run") or os.environ[RUN_VARIABLE])))
    files = RunFiles(settings.out)
    try:
        # The coordinator of a simulation has no identity: his key lives as long as the run.
        key = Ed25519PrivateKey.generate() if settings.key is None else load_ed25519(settings.key, RELEASE_KEY)
        run_study(grid, settings, files, key)
    except CohortiumError as error:
        failure = {"exit_code": int(error.exit_code), "message": error.message, "fix": error.fix}
        with contextlib.suppress(CohortiumError):  # on a full disk the launching command finds that out by itself
            write_atomic(files.failure, json.dumps(failure))
        with contextlib.suppress(CohortiumError):
            _note(settings, "study failed", outcome=error.message)
        raise


def run_study(grid: Grid, settings: RunSettings, files: RunFiles, key: Ed25519PrivateKey) -> None:
    """The whole study, or what is left of it; `key` is the coordinator's and countersigns the sites' ledgers.

    A resumed study goes on from the last checkpoint. A round that was sent before and not finished is sent again from
    the identical decoder, to which a site that has answered it answers with the identical bytes and without a spend.
    """
    protocol = settings.protocol
    seed = protocol.study.study.seed
    witness = Witness(files.ledger_heads, key)
    if settings.resume and files.decoder.exists():
        checkpoint = load_checkpoint(files.decoder, protocol)
        decoder, completed = checkpoint.decoder, checkpoint.round
        if protocol.study.training.rounds > 0:
            complete_rounds(files.rounds, checkpoint)
        members = gather_again(grid, settings, files, witness)
        _note(settings, "sites gathered again", round=completed, sites=[member.site for member in members])
    else:
        decoder, completed = build_decoder(protocol, seed), 0
        members = gather_sites(grid, settings, files, witness)
        _note(settings, "sites joined", patients={member.site: member.patients for member in members})
        # Before anybody has seen it: the start is random, and a resumed round 1 must begin from the same one.
        save_checkpoint(files.decoder, protocol, 0, decoder)

    def observe(report: RoundReport, current: Decoder) -> None:
        # The checkpoint first: a line in rounds.jsonl promises that its decoder is on disk.
        started = time.perf_counter()
        line = report.to_json() | {"ended": timestamp(datetime.now(UTC))}
        save_checkpoint(files.decoder, protocol, report.round, current, line)
        seconds = report.server_seconds + time.perf_counter() - started
        append_line(files.rounds, json.dumps(line | {"server_seconds": round(seconds, 4)}))
        _note(settings, "round", round=report.round, answered=list(report.answered), dropped=dict(report.dropped))

    roll, training = Roll.of(settings), protocol.study.training
    anchored = None
    if protocol.study.anchor.epsilon is not None and completed == 0 and not files.anchor.exists():
        anchored = gather_anchor(grid, protocol, members, witness, files, roll)
        decoder = anchored.decoder
        save_checkpoint(files.decoder, protocol, 0, decoder)
        _note(settings, "anchored", generator=anchored.generator, sites=anchored.report["sites"])
    if training.rounds == 0 and anchored is not None:
        line = anchored.line() | {"ended": timestamp(datetime.now(UTC))}
        write_atomic(files.rounds, json.dumps(line) + "\n")
    if settings.record is None:
        strategy = LipschitzFedAvg(protocol, decoder, members, observe, witness, completed, roll)
    else:
        recorded = {"site": settings.record, "folder": settings.out}
        strategy = RecordingFedAvg(protocol, decoder, members, observe, witness, completed, roll, **recorded)
    if training.rounds > completed:
        strategy.start(
            grid,
            initial_arrays=ArrayRecord(),
            num_rounds=training.rounds - completed,
            timeout=training.round_timeout,
        )
    # A cohort that is there is kept: the sites may have been asked about it, and answer about no other.
    if not (completed == training.rounds and files.cohort_csv.exists()):
        if protocol.study.release.method == "channel":
            tables = gather_rows(grid, protocol, decoder, members, witness, files, roll)
        elif training.mode == "anchored":
            anchored = anchored or remake_anchor(protocol, files)
            tables = anchored.sample(protocol.study.release.rows, seed_of(protocol))
        else:
            tables = sample_prior(decoder, TableEncoding(protocol.schema), protocol.study.release.rows, seed)
        rows = write_cohort(tables, protocol.schema, files.cohort_csv, files.cohort_parquet, protocol.markers)
        _note(settings, "cohort made", rows=rows)
    if protocol.study.evaluation.method != "none":
        found = gather_evaluation(grid, protocol, members, witness, files, roll)
        _note(settings, "cohort evaluated", answered=sorted(found["patients"]), dropped=found["dropped"])


def _note(settings: RunSettings, action: str, *, outcome: str = "ok", **fields: object) -> None:
    """One line in the coordinator's audit log, which lies beside his key; a simulation has neither."""
    if settings.key is not None:
        protocol = settings.protocol
        log = audit_of(settings.key.parent)
        log.append(action, study=protocol.study.study.name, digest=protocol.digest, outcome=outcome, **fields)
