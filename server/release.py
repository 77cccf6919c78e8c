"""From the raw results of a run to a release: evaluation, privacy statement, report, signed manifest."""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.digest import sha256_of_file
from common.errors import OutputError, VerifyError
from common.evaluation.metrics import evaluate
from common.files import write_atomic
from common.privacy.events import Event
from common.privacy.ledger import Ledger
from common.privacy.ledger_entries import Findings
from common.privacy.statement import epsilon_in_words, largest_epsilon, largest_lines, privacy_statement
from common.privacy.statement_schema import problem_of
from common.signing import load_public_key, open_envelope, public_pem, sign, statement_for, verify_files
from common.table import Table, read_table
from server.report import render_report
from server.run import RunFiles
from server.simulation import SimulationResult

SIMULATION_KEY, RELEASE_KEY = "simulation-key.pub", "release.pub"
CHANNEL_RELEASE = "release.json"


def release_simulation(result: SimulationResult, held_out: Table | None, *, thorough: bool = True) -> dict[str, Any]:
    """Evaluate, state, report and sign what a simulation left; returns the summary that `--json` prints.

    The simulation owns all patients, so it may compare with them without accounting; metrics.json says so. The signing
    key exists for this call only: it shows that nothing changed afterwards, not who ran it. With `thorough` false only
    fidelity and utility are measured.
    """
    files, protocol = result.files, result.protocol
    started = time.perf_counter()
    sites = json.loads(files.sites.read_text(encoding="utf-8"))
    ledgers = inspect_ledgers(files)
    heads = {name: (found.head.length, found.head.head) for name, found in ledgers.items()}
    events: dict[str, list[Event]] = {
        name: [entry.event for entry in found.entries if entry.study == protocol.digest]
        for name, found in ledgers.items()
    }
    patients = {name: joined["patients"] for name, joined in sites["joined"].items()}
    statement = privacy_statement(protocol, {name: events.get(name, []) for name in patients}, patients)
    write_statement(files.privacy, statement)

    cohort, _ = read_table(files.cohort_csv, protocol.schema, out_of_bounds="refuse")
    seed = protocol.study.study.seed or 0
    evaluation = protocol.study.evaluation
    metrics = evaluate(
        cohort,
        result.real,
        held_out,
        seed,
        target=protocol.target,
        groups=evaluation.groups,
        secrets=evaluation.secrets,
        sites=[name for name, rows in result.patients.items() for _ in range(rows)],
        thorough=thorough,
    )
    write_atomic(files.metrics, json.dumps(metrics, indent=1, allow_nan=False))
    rounds = read_rounds(files)
    result.seconds["evaluation"] = time.perf_counter() - started

    report = render_report(protocol, sites, rounds, statement, metrics, cohort, result.real)
    write_atomic(files.report, report)
    sign_release(files, protocol.digest, heads)
    result.seconds["release"] = time.perf_counter() - started
    return summarise(result, sites, rounds, statement, metrics, cohort)


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
        *([files.evaluation] if files.evaluation.exists() else []),
        files.cohort_csv,
        files.cohort_parquet,
        files.metrics,
        files.privacy,
        files.report,
        files.rounds,
        files.sites,
        files.study,
    ]


def sign_release(files: RunFiles, study: str, ledger_heads: dict[str, tuple[int, str]]) -> None:
    """Write the manifest and the public half of a key made for it."""
    key = Ed25519PrivateKey.generate()
    predicate = {
        "study": study,
        "software": f"cohortium {version('cohortium')}",
        "simulation": True,
        "decoder_sha256": sha256_of_file(files.decoder),
        "ledgers": {name: {"length": length, "head": head} for name, (length, head) in ledger_heads.items()},
    }
    statement = statement_for(files.out, [path.name for path in released_files(files)], predicate)
    write_atomic(files.manifest, json.dumps(sign(statement, key), indent=1))
    write_atomic(files.out / SIMULATION_KEY, public_pem(key.public_key()))


def verify_release(directory: Path, key_path: Path | None) -> dict[str, Any]:
    """Check signature, every file and the form of privacy.json; returns the signed statement.

    `VerifyError` names what differs.
    """
    manifest = RunFiles(directory).manifest
    try:
        envelope = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise VerifyError(f"{manifest}: no readable manifest", fix="name the directory of a release") from None
    beside = next((name for name in (SIMULATION_KEY, RELEASE_KEY) if (directory / name).exists()), SIMULATION_KEY)
    statement = open_envelope(envelope, load_public_key(key_path or directory / beside))
    privacy = RunFiles(directory).privacy
    if privacy.name in verify_files(directory, statement):
        _check_statement(privacy)
    return statement


def _check_statement(path: Path) -> None:
    try:
        problem = problem_of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        problem = "it is not JSON"
    if problem is not None:
        raise VerifyError(
            f"{path}: signed, but it does not fit the schema of a privacy statement: {problem}",
            fix="verify with the version of Cohortium that made the release, or ask for a corrected one",
        )


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
        "rounds": len(rounds),
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


PURPOSES = {
    "cohort.csv": "the synthetic cohort",
    "cohort.parquet": "the same with types",
    "report.html": "the report: open it in a browser",
    "privacy.json": "what is claimed for every site against every adversary",
    "metrics.json": "fidelity, utility, inference, groups, attacks: un-noised",
    "evaluation.json": "how the sites' patients compare with the cohort, from what the sites sent",
    "rounds.jsonl": "one line a round: sites, certificate",
    "sites.json": "who took part, with which weight",
    "study.json": "the protocol as approved",
    CHANNEL_RELEASE: "where the cohort's rows come from, by site",
    "manifest.dsse.json": "signed SHA-256 of every released file",
    SIMULATION_KEY: "public key of the manifest",
    "decoder.safetensors": "the global decoder (not part of the release)",
    "ledger-heads.json": "how far the coordinator has seen every site's ledger (not part of the release)",
    "ledgers": "the sites' ledgers (not part of the release)",
    "site-logs": "the sites' own logs (not part of the release)",
    "runtime.log": "what Flower and Ray printed",
}


def _purpose(name: str) -> str:
    return PURPOSES.get(name, "")
