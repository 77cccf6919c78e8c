"""`cohortium status`: whether the SuperLink is up, which sites are online, and how far the study has come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable

from common.errors import CohortiumError, ExitCode, FederationError
from server.consortium import load_facts
from server.enrol import load_registry
from server.launch import complete_lines, read_waiting
from server.nodes import Control, list_nodes
from server.processes import StateFolder
from server.run import RunFiles, RunSettings
from server.runs import Runs
from server.supervisor import healthy


def coordinator_status(consortium: Path) -> dict[str, Any]:
    """Everything as plain data; a SuperLink that is down is part of the answer."""
    consortium = consortium.resolve()
    facts, registry, state = load_facts(consortium), load_registry(consortium), StateFolder(consortium)
    ca = consortium / "ca.pem"
    try:
        addresses = state.read_addresses()
        up = healthy(addresses["private"], ca)
    except FederationError:
        addresses, up = {}, False
    nodes = {node.node_id: node for node in list_nodes(Control(addresses["private"], ca))} if up else {}
    by_key = {node.node_key: node for node in nodes.values()}
    sites: dict[str, dict[str, Any]] = {}
    for name, entry in sorted(registry.sites.items()):
        node = nodes.get(entry.node_id or "") or by_key.get(entry.node_key)
        sites[name] = {
            "enrolled": entry.active,
            "registered": node is not None and node.status != "unregistered",
            "status": "revoked"
            if not entry.active
            else node.status
            if node
            else "unknown"
            if not up
            else "not registered",
            "connected_since": node.last_seen if node and node.status == "online" else "",
        }
    return {
        "consortium": facts["name"],
        "superlink": {"up": up, **{key: addresses[key] for key in ("public", "private") if key in addresses}},
        "certificate_expires": facts["server"]["not_after"],
        "sites": sites,
        "study": _study(state, Runs(addresses["private"], ca) if up else None),
    }


def _study(state: StateFolder, runs: Runs | None) -> dict[str, Any] | None:
    """The last launch: its run, its rounds, and whom it waits for."""
    launches = sorted(state.runs.glob("*.json"), key=lambda path: path.stat().st_mtime) if state.runs.is_dir() else []
    if not launches:
        return None
    try:
        settings = RunSettings.load(launches[-1])
        files = RunFiles(settings.out)
        launch = json.loads((files.out / "launch.json").read_text(encoding="utf-8"))
        rounds = complete_lines(files.rounds)
        run = runs.state(str(launch["run"])) if runs is not None else None
    except (OSError, ValueError, KeyError, CohortiumError):
        return None  # removed or moved since
    last = rounds[-1] if rounds else None
    return {
        "name": settings.protocol.study.study.name,
        "digest": settings.protocol.digest,
        "out": str(files.out),
        "run": str(launch["run"]),
        "status": "unknown" if run is None else run.outcome if run.over else run.status,
        "round": len(rounds),
        "rounds": settings.protocol.study.training.rounds,
        "missing": dict(last["dropped"]) if last else {},
        "waiting": read_waiting(files) if run is not None and not run.over else {},
    }


def status_table(status: dict[str, Any]) -> RichTable:
    """For the coordinator's screen."""
    table = RichTable(title=status["consortium"], show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    link = status["superlink"]
    where = f" (sites: {link['public']}, this machine: {link['private']})" if "public" in link else ""
    table.add_row("SuperLink", ("up" if link["up"] else "down") + where)
    table.add_row("certificate until", status["certificate_expires"])
    for name, site in status["sites"].items():
        seen = f" since {site['connected_since'][:19]}Z" if site["connected_since"] else ""
        table.add_row(name, site["status"] + seen)
    study = status["study"]
    if study is None:
        table.add_row("study", "none was launched")
        return table
    table.add_row("study", f"{study['name']}: {study['status']}, round {study['round']} of {study['rounds']}")
    table.add_row("results", study["out"])
    for name, reason in (study["waiting"] | study["missing"]).items():
        table.add_row("waiting for" if name in study["waiting"] else "missing", f"{name}: {reason}")
    return table


def status_code(status: dict[str, Any]) -> ExitCode:
    """A probe for scripts: FEDERATION while the SuperLink is down."""
    return ExitCode.OK if status["superlink"]["up"] else ExitCode.FEDERATION
