"""From the raw results of a run to a release: evaluation, privacy statement, report, signed manifest."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.bundles import KEYS, Trust, Verification, check_bundle, envelope_of, load_trust, read_contents, revoked_keys
from common.digest import sha256_of_file
from common.errors import LedgerError, OutputError, VerifyError
from common.evaluation.metrics import evaluate
from common.files import write_atomic
from common.gates import OverrideRecord, override_summary, read_gates
from common.keys import key_id
from common.privacy.anchor import due_spends
from common.privacy.events import Event
from common.privacy.ledger import Ledger
from common.privacy.ledger_entries import Findings
from common.privacy.statement import epsilon_in_words, largest_epsilon, largest_lines, privacy_statement
from common.privacy.statement_schema import problem_of
from common.signing import load_json, load_public_key, public_pem, read_envelope, sign, statement_for
from common.study import Protocol
from common.table import Table
from server.cohort_check import check_cohort
from server.gate_audit import GivenAudit, load_audit
from server.gating import (
    Candidate,
    Decision,
    cohort_digest,
    judge,
    require_open,
    resolve,
    statements_hold,
    unnoised_gates,
)
from server.metadata import write_metadata, write_schema
from server.quarantine import leave, out_of_quarantine
from server.release_readme import CHANNEL_RELEASE, PURPOSES, README, readme
from server.report import render_report
from server.run import RunFiles
from server.simulation import SimulationResult

SIMULATION_KEY, RELEASE_KEY = KEYS


def release_simulation(
    result: SimulationResult,
    held_out: Table | None,
    *,
    thorough: bool = True,
    decision: Decision | None = None,
    metrics: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate, state, report, open the gates and sign what a simulation left; returns what `--json` prints.

    The simulation owns all patients, so it may compare with them without accounting; metrics.json says so. The signing
    key exists for this call only: it shows that nothing changed afterwards, not who ran it. With `thorough` false only
    fidelity and utility are measured; `metrics` are those of an earlier attempt. `GateError` where gates fail: then the
    candidate is in quarantine and nothing is released.
    """
    with out_of_quarantine(result.files):
        return _release_simulation(result, held_out, thorough, decision or Decision(), metrics)


def _release_simulation(
    result: SimulationResult,
    held_out: Table | None,
    thorough: bool,
    decision: Decision,
    metrics: dict[str, Any] | None,
) -> dict[str, Any]:
    files, protocol = result.files, result.protocol
    started = time.perf_counter()
    sites = json.loads(files.sites.read_text(encoding="utf-8"))
    rounds = read_rounds(files)
    patients = {name: joined["patients"] for name, joined in sites["joined"].items()}
    ledgers, problems = check_ledgers(files, protocol, rounds, patients)
    audit = decision.audit or former_audit(files)
    files.privacy.unlink(missing_ok=True)
    statement = None
    if set(ledgers) >= set(patients):
        statement = privacy_statement(
            protocol,
            {name: _spends(ledgers[name], protocol.digest) for name in patients},
            patients,
            gates=unnoised_gates(protocol, simulation=True, audit=audit),
        )
        write_statement(files.privacy, statement)
    expected = expected_rows(protocol, files)
    cohort, wrong = check_cohort(files, protocol, expected)
    metrics = None if cohort is None or wrong else metrics or _measure(result, cohort, held_out, thorough)
    if metrics is not None:
        write_atomic(files.metrics, json.dumps(metrics, indent=1, allow_nan=False))
    if audit is not None:
        write_atomic(files.audit, audit.content)
    result.seconds["evaluation"] = time.perf_counter() - started

    candidate = Candidate(
        protocol=protocol,
        rounds=rounds,
        joined=patients,
        ledger_problems=problems,
        ledger_source="the ledgers of the sites, checked anew",
        cohort_problems=wrong,
        rows=expected,
        cohort_sha256=cohort_digest(files.cohort_csv),
        statement=statement,
        simulation=True,
        metrics=metrics,
        audit=audit,
    )
    document, error = resolve(files, protocol, judge(candidate), decision, release_key="")
    if statement is not None and metrics is not None and cohort is not None and statements_hold(document):
        report = render_report(
            protocol,
            sites,
            rounds,
            statement,
            metrics,
            evaluation=read_json(files.evaluation),
            channel=read_json(files.release),
            gates=document.to_json(),
            audit=audit.document if audit is not None else None,
        )
        write_atomic(files.report, report)
    else:
        files.report.unlink(missing_ok=True)
    require_open(files, document, error)
    assert statement is not None and metrics is not None and cohort is not None  # else a gate is closed
    leave(files)
    sign_release(files, protocol, {name: (found.head.length, found.head.head) for name, found in ledgers.items()})
    result.seconds["release"] = time.perf_counter() - started
    return summarise(result, sites, rounds, statement, metrics, cohort) | {"gates": document.to_json()}


def _measure(result: SimulationResult, cohort: Table, held_out: Table | None, thorough: bool) -> dict[str, Any]:
    study = result.protocol.study
    return evaluate(
        cohort,
        result.real,
        held_out,
        study.study.seed or 0,
        target=result.protocol.target,
        groups=study.evaluation.groups,
        secrets=study.evaluation.secrets,
        sites=[name for name, rows in result.patients.items() for _ in range(rows)],
        thorough=thorough,
    )


def _spends(found: Findings, digest: str) -> list[Event]:
    return [entry.event for entry in found.entries if entry.study == digest]


def expected_rows(protocol: Protocol, files: RunFiles) -> int:
    """How many rows the cohort has to have: those declared, or those that came through the sites' channels."""
    if not files.release.exists():
        return protocol.study.release.rows
    return sum(json.loads(files.release.read_text(encoding="utf-8"))["rows"].values())


def former_audit(files: RunFiles) -> GivenAudit | None:
    """The audit that an earlier attempt to release this run was given."""
    return load_audit(files.audit) if files.audit.exists() else None


def check_ledgers(
    files: RunFiles, protocol: Protocol, rounds: Sequence[Mapping[str, Any]], patients: Iterable[str]
) -> tuple[dict[str, Findings], list[str]]:
    """What the ledgers hold that can be read, and everything that is wrong with those of the sites that joined."""
    found: dict[str, Findings] = {}
    problems, study, digest = [], protocol.study, protocol.digest
    for site in sorted(patients):
        path = files.ledgers / f"{site}.sqlite"
        if not path.exists():
            problems.append(f"{site}: there is no ledger")
            continue
        try:
            with Ledger(path, site) as ledger:
                found[site] = ledger.inspect()
        except LedgerError as error:
            problems.append(f"{site}: {error.message}")
            continue
        spent = {entry.round for entry in found[site].entries if entry.study == digest}
        answered = [line["round"] for line in rounds if site in line["answered"]]
        unpaid = [number for number in answered if not due_spends(study, number) <= spent]
        if unpaid:
            problems.append(f"{site}: its ledger does not show the update of {len(unpaid)} round(s)")
    return found, problems


def inspect_ledgers(files: RunFiles) -> dict[str, Findings]:
    """What every site's ledger holds, once it is checked; `LedgerError` if one does not hold."""
    found = {}
    for path in sorted(files.ledgers.glob("*.sqlite")):
        with Ledger(path, path.stem) as ledger:
            found[path.stem] = ledger.inspect()
    return found


def write_statement(path: Path, statement: dict[str, Any]) -> None:
    """Write privacy.json, unless it does not fit its own schema: then `OutputError`, and nothing is released."""
    problem = problem_of(statement)
    if problem is not None:
        raise OutputError(
            f"{path}: the privacy statement does not fit its schema: {problem}",
            fix="nothing was released; report this as a defect of Cohortium, with the study and the ledgers",
        )
    write_atomic(path, json.dumps(statement, indent=1, allow_nan=False))


def read_json(path: Path) -> dict[str, Any] | None:
    """A document of a run; None where the run has none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def read_rounds(files: RunFiles) -> list[dict[str, Any]]:
    """The lines of rounds.jsonl."""
    return [json.loads(line) for line in files.rounds.read_text(encoding="utf-8").splitlines()]


def released_files(files: RunFiles) -> list[Path]:
    """What belongs to the release; the decoder and the sites' ledgers do not.

    A release through the sites' channels has a file of its own, which says how many rows came from where.
    """
    channel = files.out / CHANNEL_RELEASE
    return [
        *([channel] if channel.exists() else []),
        *(path for path in (files.anchor, files.evaluation, files.audit, files.gates) if path.exists()),
        files.cohort_csv,
        files.cohort_parquet,
        files.croissant,
        files.metrics,
        files.privacy,
        files.report,
        files.ro_crate,
        files.rounds,
        files.schema,
        files.sites,
        files.study,
    ]


def sign_release(files: RunFiles, protocol: Protocol, heads: Mapping[str, tuple[int, str]]) -> None:
    """Write schema, README and metadata, the manifest, and the public half of a key made for it."""
    key = Ed25519PrivateKey.generate()
    predicate = {
        "study": protocol.digest,
        "software": f"cohortium {version('cohortium')}",
        "simulation": True,
        "decoder_sha256": sha256_of_file(files.decoder),
        "ledgers": {name: {"length": length, "head": head} for name, (length, head) in heads.items()},
        "signers": expected_signers(key, {}),
        "markers": protocol.markers.values() if protocol.markers else None,
        "override": override_summary(override_in(files)),
    }
    names = [README, *(path.name for path in released_files(files))]
    write_descriptions(files, protocol, names)
    statement = statement_for(files.out, names, predicate)
    write_manifest(files.manifest, statement, key)
    write_atomic(files.out / SIMULATION_KEY, public_pem(key.public_key()))


def expected_signers(key: Ed25519PrivateKey, ledger_keys: Mapping[str, str]) -> dict[str, Any]:
    """Key ids of the coordinator, who signs now, and of the sites (ledger keys in hex), who may countersign."""
    return {
        "coordinator": key_id(key.public_key()),
        "sites": {site: key_id(ledger) for site, ledger in sorted(ledger_keys.items())},
    }


def override_in(files: RunFiles) -> OverrideRecord | None:
    """The override of this release, if there is one."""
    return read_gates(load_json(files.gates.read_bytes())).override if files.gates.exists() else None


def write_descriptions(
    files: RunFiles, protocol: Protocol, names: Iterable[str], consortium: str | None = None
) -> None:
    """Write what describes the released files, `names`, and is signed with them: schema, README, data card, RO-Crate.

    The README says whether a gate was overridden. The same run gives the same bytes, so that signing again keeps
    countersignatures.
    """
    names = list(names)
    gates = read_gates(load_json(files.gates.read_bytes())) if files.gates.exists() else None
    write_schema(files, protocol)
    write_atomic(files.out / README, readme(names, gates))
    write_metadata(files, protocol, names, consortium)


def write_manifest(path: Path, statement: Mapping[str, Any], key: Ed25519PrivateKey) -> None:
    """Sign and write; if this very statement is there already, signed with `key`, its countersignatures stay."""
    envelope = sign(statement, key)
    with contextlib.suppress(OSError, ValueError, VerifyError):
        before = load_json(path.read_bytes())
        opened = read_envelope(before)
        if opened.payload == read_envelope(envelope).payload and opened.signed_by(key.public_key()):
            envelope = before
    write_atomic(path, manifest_text(envelope))


def manifest_text(envelope: Mapping[str, Any]) -> str:
    """An envelope as it stands in its file."""
    return json.dumps(envelope, indent=1)


def verify_release(bundle: Path, key_path: Path | None) -> dict[str, Any]:
    """Check the signature of one key, every file and the form of privacy.json; returns the signed statement.

    `VerifyError` names what differs.
    """
    return dict(examine_release(bundle, key_path).require().statement)


def examine_release(
    bundle: Path, key_path: Path | None = None, trust: Path | None = None, revoked: Path | None = None
) -> Verification:
    """What checking a folder or archive finds. The key must have signed; without one and without a folder of trusted
    keys it is the key beside the manifest, which shows that the files fit together and not who made them.

    `VerifyError` where nothing can be said about the files: see `check_bundle`.
    """
    contents = read_contents(bundle)
    envelope_of(contents)
    found = load_trust(trust, revoked) if trust is not None else Trust({}, revoked_keys(revoked))
    if key_path is None and trust is None:
        if contents.archive:
            raise VerifyError(f"{bundle}: an archive holds no key", fix="name the coordinator's key: --key or --trust")
        key_path = next((bundle / name for name in (SIMULATION_KEY, RELEASE_KEY) if (bundle / name).exists()), None)
        key_path = key_path or bundle / SIMULATION_KEY
    if key_path is None:
        return check_bundle(contents, found)
    key = load_public_key(key_path)
    name = next((known for known, other in found.keys.items() if key_id(other) == key_id(key)), str(key_path.name))
    return check_bundle(contents, Trust({**found.keys, name: key}, found.revoked), [name])


def summarise(
    result: SimulationResult,
    sites: dict[str, Any],
    rounds: list[dict[str, Any]],
    statement: dict[str, Any],
    metrics: dict[str, Any],
    cohort: Table,
) -> dict[str, Any]:
    """What the last screen shows and `--json` prints."""
    study = result.protocol.study
    exposure = {entry["site"]: entry["exposure"] for entry in statement["entries"]}
    return {
        "study": study.study.name,
        "study_digest": result.protocol.digest,
        "out": str(result.files.out),
        "mode": study.training.mode,
        "sites": sites["joined"],
        "not_joined": sites["not_joined"],
        "rounds": study.training.rounds,
        "certificate": max(line["certificate"] for line in rounds),
        "certificate_bound": study.model.decoder_lipschitz if study.training.mode != "none" else None,
        "epsilon": largest_epsilon(statement),
        "epsilon_in_words": epsilon_in_words(statement),
        "lines": [
            {"applies_to": population, "conditional": conditional, "epsilon": value}
            for (population, conditional), value in largest_lines(statement).items()
        ],
        "exposure": exposure,
        "rows": len(cohort),
        "fidelity": {
            name: metrics["fidelity"][name]
            for name in ("ks_mean", "tv_mean", "missingness_mean", "correlation_difference")
        },
        "utility": metrics["utility"],
        "seconds": {name: round(value, 2) for name, value in result.seconds.items()},
        "files": {path.name: _purpose(path.name) for path in sorted(result.files.out.iterdir())},
    }


def _purpose(name: str) -> str:
    return PURPOSES.get(name, "")
