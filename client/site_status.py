"""`cohortium-site status`: whether the site runs and is connected, its studies with what they spent, and what waits."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from client.bundles import printable
from client.review import Review, render_list
from client.site import SiteConfig
from client.start import SERVICES, Run
from client.supernode import read_contact
from client.trouble import Trouble
from common.errors import SiteError
from common.health import probe


def site_status(config: SiteConfig) -> dict[str, Any]:
    """As data; nothing in it is a patient's."""
    run, review = Run(config.site.state), Review(config)
    running, facts = run.running, run.read_facts()
    well = probe(str(facts["health"]), SERVICES) if running and "health" in facts else None
    last = read_contact(run.contact).get("time")
    return {
        "site": config.site.name,
        "running": running,
        "process": facts.get("pid") if running else None,
        "since": facts.get("started") if running else None,
        "health": well,
        "connected": bool(well and well["superlink"]),
        "seconds_since_contact": None if last is None else round(max(0.0, time.time() - last), 1),
        "trouble": Trouble(config.site.state).read(),
        "simulation": config.policy.simulation,
        "studies": _studies(config, review),
        "waiting": review.listed(),
    }


def render_status(status: Mapping[str, Any]) -> list[str]:
    """For the terminal."""
    state = f"running (process {status['process']}, since {status['since']})" if status["running"] else "not running"
    lines = [f"Site {status['site']}: {state}"]
    if status["health"] is not None:
        lines += [f"  {name}: {'well' if well else 'not well'}" for name, well in status["health"].items()]
    elif status["running"]:
        lines.append("  it does not answer health probes")
    if status["seconds_since_contact"] is not None:
        lines.append(f"  last answer of the SuperLink: {status['seconds_since_contact']:g} s ago")
    if status["trouble"] is not None:
        trouble = status["trouble"]
        lines += [f"  since {trouble['since']}: {trouble['message']}", f"  how to mend it: {trouble['fix']}"]
    lines += ["", "Studies:" if status["studies"] else "No study has spent anything here."]
    for study in status["studies"]:
        spent = "; ".join(
            f"epsilon {found['epsilon']} at delta {found['delta']:g}{'' if found['unconditional'] else ', conditional'}"
            for found in study["spent"]
        )
        rounds = f"round {study['round']}" + (f" of {study['rounds']}" if study["rounds"] else "")
        lines.append(f"  {study['name']} ({study['study'][:16]}), {study['standing']}: {rounds}; {spent}")
    waiting = render_list(status["waiting"])
    lines += ["", *(["Waiting for a decision:", *(f"  {line}" for line in waiting)] if status["waiting"] else waiting)]
    return [printable(line) for line in lines]


def _studies(config: SiteConfig, review: Review) -> list[dict[str, Any]]:
    from client.ledger_statement import ledger_statement
    from common.privacy.ledger import Ledger

    path = config.site.state / "ledger.sqlite"
    if not path.is_file():
        return []
    with Ledger(path, config.site.name) as ledger:
        findings = ledger.inspect()
    statement = ledger_statement(findings, config.site.state / "studies", 1e-5)
    latest: dict[str, int] = {}
    for entry in findings.entries:
        latest[entry.study] = max(latest.get(entry.study, 0), entry.round)
    planned = {line["digest"]: line.get("rounds") for line in review.listed(everything=True)}
    found: list[dict[str, Any]] = []
    for study in statement["studies"]:
        digest, rounds = study["study"], planned.get(study["study"])
        try:
            standing: str = review.approvals.standing("study", digest, review.key)
        except SiteError:
            standing = "damaged"
        spent = [
            {"epsilon": line["epsilon"], "delta": line["delta"], "unconditional": line["unconditional"]}
            for line in study["guarantees"]
            if line["adversary"] == "coordinator"
        ]
        number = latest[digest] if rounds is None else min(latest[digest], rounds)
        names = {"study": digest, "name": study["name"], "standing": standing}
        found.append(names | {"round": number, "rounds": rounds, "spent": spent})
    return found
