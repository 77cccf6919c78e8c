"""`cohortium audit`: canaries in a twin of the study, and how much of them every adversary finds again.

The twin is the study with some patients of one site replaced by rows that belong to nobody. It is run, attacked and
kept apart: nothing of it is released. For simulation on data that the coordinator owns: what an audit finds depends on
the patients, so that in a deployment it would be a query like any other (privacy.md, section 0).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.encoding import TableEncoding
from common.errors import FederationError, UsageError, VerifyError
from common.evaluation.audit import CONFIDENCE, Bound, audit_scores, declared_guesses, strongest
from common.evaluation.canaries import Canaries, draw_canaries
from common.evaluation.canary_scores import SEEN_BY, cohort_scores, message_scores, paired, reconstruction
from common.files import write_atomic
from common.privacy.accountant import Adversary, check_delta
from common.privacy.dpsgd import dpsgd_schedule
from common.privacy.statement import privacy_statement
from common.privacy.update_noise import require_useful_noise
from common.study import Protocol, Study, load_protocol
from common.table import Table, read_table
from server.audit_records import Audit, Guesses, PlantedCanaries, ScoreLine
from server.checkpoint import build_decoder, load_checkpoint
from server.cohort import write_cohort
from server.progress import show_rounds
from server.recording import recorded_rounds
from server.release import inspect_ledgers
from server.run import RunFiles
from server.simulation import load_sites, simulate

JSON_NAME = "audit.json"
TWIN = "twin"
SITES = ".twin-sites"
TWIN_NAME = " audit twin"
MARK = "NOT-FOR-RELEASE.txt"
MARK_TEXT = (
    "This folder is the twin of a study, made by `cohortium audit`: some of its patients were replaced by canaries,\n"
    "rows that belong to nobody. Its cohort and its decoder are wrong on purpose. Nothing here belongs in a release.\n"
)
NO_EVIDENCE = (
    "No lower bound is evidence of privacy: it shows what these attacks found, and the next attack may find more."
    " A bound of 0 says nothing."
)
QUERY = (
    "The result depends on patients and no ε covers it: in a deployment it would be a query. Run it on data that you"
    " own, as a simulation, and do not publish it as if it were free."
)


@dataclass(frozen=True)
class Plan:
    """Everything that is known before the twin runs."""

    protocol: Protocol
    twin: Protocol
    directory: Path
    tables: Mapping[str, Table]
    site: str
    canaries: Canaries


def plan_audit(
    path: Path, directory: Path, *, canaries: int = 200, site: str | None = None, overrides: Sequence[str] = ()
) -> Plan:
    """Read and check all input; no federation has started then. `site` None: the one with most patients.

    Raises what a simulation of the study would be refused for, `UsageError` for an unknown site, and `DataError` or
    `SchemaError` for a number of canaries that does not fit the site or the schema.
    """
    protocol = load_protocol(path, overrides)
    if protocol.study.training.rounds == 0:
        raise UsageError(
            'training.mode = "anchored" has no rounds whose messages could be attacked',
            fix="its statistics are audited by likelihood ratio in the software's own tests; see docs/anchor.md",
        )
    tables = load_sites(directory, protocol)
    study, patients = protocol.study, {name: len(table) for name, table in tables.items()}
    if site is None:
        site = max(sorted(patients), key=lambda name: patients[name])
    elif site not in patients:
        raise UsageError(
            f"--site {site!r}: {directory} holds no such site, only {', '.join(sorted(patients))}",
            fix="name one of these, or leave --site out for the largest",
        )
    planted = draw_canaries(protocol.schema, patients[site], canaries, study.study.seed)
    require_useful_noise(study, build_decoder(protocol, seed=0).size, patients)
    for name, number in patients.items():
        check_delta(study.privacy.delta, number, name)
        if study.training.mode == "dpsgd":
            dpsgd_schedule(study, number)
    return Plan(protocol, _twin(protocol), directory, tables, site, planted)


def _twin(protocol: Protocol) -> Protocol:
    """The same study under another name, and so with another digest: no ledger or checkpoint can confuse the two."""
    document = protocol.study.document()
    document["study"]["name"] = document["study"]["name"][: 80 - len(TWIN_NAME)] + TWIN_NAME
    return Protocol(Study.model_validate(document), protocol.schema)


def run_audit(plan: Plan, out: Path, *, quiet: bool) -> Audit:
    """Run the twin in `out`/twin, which is claimed already, attack it, and write audit.json.

    The planted table lies in `out` while the twin runs and is removed whatever happens.
    """
    files, sites = RunFiles(out / TWIN), out / SITES
    write_atomic(files.out / MARK, MARK_TEXT)
    try:
        _lay_out(plan, sites)
        with show_rounds(plan.twin.study.training.rounds, quiet=quiet) as on_round:
            simulate(plan.twin, sites, plan.tables, files, on_round, record=plan.site)
    finally:
        shutil.rmtree(sites, ignore_errors=True)
    audit = judge(plan, attack(plan, files), _claims(plan, files))
    write_atomic(out / JSON_NAME, json.dumps(audit.model_dump(mode="json"), indent=1, allow_nan=False))
    return audit


def _lay_out(plan: Plan, sites: Path) -> None:
    """The other sites' files as they are, the audited one's with canaries."""
    sites.mkdir(mode=0o700)
    for name in plan.tables:
        if name != plan.site:
            (sites / f"{name}.csv").symlink_to((plan.directory / f"{name}.csv").resolve())
    planted, parquet = plan.canaries.plant(plan.tables[plan.site]), sites / "unused.parquet"
    write_cohort([planted], plan.protocol.schema, sites / f"{plan.site}.csv", parquet)
    parquet.unlink()


def attack(plan: Plan, files: RunFiles) -> dict[str, np.ndarray]:
    """Every score (canaries,) of what the twin left, by name; positive where the first row of a pair seems planted."""
    schema = plan.protocol.schema
    rows = Table(schema, np.vstack([plan.canaries.first.values, plan.canaries.second.values]))
    levels = TableEncoding(schema).encode(rows).levels
    if not any(recorded_rounds(files.out)):
        raise FederationError(
            f"site {plan.site!r} answered no round of the twin, so that there is nothing to audit",
            fix=f"see {files.sites} and {files.rounds} for the reason",
        )
    cohort, _ = read_table(files.cohort_csv, schema, out_of_bounds="refuse")
    values = cohort_scores(cohort, rows)
    values["reconstruction"] = reconstruction(load_checkpoint(files.decoder, plan.twin).decoder, levels)
    values |= message_scores(recorded_rounds(files.out), build_decoder(plan.twin, seed=0), levels)
    return {name: paired(values[name]) for name in SEEN_BY}


def _claims(plan: Plan, files: RunFiles) -> dict[Adversary, float | str]:
    """The ε that the twin's own ledgers give the audited site against every adversary."""
    events = {
        name: [entry.event for entry in found.entries if entry.study == plan.twin.digest]
        for name, found in inspect_ledgers(files).items()
    }
    joined = json.loads(files.sites.read_text(encoding="utf-8"))["joined"]
    patients = {name: site["patients"] for name, site in joined.items()}
    statement = privacy_statement(plan.twin, {name: events.get(name, []) for name in patients}, patients)
    return {entry["adversary"]: entry["epsilon"] for entry in statement["entries"] if entry["site"] == plan.site}


def judge(plan: Plan, scores: Mapping[str, np.ndarray], claims: Mapping[Adversary, float | str]) -> Audit:
    """The bounds of all scores, which hold together with probability `CONFIDENCE`, beside the claims."""
    canaries, study = plan.canaries, plan.protocol.study
    lines = []
    for name, values in scores.items():
        bounds = audit_scores(
            values,
            canaries.coins,
            declared_guesses(len(canaries)),
            delta=study.privacy.delta,
            level=(1.0 - CONFIDENCE) / len(scores),
        )
        best, claim = strongest(bounds), claims[SEEN_BY[name]]
        lines.append(
            ScoreLine(
                adversary=SEEN_BY[name],
                score=name,
                strongest=_guesses(best),
                declared=[_guesses(bound) for bound in bounds],
                claim="infinity" if isinstance(claim, str) else claim,
                refuted=not isinstance(claim, str) and best.epsilon > claim,
            )
        )
    seeded = study.study.seed is not None
    share = f"{len(canaries)} of {len(plan.tables[plan.site])} patients of {plan.site!r} were replaced by canaries"
    as_if = " Slots, coins and training come from the study's seed, so every ε is as if." if seeded else ""
    return Audit(
        study=study.study.name,
        study_digest=plan.protocol.digest,
        twin_digest=plan.twin.digest,
        mode=study.training.mode,
        delta=study.privacy.delta,
        confidence=CONFIDENCE,
        unit="one patient (one row)",
        neighbouring_relation="replacing the content of one patient slot at one site; patient numbers are public",
        canaries=PlantedCanaries(
            number=len(canaries), site=plan.site, patients=len(plan.tables[plan.site]), seeded=seeded
        ),
        lines=lines,
        cautions=[NO_EVIDENCE, QUERY, f"The twin is not the study: {share}.{as_if}"],
    )


def _guesses(bound: Bound) -> Guesses:
    return Guesses(
        guesses=bound.guesses,
        correct=bound.correct,
        level=bound.level,
        epsilon=bound.epsilon,
        reachable=bound.reachable,
    )


def require_unrefuted(audit: Audit) -> None:
    """`VerifyError` naming every claim that a lower bound exceeds, after audit.json is written."""
    if audit.refuted:
        listing = "\n".join(
            f"  - {line.adversary}, {line.score}: at least {line.strongest.epsilon:.2f}, claimed {line.claim}"
            for line in audit.refuted
        )
        raise VerifyError(
            f"the audit refutes the study's ε at {audit.confidence:.0%} confidence\n{listing}",
            fix="release nothing of this study. By chance this happens in one audit of twenty at most: repeat it with"
            " another seed; if it happens again, report a defect of Cohortium with audit.json",
        )
