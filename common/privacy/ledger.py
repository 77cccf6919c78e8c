"""The site's ledger: every spend, durable before the message leaves, chained so that an edit shows.

SQLite, one transaction a spend, synchronous=EXTRA. Rows are chained by SHA-256: a row's hash covers its content and the
hash before it.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from common.digest import sha256_of
from common.errors import LedgerError
from common.privacy.events import Event, event_from_json, event_to_json

FORMAT = 1
GENESIS = "0" * 64


@dataclass(frozen=True)
class Entry:
    """One spend. `payload_digest` identifies the bytes that may leave under it; a retry must resend exactly those."""

    sequence: int
    study: str
    round: int
    event: Event
    payload_digest: str
    recorded_at: str
    previous: str
    hash: str


class Ledger:
    """The ledger file of one site; a context manager. One process at a time writes (SQLite's own lock)."""

    def __init__(self, path: Path, site: str) -> None:
        self.path = path
        self.site = site
        with self._guarded():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=30.0, isolation_level=None)
            self._database.execute("PRAGMA journal_mode = DELETE")
            self._database.execute("PRAGMA synchronous = EXTRA")
            self._create()
            found = dict(self._database.execute("SELECT key, value FROM header").fetchall())
        if found.get("format") != str(FORMAT):
            raise LedgerError(
                f"{path}: ledger format {found.get('format')}, this version writes format {FORMAT}",
                fix="use the version of Cohortium that wrote it, or a newer one",
            )
        if found.get("site") != site:
            raise LedgerError(
                f"{path}: this ledger belongs to site {found.get('site')!r}, not to {site!r}",
                fix="correct the ledger's path or the site's name in site.toml",
            )

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def record(self, study: str, event: Event, payload_digest: str) -> Entry:
        """Append a spend and return once it is on disk.

        Recording the same study, round and payload again returns the entry that exists: a resend is not a new spend.
        Another payload for a round already spent is a `LedgerError`; so is any failure to write.
        """
        with self._guarded(), self._transaction():
            row = self._database.execute(
                "SELECT * FROM spends WHERE study = ? AND round = ?", (study, event.round)
            ).fetchone()
            if row is not None:
                entry = self._read(row)
                if entry.payload_digest != payload_digest or entry.event != event:
                    raise LedgerError(
                        f"{self.path}: round {event.round} of this study has been spent on another message already",
                        fix="a round is answered once; start a new study for fresh rounds",
                    )
                return entry
            last = self._database.execute("SELECT sequence, hash FROM spends ORDER BY sequence DESC LIMIT 1").fetchone()
            sequence, previous = (last[0] + 1, last[1]) if last else (1, GENESIS)
            recorded_at = datetime.now(UTC).isoformat(timespec="seconds")
            content = [self.site, sequence, study, event_to_json(event), payload_digest, recorded_at, previous]
            entry = Entry(
                sequence, study, event.round, event, payload_digest, recorded_at, previous, sha256_of(content)
            )
            self._database.execute(
                "INSERT INTO spends VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    sequence,
                    study,
                    event.round,
                    json.dumps(event_to_json(event)),
                    payload_digest,
                    recorded_at,
                    previous,
                    entry.hash,
                ),
            )
        return entry

    def entries(self, study: str | None = None) -> list[Entry]:
        """All spends in order, or those of one study; `LedgerError` if the file cannot be read."""
        with self._guarded():
            rows = self._database.execute("SELECT * FROM spends ORDER BY sequence").fetchall()
        found = [self._read(row) for row in rows]
        return [entry for entry in found if study is None or entry.study == study]

    def verify(self) -> tuple[int, str]:
        """Length and head hash of the chain; `LedgerError` naming the first entry that does not fit."""
        with self._guarded():
            damage = self._database.execute("PRAGMA integrity_check(1)").fetchone()
        if damage != ("ok",):
            raise LedgerError(f"{self.path}: the file is damaged", fix="restore the ledger from the copy you trust")
        head = GENESIS
        for position, entry in enumerate(self.entries(), start=1):
            content = [
                self.site,
                entry.sequence,
                entry.study,
                event_to_json(entry.event),
                entry.payload_digest,
                entry.recorded_at,
                entry.previous,
            ]
            intact = entry.sequence == position and entry.previous == head and entry.hash == sha256_of(content)
            if not intact or entry.round != entry.event.round:
                raise LedgerError(
                    f"{self.path}: entry {position} does not fit the chain; it or one before it was edited or removed",
                    fix="restore the ledger from the copy you trust and find out who changed it",
                )
            head = entry.hash
        return len(self.entries()), head

    def _read(self, row: tuple[Any, ...]) -> Entry:
        try:
            return _entry(row)
        except (ValueError, TypeError):  # whose text may quote what stands there
            raise LedgerError(
                f"{self.path}: entry {row[0]} cannot be read; it was edited or damaged",
                fix="restore the ledger from the copy you trust and find out who changed it",
            ) from None

    def _create(self) -> None:
        self._database.execute("CREATE TABLE IF NOT EXISTS header (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS spends (sequence INTEGER PRIMARY KEY, study TEXT NOT NULL, round INTEGER NOT"
            " NULL, event TEXT NOT NULL, payload_digest TEXT NOT NULL, recorded_at TEXT NOT NULL, previous TEXT NOT"
            " NULL, hash TEXT NOT NULL, UNIQUE (study, round))"
        )
        self._database.execute(
            "INSERT OR IGNORE INTO header VALUES ('format', ?), ('site', ?)", (str(FORMAT), self.site)
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise LedgerError(
                f"{self.path}: the ledger cannot be used ({error})",
                fix="check disk space, permissions and that no other process holds the file",
            ) from None


def _entry(row: tuple[Any, ...]) -> Entry:
    sequence, study, number, text, payload_digest, recorded_at, previous, digest = row
    if not all(isinstance(field, str) for field in (study, text, payload_digest, recorded_at, previous, digest)):
        raise TypeError("a field is not text")
    event = event_from_json(json.loads(text, parse_constant=_refuse_constant))
    return Entry(sequence, study, number, event, payload_digest, recorded_at, previous, digest)


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number that an event may hold")
