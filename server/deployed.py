"""The release of a study between hospitals: privacy statement, report and a manifest signed with the release key.

No patient is here, so nothing is compared with patients: there is no metrics.json. The sites' ledgers are not here
either; what they spent is stated from the protocol, which fixes it. Every member is stated to have spent every round
that it was asked for, answered or not: a reply may have been made, and sent, and lost on its way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from common.digest import sha256_of_file
from common.errors import FederationError
from common.files import write_atomic
from common.keys import key_id
from common.privacy.statement import epsilon_in_words, largest_epsilon, privacy_statement
from common.signing import public_pem, statement_for
from server.consortium import audit_of, load_facts, load_release_key
from server.launch import Launch, complete_lines
from server.release import RELEASE_KEY, expected_signers, read_json, write_manifest, write_readme, write_statement
from server.release_readme import README
from server.report import render_deployment
from server.run import RunFiles
from server.spending import planned_events
from server.witness import Seen, Witness


def check_ledgers(rounds: list[dict[str, Any]], heads: Mapping[str, Seen]) -> None:
    """`FederationError` if a site's ledger is shorter than the updates that were taken from it."""
    short = []
    for site in sorted({site for line in rounds for site in line["answered"]}):
        answered = sum(site in line["answered"] for line in rounds)
        length = heads[site].length if site in heads else 0
        if length < answered:
            short.append(f"{site}: {answered} updates, a ledger of {length}")
    if short:
        raise FederationError(
            f"updates were taken that no ledger shows ({'; '.join(short)})",
            fix="restore rounds.jsonl and ledger-heads.json from the same moment; nothing was released",
        )


def release_deployment(started: Launch) -> dict[str, Any]:
    """State, report and sign what a run left; returns the summary that `--json` prints. Again gives the same."""
    files, protocol, consortium = started.files, started.protocol(), started.consortium
    facts, key = load_facts(consortium), load_release_key(consortium)
    sites: dict[str, Any] = json.loads(files.sites.read_text(encoding="utf-8"))
    rounds = complete_lines(files.rounds)
    patients = {name: int(joined["patients"]) for name, joined in sites["joined"].items()}
    witness = Witness(files.ledger_heads, key)
    heads = {site: witness[site] for site in patients}
    check_ledgers(rounds, heads)
    statement = privacy_statement(protocol, planned_events(protocol, patients, len(rounds)), patients)
    write_statement(files.privacy, statement)
    report = render_deployment(
        protocol,
        facts["name"],
        sites,
        rounds,
        statement,
        evaluation=read_json(files.evaluation),
        channel=read_json(files.release),
    )
    write_atomic(files.report, report)
    write_atomic(files.out / RELEASE_KEY, public_pem(key.public_key()))
    predicate = {
        "study": protocol.digest,
        "software": f"cohortium {version('cohortium')}",
        "simulation": False,
        "consortium": facts["name"],
        "bundle_sha256": started.bundle,
        "decoder_sha256": sha256_of_file(files.decoder),
        "ledgers": {site: {"length": seen.length, "head": seen.head} for site, seen in sorted(heads.items())},
        "signers": expected_signers(key, {site: seen.key for site, seen in heads.items()}),
        "markers": protocol.markers.values() if protocol.markers else None,
    }
    write_readme(files, released_names(files))
    names = sorted([README, *released_names(files)])
    write_manifest(files.manifest, statement_for(files.out, names, predicate), key)
    epsilon = largest_epsilon(statement)
    audit_of(consortium).append(
        "release",
        study=protocol.study.study.name,
        digest=protocol.digest,
        manifest=sha256_of_file(files.manifest),
        key=key_id(key.public_key()),
    )
    return {
        "study": protocol.study.study.name,
        "study_digest": protocol.digest,
        "out": str(files.out),
        "mode": protocol.study.training.mode,
        "sites": sites["joined"],
        "not_joined": sites["not_joined"],
        "rounds": len(rounds),
        "rows": protocol.study.release.rows if protocol.study.release.method == "prior" else _channel_rows(files),
        "certificate": max(line["certificate"] for line in rounds),
        "epsilon": epsilon,
        "epsilon_in_words": epsilon_in_words(statement),
        "bundle": started.bundle,
        "run": started.run,
        "seconds_a_round": round(sum(line["seconds"] for line in rounds) / len(rounds), 3),
        "files": [*names, files.manifest.name, RELEASE_KEY],
    }


def released_names(files: RunFiles) -> list[str]:
    """What belongs to the release; the decoder and what the coordinator keeps for himself do not."""
    paths = [
        files.cohort_csv,
        files.cohort_parquet,
        files.privacy,
        files.report,
        files.rounds,
        files.sites,
        files.study,
    ]
    return sorted(path.name for path in [*paths, *(p for p in (files.release, files.evaluation) if p.exists())])


def _channel_rows(files: RunFiles) -> int:
    return sum(json.loads(files.release.read_text(encoding="utf-8"))["rows"].values())
