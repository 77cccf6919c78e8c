"""`cohortium status`: whether the SuperLink is up, how every site stands, and how far the last study has come."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.errors import CohortiumError, ExitCode, FederationError
from common.gates import GATES, read_gates
from server.consortium import load_facts
from server.enrol import SiteEntry, load_registry
from server.nodes import Control, NodeInfo, list_nodes
from server.probe import ask_health
from server.processes import StateFolder
from server.run import RunFiles, RunSettings
from server.runs import Runs
from server.standing import Standing
from server.supervisor import healthy

HEARTBEAT = "the last heartbeat that the SuperLink took"
SILENT = "it signed off at this time, or was last heard {patience:g} s before it"


def coordinator_status(consortium: Path, *, spend: bool = False) -> dict[str, Any]:
    """Everything as plain data; a SuperLink that is down is part of the answer.

    `spend` accounts for the last study even where that takes seconds.
    """
    consortium = consortium.resolve()
    facts, registry, state = load_facts(consortium), load_registry(consortium), StateFolder(consortium)
    ca = consortium / "ca.pem"
    try:
        addresses = state.read_addresses()
        up = healthy(addresses["private"], ca)
    except FederationError:
        addresses, up = {}, False
    listed = list_nodes(Control(addresses["private"], ca)) if up else []
    by_id, by_key = {node.node_id: node for node in listed}, {node.node_key: node for node in listed}
    study, standing = _study(state, Runs(addresses["private"], ca) if up else None, spend)
    sites: dict[str, dict[str, Any]] = {}
    known: set[str] = set()
    for name, entry in sorted(registry.sites.items()):
        node = by_key.get(entry.node_key) or by_id.get(entry.node_id or "")
        sites[name] = _connection(entry, node, up) | {"participation": None, "training": None, "spent": None}
        if standing is not None:
            number = node.node_id if node else entry.node_id
            labels = [name, *([f"node {number}"] if number else [])]
            known.update(labels)
            sites[name] |= {
                "participation": standing.participation(labels),
                "training": standing.training(name),
                "spent": standing.spent(name),
            }
    if study is not None:
        study["unknown_nodes"] = {label: why for label, why in study["waiting"].items() if label not in known}
    return {
        "consortium": facts["name"],
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "superlink": {"up": up, **{key: addresses[key] for key in ("public", "private") if key in addresses}},
        "health": {"address": addresses.get("health"), "services": ask_health(consortium)},
        "certificate_expires": facts["server"]["not_after"],
        "sites": sites,
        "study": study,
    }


def status_code(status: dict[str, Any]) -> ExitCode:
    """A probe for scripts: FEDERATION while the SuperLink is down."""
    return ExitCode.OK if status["superlink"]["up"] else ExitCode.FEDERATION


def _connection(entry: SiteEntry, node: NodeInfo | None, up: bool) -> dict[str, Any]:
    """What the SuperLink knows of a site, and what the register says."""
    status = "revoked" if not entry.active else node.status if node else "not registered" if up else "unknown"
    seen, means = "", ""
    if node is not None and node.last_heartbeat:
        seen, means = node.last_heartbeat, HEARTBEAT
    elif node is not None and node.deactivated_at:
        seen, means = node.deactivated_at, SILENT.format(patience=node.patience)
    return {
        "enrolled": entry.active,
        "registered": node is not None and node.status != "unregistered",
        "status": status,
        "connected_since": node.activated_at if node and node.status == "online" else "",
        "last_seen": seen,
        "last_seen_means": means,
    }


def _study(state: StateFolder, runs: Runs | None, spend: bool) -> tuple[dict[str, Any] | None, Standing | None]:
    """The last launch: its run, its rounds, whom it waits for and what it spends."""
    launches = sorted(state.runs.glob("*.json"), key=lambda path: path.stat().st_mtime) if state.runs.is_dir() else []
    if not launches:
        return None, None
    try:
        settings = RunSettings.load(launches[-1])
        files = RunFiles(settings.out)
        launch = json.loads((files.out / "launch.json").read_text(encoding="utf-8"))
        run = runs.state(str(launch["run"])) if runs is not None else None
        going = run is not None and not run.over
        standing = Standing(settings.protocol, files, going, begun=run is not None and run.status == "running")
        rounds = standing.rounds
    except (OSError, ValueError, KeyError, CohortiumError):
        return None, None  # removed or moved since
    last = rounds[-1] if rounds else None
    document = {
        "name": settings.protocol.study.study.name,
        "digest": settings.protocol.digest,
        "out": str(files.out),
        "run": str(launch["run"]),
        "status": "unknown" if run is None else run.outcome if run.over else run.status,
        "round": min(len(rounds), settings.protocol.study.training.rounds),
        "rounds": settings.protocol.study.training.rounds,
        "current_round": standing.current,
        "failure": None if going else _failure(files),
        "missing": not_joined(files) | (dict(last["dropped"]) if last else {}),
        "waiting": standing.waiting or {},
        "constants": _constants(settings),
        "privacy": standing.privacy(slow=spend),
    }
    return document, standing


def not_joined(files: RunFiles) -> dict[str, str]:
    """Who takes no part in a study that has begun, with the word of each; empty before."""
    try:
        return dict(json.loads(files.sites.read_text(encoding="utf-8"))["not_joined"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _failure(files: RunFiles) -> str | None:
    """Why the ServerApp stopped, if it said so, or which gates kept a finished study from being released."""
    with contextlib.suppress(OSError, ValueError):
        gates = read_gates(json.loads((files.quarantine / GATES).read_bytes()))
        failed = "; ".join(gate.in_words() for gate in gates.failed)
        return f"not released, gates failed: {failed}; see {files.quarantine}"
    try:
        return str(json.loads(files.failure.read_text(encoding="utf-8"))["message"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _constants(settings: RunSettings) -> dict[str, Any]:
    """What a round costs is a function of these; each is declared by the study. A norm of None bounds nothing."""
    study = settings.protocol.study
    training, privacy = study.training, study.privacy
    return {
        "mode": training.mode,
        "update_norm": None if training.mode == "none" else training.update_norm,
        "update_noise": privacy.update_noise,
        "gradient_clip": training.gradient_clip if training.mode == "dpsgd" else None,
        "release": study.release.method,
    }
