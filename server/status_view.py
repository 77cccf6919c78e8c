"""`cohortium status` on a screen of 80 columns; `--json` has everything."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

UNITS = ((86400.0, "days"), (3600.0, "h"), (60.0, "min"))


def status_view(status: Mapping[str, Any]) -> RenderableType:
    """The server, the sites, and the last study with what it spends. Names are shown as they are, never as markup."""
    return Group(_server(status), _sites(status), *_privacy(status["study"]))


def _server(status: Mapping[str, Any]) -> Table:
    table = Table(box=None, show_header=False, title=Text(status["consortium"], style="bold"), title_justify="left")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    link, health, study = status["superlink"], status["health"]["services"], status["study"]
    where = f" (sites: {link['public']}, this machine: {link['private']})" if "public" in link else ""
    table.add_row("SuperLink", ("up" if link["up"] else "down") + where)
    said = [f"{name} {'well' if well else 'not well'}" for name, well in (health or {}).items()]
    table.add_row("health", f"{', '.join(said)} ({status['health']['address']})" if said else "nobody answers probes")
    table.add_row("certificate", f"until {status['certificate_expires']}")
    if study is None:
        table.add_row("study", "none was launched")
        return table
    now = f", now {study['current_round']}" if study["current_round"] else ""
    progress = f"{study['round']} of {study['rounds']} rounds over{now}"
    table.add_row("study", Text(f"{study['name']}: {study['status']}, {progress}"))
    if study["failure"]:
        table.add_row("why", Text(study["failure"]))
    table.add_row("results", Text(study["out"]))
    for label, reason in study["unknown_nodes"].items():
        table.add_row("waits for", Text(f"{label}, which is no site's here: {reason}"))
    return table


def _sites(status: Mapping[str, Any]) -> RenderableType:
    if not status["sites"]:
        return Text("No site is enrolled.")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    # Wide enough for the words that come most often, on 80 columns.
    for name, least in (("site", 8), ("connection", 10), ("last seen", 9), ("study", 17), ("last round", 11)):
        table.add_column(name, overflow="fold", min_width=least)
    table.add_column("answered", no_wrap=True, min_width=8)
    for name, site in status["sites"].items():
        taking, spent = site["participation"], site["spent"]
        table.add_row(
            Text(name),
            site["status"],
            _seen(site, status["time"]),
            Text("-" if taking is None else _taking(taking)),
            Text(_training(site["training"])),
            "-" if spent is None else f"{spent['answered']}/{spent['asked']}",
        )
    return table


def _taking(participation: Mapping[str, str]) -> str:
    state, reason = participation["state"], participation["reason"]
    return reason if state in ("waiting", "not joined") else state


def _training(training: Mapping[str, Any] | None) -> str:
    if training is None:
        return "-"
    asked = training["asked_for"]
    if training["round"] is None:
        return f"{asked}: going on" if asked else "-"
    said = training["reason"] if training["state"] == "dropped" else training["state"]
    return f"{training['round']}: {said}"


def _seen(site: Mapping[str, Any], now: str) -> str:
    """Seconds, minutes, hours or days ago; a site that is offline may be gone for a minute longer than is known."""
    if not site["last_seen"]:
        return "never" if site["status"] == "registered" else "-"
    seconds = max(0.0, (datetime.fromisoformat(now) - datetime.fromisoformat(site["last_seen"])).total_seconds())
    size, unit = next(((size, unit) for size, unit in UNITS if seconds >= 2 * size), (1.0, "s"))
    over = "" if site["status"] == "online" else "> "
    return f"{over}{int(seconds // size)} {unit} ago"


def _privacy(study: Mapping[str, Any] | None) -> list[Text]:
    """What the study spends, in the statement's own words; no number without unit, δ, relation and adversary."""
    if study is None:
        return []
    privacy, constants = study["privacy"], study["constants"]
    if privacy["rounds"] == 0:
        return [Text("No site was asked for a round of this study yet: none has spent anything in it.")]
    norm = constants["update_norm"]
    declared = "updates without a bound" if norm is None else f"update norm C = {norm:g}"
    rounds = f"at most {privacy['rounds']}" if privacy["source"] != "privacy.json" else str(privacy["rounds"])
    head = f"Spent by a site in this study: {rounds} of {study['rounds']} rounds, {declared}. "
    if privacy["statement"] is None:
        return [Text(f"{head}No ε is stated here: {privacy['why']}.")]
    assumed = "Relation, assumptions and every site's lines: --json."
    return [Text(f"{head}{_capital(privacy['in_words'])} {assumed}")]


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:] if words[:1] != "ε" else words
