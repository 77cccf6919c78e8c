"""What a ledger holds, as frozen values, and how an entry becomes a row and a hash."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from common.digest import sha256_of
from common.privacy.events import Event, event_from_json, event_to_json
from common.privacy.ledger_keys import SignedHead


@dataclass(frozen=True)
class Entry:
    """One spend. `payload_digest` identifies the bytes that may leave under it; a retry must resend exactly those.

    `recorded_at` is what the clock said, never corrected; if it said less than at the entry before, `note` says so.
    """

    sequence: int
    study: str
    round: int
    event: Event
    payload_digest: str
    recorded_at: str
    note: str
    previous: str
    hash: str


@dataclass(frozen=True)
class Countersignature:
    """Up to where a coordinator, known by his key, has seen this ledger."""

    key: str
    length: int
    head: str
    signature: str
    received_at: str


@dataclass(frozen=True)
class Findings:
    """What checking a ledger that holds has shown. `clock` lists what is odd without being a break of the chain.

    `key_compared`: whether the site's own key was at hand, and not only the public one that the ledger holds.
    """

    head: SignedHead
    entries: tuple[Entry, ...]
    witnesses: tuple[Countersignature, ...]
    clock: tuple[str, ...]
    key_compared: bool


def to_row(entry: Entry) -> list[Any]:
    """The columns of an entry."""
    return [json.dumps(event_to_json(value)) if value is entry.event else value for value in vars(entry).values()]


def hash_of(site: str, entry: Entry) -> str:
    """SHA-256 over the site and everything in the entry but its own hash."""
    content = [entry.sequence, entry.study, event_to_json(entry.event), entry.payload_digest, entry.recorded_at]
    return sha256_of([site, *content, entry.note, entry.previous])


def from_row(row: tuple[Any, ...]) -> Entry:
    """Read what `to_row` wrote; `ValueError` or `TypeError`, whose text may quote what stands there."""
    sequence, study, number, text, payload_digest, recorded_at, note, previous, digest = row
    fields = (study, text, payload_digest, recorded_at, note, previous, digest)
    if not all(isinstance(field, str) for field in fields):
        raise TypeError("a field is not text")
    event = event_from_json(json.loads(text, parse_constant=_refuse_constant))
    return Entry(sequence, study, number, event, payload_digest, recorded_at, note, previous, digest)


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number that an event may hold")
