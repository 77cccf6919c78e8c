"""The release of a study between hospitals: privacy statement, report and a manifest signed with the release key.

No patient is here, so nothing is compared with patients: there is no metrics.json. The sites' ledgers are not here
either; what they spent is stated from the protocol, which fixes it. Every member is stated to have spent every round
that it was asked for, answered or not: a reply may have been made, and sent, and lost on its way.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.digest import sha256_of_file
from common.errors import FederationError
from common.files import write_atomic
from common.gates import GatesDocument, override_summary
from common.keys import key_id
from common.privacy.statement import epsilon_in_words, largest_epsilon, privacy_statement
from common.signing import public_pem, statement_for
from server.cohort_check import check_cohort
from server.consortium import audit_of, load_facts, load_release_key
from server.gating import (
    Candidate,
    Decision,
    cohort_digest,
    judge,
    read_evaluation,
    require_open,
    resolve,
    statements_hold,
    unnoised_gates,
)
from server.launch import Launch, complete_lines
from server.quarantine import leave, out_of_quarantine
from server.release import (
    RELEASE_KEY,
    expected_rows,
    expected_signers,
    former_audit,
    read_json,
    write_descriptions,
    write_manifest,
    write_statement,
)
from server.release_readme import README
from server.report import render_deployment
from server.run import RunFiles
from server.spending import planned_events
from server.witness import Seen, Witness


def ledger_problems(rounds: Sequence[Mapping[str, Any]], heads: Mapping[str, Seen], sites: Iterable[str]) -> list[str]:
    """The sites whose ledger was never seen, or is shorter than the updates that were taken from them."""
    found = [f"{site}: its ledger was never seen" for site in sorted(sites) if site not in heads]
    for site in sorted({site for line in rounds for site in line["answered"]}):
        answered = sum(site in line["answered"] for line in rounds)
        length = heads[site].length if site in heads else 0
        if length < answered:
            found.append(f"{site}: {answered} updates, a ledger of {length}")
    return found


def release_deployment(started: Launch, decision: Decision | None = None) -> dict[str, Any]:
    """State, report, open the gates and sign what a run left; returns what `--json` prints. Again gives the same.

    `GateError` where gates fail: then the candidate is in quarantine and nothing is released.
    """
    load_release_key(started.consortium)  # before anything moves
    with out_of_quarantine(started.files):
        return _release(started, decision or Decision())


def _release(started: Launch, decision: Decision) -> dict[str, Any]:
    files, protocol, consortium = started.files, started.protocol(), started.consortium
    facts, key = load_facts(consortium), load_release_key(consortium)
    sites: dict[str, Any] = json.loads(files.sites.read_text(encoding="utf-8"))
    rounds = complete_lines(files.rounds)
    patients = {name: int(joined["patients"]) for name, joined in sites["joined"].items()}
    heads, problems = _seen(files, key, patients)
    problems += ledger_problems(rounds, heads, patients)
    audit = decision.audit or former_audit(files)
    statement = privacy_statement(
        protocol,
        planned_events(protocol, patients, len(rounds)),
        patients,
        gates=unnoised_gates(protocol, simulation=False, audit=audit),
    )
    write_statement(files.privacy, statement)
    if audit is not None:
        write_atomic(files.audit, audit.content)
    expected = expected_rows(protocol, files)
    _, wrong = check_cohort(files, protocol, expected)
    candidate = Candidate(
        protocol=protocol,
        rounds=rounds,
        joined=patients,
        ledger_problems=problems,
        ledger_source="ledger-heads.json: the heads that the sites signed, and rounds.jsonl",
        cohort_problems=wrong,
        rows=expected,
        cohort_sha256=cohort_digest(files.cohort_csv),
        statement=statement,
        simulation=False,
        evaluation=read_evaluation(files.evaluation),
        audit=audit,
    )
    document, error = resolve(files, protocol, judge(candidate), decision, key_id(key.public_key()))
    if statements_hold(document):
        report = render_deployment(
            protocol,
            facts["name"],
            sites,
            rounds,
            statement,
            evaluation=read_json(files.evaluation),
            channel=read_json(files.release),
            gates=document.to_json(),
            audit=audit.document if audit is not None else None,
        )
        write_atomic(files.report, report)
    else:
        files.report.unlink(missing_ok=True)
    _log_gates(started, document, opened=error is None)
    require_open(files, document, error)
    leave(files)
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
        "override": override_summary(document.override),
    }
    names = sorted([README, *released_names(files)])
    write_descriptions(files, protocol, names, facts["name"])
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
        "rounds": protocol.study.training.rounds,
        "rows": expected,
        "certificate": max(line["certificate"] for line in rounds),
        "epsilon": epsilon,
        "epsilon_in_words": epsilon_in_words(statement),
        "bundle": started.bundle,
        "run": started.run,
        "seconds_a_round": round(sum(line["seconds"] for line in rounds) / len(rounds), 3),
        "files": [*names, files.manifest.name, RELEASE_KEY],
        "gates": document.to_json(),
        "release_key": str(consortium / RELEASE_KEY),
    }


def _seen(files: RunFiles, key: Ed25519PrivateKey, patients: Iterable[str]) -> tuple[dict[str, Seen], list[str]]:
    """The last head of every site's ledger, and why there are none."""
    try:
        witness = Witness(files.ledger_heads, key)
    except FederationError as error:
        return {}, [error.message]
    return {site: witness[site] for site in patients if site in witness}, []


def _log_gates(started: Launch, document: GatesDocument, *, opened: bool) -> None:
    """A line in the audit log for gates that failed, before anything comes of it: an override, or quarantine."""
    if document.passed:
        return
    study, override = started.protocol(), document.override
    failed = [gate.in_words() for gate in document.failed]
    facts: dict[str, Any] = {"study": study.study.study.name, "digest": study.digest, "gates": failed}
    if opened and override is not None:
        facts |= {"reason": override.reason, "by": override.by, "second_key": override.key_id, "at": override.at}
    audit_of(started.consortium).append(
        "override gates" if opened else "gates failed", outcome="ok" if opened else "not released", **facts
    )


def released_names(files: RunFiles) -> list[str]:
    """What belongs to the release; the decoder and what the coordinator keeps for himself do not."""
    paths = [
        files.cohort_csv,
        files.cohort_parquet,
        files.croissant,
        files.privacy,
        files.report,
        files.ro_crate,
        files.rounds,
        files.schema,
        files.sites,
        files.study,
    ]
    optional = (files.anchor, files.release, files.evaluation, files.audit, files.gates)
    return sorted(path.name for path in [*paths, *(p for p in optional if p.exists())])
