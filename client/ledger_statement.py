"""What a site's ledger says, as plain data, as text and as a page: counts, declared constants and guarantees.

A ledger holds no value of a patient, and neither does anything made of it here. It holds keys as their raw bytes;
people are shown the SHA-256 by which releases, `connection.toml` and enrolment name the same keys.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from jinja2 import Environment, PackageLoader, StrictUndefined

from common.errors import CohortiumError
from common.keys import key_id
from common.privacy.accountant import Adversary, Guarantee, account, account_lines
from common.privacy.events import Event, event_to_json
from common.privacy.ledger_entries import Entry, Findings
from common.privacy.statement import ADVERSARIES, INFINITE
from common.study import Protocol


def ledger_statement(findings: Findings, studies: Path, default_delta: float) -> dict[str, Any]:
    """Per study, per event kind and per adversary what was spent, and the site's total over all studies.

    `studies` is the folder of accepted protocols, which give a study its name and δ; one that is not there is accounted
    at `default_delta`. The total holds at the smallest δ of its studies, since ε only grows as δ shrinks.
    """
    by_study: dict[str, list[Entry]] = {}
    for entry in findings.entries:
        by_study.setdefault(entry.study, []).append(entry)
    described = [_study(digest, entries, studies, default_delta) for digest, entries in by_study.items()]
    delta = min((study["delta"] for study in described), default=default_delta)
    spent = [[entry.event for entry in entries] for entries in by_study.values()]
    totals = [_guarantee(account([], delta, adversary=name, other_studies=spent)) for name in get_args(Adversary)]
    return {
        "schema_version": 1,
        "software": f"cohortium {version('cohortium')}",
        "site": findings.head.site,
        "length": findings.head.length,
        "head": findings.head.head,
        "key": findings.head.key,
        "key_id": key_id(findings.head.key),
        "adversaries": dict(ADVERSARIES),
        "studies": described,
        "total": totals,
        "witnesses": [
            {"key": seen.key, "key_id": key_id(seen.key), "length": seen.length, "received_at": seen.received_at}
            for seen in findings.witnesses
        ],
        "warnings": list(findings.clock),
    }


def entries_to_json(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """Every entry as it stands in the ledger."""
    return [asdict(entry) | {"event": event_to_json(entry.event)} for entry in entries]


def checks_in_words(findings: Findings) -> list[str]:
    """What was checked, sentence by sentence, for a ledger in which everything held."""
    head = findings.head
    found = [
        "the file: its pages and indexes are whole",
        f"the chain: {head.length} entries, each with the SHA-256 of its content and of the entry before",
        f"the end: entry {head.length}, {head.head}, is what the site signed last",
    ]
    if findings.key_compared:
        found.append(f"the key: the site's own key, beside the ledger, is the one that signed ({key_id(head.key)})")
    else:
        found.append(
            f"the key: only the public key in the ledger was at hand ({key_id(head.key)}); compare it with the site's,"
            " since anyone can sign a ledger of his own"
        )
    for seen in findings.witnesses:
        found.append(
            f"the coordinator with release key {key_id(seen.key)} has countersigned the first {seen.length} entries"
            f" (received {seen.received_at}); the chain still holds them"
        )
    if not findings.witnesses:
        found.append("no coordinator has countersigned it: an old copy put in its place would not be noticed here")
    return found


def render_text(statement: Mapping[str, Any]) -> list[str]:
    """The statement as a steward reads it in a terminal."""
    lines = [f"Ledger of site {statement['site']}: {statement['length']} entries", f"Head: {statement['head']}"]
    lines.append(f"Key: {statement['key_id']}")
    for study in statement["studies"]:
        lines += ["", f"Study {study['name']} ({study['study'][:16]}…), {study['first']} to {study['last']}"]
        for spent in study["events"]:
            constants = ", ".join(f"{name} = {value}" for name, value in spent["constants"].items())
            lines.append(f"  {spent['count']} x {spent['type']} ({spent['rounds']}): {constants}")
        lines += _guarantee_lines(study["guarantees"])
    lines += ["", f"Total of the site over {len(statement['studies'])} studies"]
    lines += _guarantee_lines(statement["total"]) if statement["studies"] else ["  nothing has been spent"]
    for seen in statement["witnesses"]:
        lines += ["", f"Countersigned by the coordinator up to entry {seen['length']}, release key {seen['key_id']}"]
    lines += [f"Warning: {warning}" for warning in statement["warnings"]]
    return lines


def render_html(statement: Mapping[str, Any], checks: Sequence[str], entries: Sequence[Mapping[str, Any]]) -> str:
    """One self-contained page for printing. Names come from people: everything is escaped."""
    environment = Environment(
        loader=PackageLoader("client", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["number"] = _number
    environment.filters["compact"] = lambda value: json.dumps(value, ensure_ascii=False, sort_keys=True)
    return environment.get_template("ledger.html.j2").render(statement=statement, checks=checks, entries=entries)


def _study(digest: str, entries: Sequence[Entry], studies: Path, default_delta: float) -> dict[str, Any]:
    protocol = _protocol(digest, studies)
    delta = default_delta if protocol is None else protocol.study.privacy.delta
    events = [entry.event for entry in entries]
    return {
        "study": digest,
        "name": "of unknown name" if protocol is None else protocol.study.study.name,
        "delta": delta,
        "delta_from": "the default, since the study's protocol is not at hand" if protocol is None else "the study",
        "first": min(entry.recorded_at for entry in entries),
        "last": max(entry.recorded_at for entry in entries),
        "events": _kinds(events),
        "guarantees": [
            _guarantee(line) for name in get_args(Adversary) for line in account_lines(events, delta, adversary=name)
        ],
    }


def _protocol(digest: str, studies: Path) -> Protocol | None:
    """The protocol that the site accepted under this digest, if it is there and is that one."""
    try:
        document = json.loads((studies / digest[:32] / "protocol.json").read_text(encoding="utf-8"))
        protocol = Protocol.from_json(document)
    except (OSError, ValueError, AttributeError, CohortiumError):
        return None
    return protocol if protocol.digest == digest else None


def _kinds(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Events that differ in nothing but their round, together: count, rounds and declared constants."""
    groups: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for event in events:
        constants = event_to_json(event)
        rounds = groups.setdefault(json.dumps(constants | {"round": 0}, sort_keys=True), (constants, []))[1]
        rounds.append(event.round)
    return [
        {
            "type": constants["type"],
            "count": len(rounds),
            "rounds": _rounds(sorted(rounds)),
            "constants": {name: value for name, value in constants.items() if name not in ("type", "round")},
        }
        for constants, rounds in groups.values()
    ]


def _rounds(rounds: Sequence[int]) -> str:
    if len(rounds) == 1:
        return f"round {rounds[0]}"
    gaps = rounds[-1] - rounds[0] + 1 != len(rounds)
    return f"rounds {rounds[0]} to {rounds[-1]}{', not all' if gaps else ''}"


def _guarantee(found: Guarantee) -> dict[str, Any]:
    epsilon = found.epsilon if math.isfinite(found.epsilon) else INFINITE
    return asdict(found) | {"epsilon": epsilon, "basis": list(found.basis)}


def _guarantee_lines(guarantees: Iterable[Mapping[str, Any]]) -> list[str]:
    lines: list[str] = []
    for found in guarantees:
        condition = "" if found["unconditional"] else ", conditional on the encoder and decoder, added to nothing"
        lines.append(
            f"  against {found['adversary']}: epsilon {_number(found['epsilon'])}, delta {found['delta']:g}, for"
            f" {found['unit']} ({found['applies_to']}{condition}); accountant: {found['accountant']}"
        )
        lines += [f"    basis: {basis}" for basis in found["basis"]]
    # The relation is the same in every line, and belongs to every number.
    return [*lines, *sorted({f"  relation: {found['relation']}" for found in guarantees})]


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
