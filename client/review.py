"""What the steward is asked, in plain words: studies and app bundles that wait for a decision, and the decisions.

Everything a coordinator wrote is escaped before it reaches a terminal (`client.bundles.printable`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from client.approvals import Approvals, Decision, Request, Verdict
from client.bundles import BundleStore, differences, installed_files, list_files, printable, read_bundle
from client.site import SiteConfig
from common.audit import AUDIT_LOG, AuditLog
from common.errors import CohortiumError, SiteError
from common.evaluation.plan import count_plan, score_names, secrets_of
from common.gates import limits_in_words
from common.messages import NEVER_SENT
from common.privacy.ledger_keys import load_key
from common.privacy.memory import remembering
from common.schema import Column
from common.study import Protocol

SHORTEST = 8
INFINITE = "infinity"
MOST_REMOVED = 20
INSTALLED = "the software installed here"
DESCRIPTION = "pyproject.toml"


class Review:
    """The requests of one site, described and decided."""

    def __init__(self, config: SiteConfig) -> None:
        self.config = config
        self.key = load_key(config.site.state / "ledger.key")
        self.approvals = Approvals(config.site.state, config.site.name)
        self.bundles = BundleStore(config.site.state)

    def find(self, prefix: str) -> Request:
        """The one request whose digest begins with `prefix`; `SiteError` if there is none or more than one."""
        wanted = prefix.strip().lower().removesuffix("…")
        if not re.fullmatch(rf"[0-9a-f]{{{SHORTEST},64}}", wanted):
            raise SiteError(
                f"{printable(prefix)!r} is not a digest: expected at least {SHORTEST} of its hexadecimal digits",
                fix="`cohortium-site review` lists them",
            )
        found = [request for request in self.approvals.requests() if request.digest.startswith(wanted)]
        if len(found) != 1:
            how = "nothing with this digest has been asked for here" if not found else f"{len(found)} digests begin so"
            raise SiteError(f"{wanted}: {how}", fix="`cohortium-site review` lists what is waiting; copy more digits")
        return found[0]

    def listed(self, everything: bool = False) -> list[dict[str, Any]]:
        """What waits, or all that was ever asked, in a line each."""
        lines = [self.summary(request) for request in self.approvals.requests()]
        return [line for line in lines if everything or line["standing"] == "waiting"]

    def summary(self, request: Request) -> dict[str, Any]:
        """One request, briefly."""
        try:
            standing: str = self.approvals.standing(request.kind, request.digest, self.key)
        except SiteError:
            standing = "damaged"
        what: dict[str, Any] = {}
        if request.kind == "study":
            try:
                protocol = self._protocol(request)
                training = protocol.study.training
                what = {"name": protocol.study.study.name, "mode": training.mode, "rounds": training.rounds}
            except SiteError:
                what = {"name": "unreadable"}
        elif isinstance(size := request.content.get("bytes"), int):
            what = {"bytes": size}
        dates = {"first_seen": request.first_seen, "expires": request.expires}
        return {"kind": request.kind, "digest": request.digest, "standing": standing} | dates | what

    def details(self, request: Request) -> dict[str, Any]:
        """Everything the steward needs to decide."""
        more = (
            self._bundle(request) if request.kind == "bundle" else describe_study(self.config, self._protocol(request))
        )
        return self.summary(request) | more

    def decide(self, request: Request, verdict: Verdict, by: str, reason: str) -> Decision:
        """Sign and log a decision. The log comes first: nothing is approved that is not logged."""
        action = "approve" if verdict == "approved" else "deny"
        study = request.digest if request.kind == "study" else ""
        log = AuditLog(self.config.site.state / AUDIT_LOG, self.config.site.name)
        fields = {"kind": request.kind, "by": by, "reason": reason}
        log.append(action, study=study, digest=request.digest, outcome=verdict, **fields)
        try:
            decision = self.approvals.decide(request.kind, request.digest, verdict, by=by, reason=reason, key=self.key)
        except CohortiumError:
            log.append(action, study=study, digest=request.digest, outcome="failed", **fields)
            raise
        if request.kind == "bundle" and verdict == "denied":
            self.bundles.forget(request.digest)
        return decision

    def _protocol(self, request: Request) -> Protocol:
        try:
            protocol = Protocol.from_json(dict(request.content["protocol"]))
        except (KeyError, TypeError, ValueError, CohortiumError):
            protocol = None
        if protocol is None or protocol.digest != request.digest:
            raise SiteError(
                f"the request for study {request.digest[:16]}… is damaged: it does not hold the study of this digest",
                fix="remove its file from state/approvals; the coordinator asks again",
            )
        return protocol

    def _bundle(self, request: Request) -> dict[str, Any]:
        content = self.bundles.load(request.digest)
        if content is None:
            return {"files": [], "compared_with": "", "differences": [], "note": _NOT_KEPT}
        files = read_bundle(content)
        name, old = self._last_approved(request.digest)
        return {
            "files": [{"file": f.name, "bytes": f.size, "sha256": f.sha256} for f in list_files(files)],
            "compared_with": name,
            "differences": [difference.to_json() for difference in differences(old, files)],
            "note": _NEVER_RUN,
        }

    def _last_approved(self, but: str) -> tuple[str, Mapping[str, bytes]]:
        """The bundle approved last, else the software installed here."""
        decided: list[tuple[str, str]] = []
        for request in self.approvals.requests():
            if request.kind != "bundle" or request.digest == but:
                continue
            try:
                decision = self.approvals.decision("bundle", request.digest, self.key)
            except SiteError:
                continue
            if decision is not None and decision.verdict == "approved":
                decided.append((decision.time, request.digest))
        for _, digest in sorted(decided, reverse=True):
            content = self.bundles.load(digest)
            if content is not None:
                return f"bundle {digest}, approved last", read_bundle(content)
        return INSTALLED, installed_files()


def describe_study(config: SiteConfig, protocol: Protocol) -> dict[str, Any]:
    """The study as data: what it does, what leaves, what it costs, and what this site's policy says against it."""
    study = protocol.study
    withheld = config.policy.withheld(protocol.schema)
    return {
        "sites": dict(study.sites),
        "columns": [
            {
                "name": column.name,
                "kind": column.kind,
                "required": column.required,
                "withheld": column.name in withheld,
                "values": _values(column),
            }
            for column in protocol.schema.columns
        ],
        "target": protocol.target,
        "leaves": what_leaves(protocol),
        "never_leaves": list(NEVER_SENT),
        "synthetic_rows": study.release.rows,
        "release": study.release.method,
        "gates": limits_in_words(study),
        "cost": cost(config, protocol),
        "objections": config.objections(protocol),
    }


def what_leaves(protocol: Protocol) -> list[str]:
    """In sentences."""
    study = protocol.study
    radius, rounds, mode = study.training.update_norm, study.training.rounds, study.training.mode
    how = {
        "constrained": f"projected onto Euclidean norm {radius:g}"
        + (", with noise" if study.privacy.update_noise else ""),
        "dpsgd": f"trained with DP-SGD and projected onto Euclidean norm {radius:g}",
        "anchored": "",
        "none": "without any bound",
    }[mode]
    found = ["when joining: the site's name, its number of patients, and the signed head of its ledger"]
    if study.anchor.epsilon is not None:
        found.append(
            "then, twice: statistics with Gaussian noise, calibrated to epsilon"
            f" {study.anchor.epsilon:g} for both together: counts of every column's values or bins, and second moments"
            " of rows that were encoded with the noised counts of all sites and clipped"
        )
    if rounds > 0:
        found.append(f"in each of {rounds} rounds: one update of the decoder, {how}, and the signed head of the ledger")
    if study.release.method == "channel":
        share = study.channel.release_share
        who = "all patients" if share == 0 else f"{share:.0%} of the patients, who do not train"
        found.append(
            f"after the last round: up to {study.release.rows} synthetic rows drawn from {who} through this site's own"
            f" bounded encoder, with noise calibrated to epsilon {study.channel.epsilon:g}"
        )
    else:
        found.append(f"for the cohort: nothing; the coordinator samples {study.release.rows} rows from the decoder")
    return found + _evaluation_leaves(protocol)


def _evaluation_leaves(protocol: Protocol) -> list[str]:
    evaluation = protocol.study.evaluation
    if evaluation.method == "none":
        return []
    plan, scores = count_plan(protocol), len(score_names(protocol))
    tables = f"{len(plan.tables)} tables, in each of which a patient is in one cell ({plan.size} numbers)"
    how = {
        "accounted": f"with Gaussian noise calibrated to epsilon {evaluation.epsilon:g} for all of them together",
        "unnoised": f"exact, none under the larger of {evaluation.min_count} and this site's min_count, and {scores}"
        " scores of models and attacks, also without noise; no epsilon covers them",
    }[evaluation.method]
    found = [f"when the cohort is made: how this site's patients compare with it, {tables}, {how}"]
    if evaluation.holdout:
        guessed = f", guesses at {', '.join(secrets_of(protocol))}" if secrets_of(protocol) else ""
        found.append(
            f"  among them attacks on the cohort (membership, copies, linking{guessed}), on the patients who took part"
            f" and on the {evaluation.holdout:.0%} who are held out of training and release"
        )
    return found


def cost(config: SiteConfig, protocol: Protocol) -> dict[str, Any]:
    """ε of the whole study at this site, composed beforehand: alone, and with all that is spent already."""
    from client.budget import Budget  # torch: for this command only
    from client.patients import load_patients
    from common.privacy.accountant import account_lines
    from common.privacy.ledger import Ledger
    from common.privacy.statement import CONDITION

    state = config.site.state
    try:
        key, patients = load_key(state / "ledger.key"), len(load_patients(config, protocol))
        ledger_path, entries = state / "ledger.sqlite", []
        if ledger_path.is_file():
            with Ledger(ledger_path, config.site.name) as ledger:
                entries = ledger.entries()
        with remembering(state / "accounting.json", config.site.name, key):
            budget = Budget(protocol, patients, math.inf)
            alone, total = budget.approve([]), budget.approve(entries)
            lines = account_lines(budget.planned, alone.delta)
            refused = ""
            try:
                Budget.of(protocol, config.policy, patients).approve(entries)
            except CohortiumError as error:
                refused = error.message
    except CohortiumError as error:
        return {"problem": error.message}
    return {
        "patients": patients,
        "epsilon": _number(alone.epsilon),
        "epsilon_with_all_studies": _number(total.epsilon),
        "delta": alone.delta,
        "unconditional": alone.unconditional,
        "unit": alone.unit,
        "adversary": alone.adversary,
        "relation": alone.relation,
        "basis": list(alone.basis),
        "lines": [
            {
                "applies_to": line.applies_to,
                "epsilon": _number(line.epsilon),
                "condition": "" if line.unconditional else CONDITION,
            }
            for line in lines
        ],
        "exceeds": refused,
    }


def render(details: Mapping[str, Any]) -> list[str]:
    """One request for the terminal."""
    lines = [f"{details['kind']} {details['digest']}: {details['standing']}"]
    lines += [f"first asked {details['first_seen']}, expires {details['expires']}"]
    lines += _render_study(details) if details["kind"] == "study" else _render_bundle(details)
    return [printable(line) for line in lines]


def render_list(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Several requests for the terminal."""
    found = ["Nothing waits for a decision."] if not lines else []
    for line in lines:
        what = (
            f"{line['bytes']} bytes" if "bytes" in line else f"{line.get('name', '')}, {line.get('mode', 'unreadable')}"
        )
        found.append(f"{line['kind']:<7}{line['digest'][:16]}  {line['standing']:<9} until {line['expires']}  {what}")
    return [printable(line) for line in found]


def _render_study(details: Mapping[str, Any]) -> list[str]:
    lines = [f"Study {details['name']}: mode {details['mode']}, {details['rounds']} rounds", "", "Columns it uses:"]
    for column in details["columns"]:
        notes = [column["kind"], column["values"], *(["withheld by this site"] if column["withheld"] else [])]
        lines.append(f"  {column['name']}: {', '.join(note for note in notes if note)}")
    lines += ["", "What leaves this site:", *(f"  {line}" for line in details["leaves"])]
    lines += ["What never leaves it:", f"  {', '.join(details['never_leaves'])}", ""]
    lines += ["What the cohort has to show before it is released:", *(f"  {line}" for line in details["gates"]), ""]
    found = details["cost"]
    if "problem" in found:
        lines.append(f"What it would cost cannot be said: {found['problem']}")
    else:
        given = "" if found["unconditional"] else ", given the encoder and the decoder"
        lines += [
            f"What it would cost: epsilon {found['epsilon']} at delta {found['delta']:g} for {found['unit']}{given}",
            f"  together with all studies of this site: epsilon {found['epsilon_with_all_studies']}"
            f" ({found['patients']} patients)",
        ]
        if len(found["lines"]) > 1:  # a channel: not the same for all patients, or not without a condition
            lines += ["  of the study alone:", *(f"    {_line(line)}" for line in found["lines"])]
        lines.append(f"  against the {found['adversary']}, who sees most; relation: {found['relation']}")
        lines += [f"  basis: {basis}" for basis in found["basis"]]
        if found["exceeds"]:
            lines.append(f"  more than this site allows: {found['exceeds']}")
    lines += ["", "This site's policy forbids it:" if details["objections"] else "This site's policy allows it."]
    return lines + [f"  {objection}" for objection in details["objections"]]


def _render_bundle(details: Mapping[str, Any]) -> list[str]:
    lines = [details["note"], "", f"{len(details['files'])} files:"]
    lines += [f"  {file['bytes']:>9}  {file['sha256'][:16]}  {file['file']}" for file in details["files"]]
    if details["compared_with"]:
        lines += ["", f"Compared with {details['compared_with']}:"]
        changes = [found for found in details["differences"] if found["change"] != "removed"]
        removed = [found for found in details["differences"] if found["change"] == "removed"]
        shown = changes + (removed if len(removed) <= MOST_REMOVED else [])
        lines += [f"  {found['change']:<8} {found['file']}" for found in shown]
        lines += [f"  removed  {len(removed)} files, which --json names"] if len(removed) > MOST_REMOVED else []
        lines += [] if details["differences"] else ["  no difference"]
        other = {found["file"] for found in details["differences"]} - {DESCRIPTION}
        if details["compared_with"] == INSTALLED and not other:
            lines.append(f"Every file of code is the one installed here; {DESCRIPTION} describes the bundle to Flower.")
    for found in details["differences"]:
        if found["diff"]:
            lines += ["", *found["diff"]]
    return lines


def _values(column: Column) -> str:
    if column.levels:
        shown = ", ".join(column.levels[:6])
        return shown + (f" and {len(column.levels) - 6} more" if len(column.levels) > 6 else "")
    return f"{column.minimum:g} to {column.maximum:g}" if math.isfinite(column.minimum) else ""


def _line(found: Mapping[str, Any]) -> str:
    if found["condition"]:
        return f"its rows by themselves: epsilon {found['epsilon']}; {found['condition']}"
    return f"for {found['applies_to']}: epsilon {found['epsilon']}"


def _number(value: float) -> float | str:
    """Six digits, rounded up: what is shown is a bound as well."""
    return math.ceil(value * 1e6) / 1e6 if math.isfinite(value) else INFINITE


_NEVER_RUN = (
    "The code of a bundle is never run, unpacked or installed here; the site runs only the software installed on it."
    " Approving means: take part in runs that carry this label."
)
_NOT_KEPT = "The bundle was not kept: it is larger than 10 MiB, or too many wait already. Decide about others first."
