"""The site's ledger: every spend, durable before the message leaves, chained and signed so that an edit shows.

SQLite, one transaction a spend, synchronous=EXTRA. Rows are chained by SHA-256: a row's hash covers its content and the
hash before it. The same transaction signs the new head (site, length, hash) with the site's key, which lies beside the
ledger (`ledger.sqlite`, `ledger.key`); whoever lacks that key cannot shorten, extend or rewrite the ledger unseen. A
ledger restored whole from an old copy is consistent in itself: only the coordinator, who keeps the last head he saw,
can tell, and his countersignatures are kept here in a table of their own, outside the chain.

A copy without the key can be read and checked against the public key it holds, but nothing can be recorded in it.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import LedgerError
from common.privacy.events import Event
from common.privacy.ledger_entries import Countersignature, Entry, Findings, from_row, hash_of, to_row
from common.privacy.ledger_keys import (
    SignedHead,
    head_holds,
    load_key,
    load_or_create_key,
    public_hex,
    sign_head,
)

FORMAT = 2
GENESIS = "0" * 64
RESTORE = "restore the ledger from the copy you trust and find out who changed it"
TABLES = (
    "CREATE TABLE header (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE spends (sequence INTEGER PRIMARY KEY, study TEXT NOT NULL, round INTEGER NOT NULL, event TEXT NOT"
    " NULL, payload_digest TEXT NOT NULL, recorded_at TEXT NOT NULL, note TEXT NOT NULL, previous TEXT NOT NULL, hash"
    " TEXT NOT NULL, UNIQUE (study, round))",
    "CREATE TABLE witnesses (key TEXT PRIMARY KEY, length INTEGER NOT NULL, head TEXT NOT NULL, signature TEXT NOT"
    " NULL, received_at TEXT NOT NULL)",
)


class Ledger:
    """The ledger file of one site; a context manager. One process at a time writes (SQLite's own lock).

    With `site` a ledger that does not exist is made, together with its key; without, an existing one is opened, whoever
    it belongs to.
    """

    def __init__(self, path: Path, site: str | None = None) -> None:
        self.path = path
        self.key_path = path.with_suffix(".key")
        if site is None and not path.is_file():
            raise LedgerError(f"{path}: there is no ledger", fix="name the file ledger.sqlite in the site's state")
        with self._guarded():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=30.0, isolation_level=None)
        try:
            with self._guarded():
                self._database.execute("PRAGMA journal_mode = DELETE")
                self._database.execute("PRAGMA synchronous = EXTRA")
                if site is not None:
                    self._create(site)
                found = self._header()
            self._check_format(found, site)
        except BaseException:
            self._database.close()
            raise
        self.site = found["site"]

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def require_key(self) -> Ed25519PrivateKey:
        """The site's key, which must be the one that signed this ledger; `LedgerError` otherwise."""
        key = load_key(self.key_path)
        if public_hex(key) != self.head().key:
            raise LedgerError(
                f"{self.path}: this ledger is signed by another key than {self.key_path.name}",
                fix="put back the ledger and the key that belong together",
            )
        return key

    def head(self) -> SignedHead:
        """The head as signed at the last spend; `verify` says whether the entries agree with it."""
        with self._guarded():
            found = self._header()
        try:
            return SignedHead(self.site, int(found["length"]), found["head"], found["signature"], found["key"])
        except (KeyError, ValueError):
            raise LedgerError(f"{self.path}: the signed head was edited or removed", fix=RESTORE) from None

    def record(
        self, study: str, event: Event, payload_digest: str, approve: Callable[[Sequence[Entry]], object] | None = None
    ) -> Entry:
        """Append a spend, sign the new head, and return once both are on disk.

        Recording the same study, round and payload again returns the entry that exists: a resend is not a new spend.
        Another payload for a round already spent is a `LedgerError`; so is any failure to write, and an end that is
        not the one last signed, since signing on top of it would make an edit good. `approve` is shown all entries
        before a new one is written, while no other process can write; what it raises leaves the ledger as it was.
        """
        with self._guarded(), self._transaction("IMMEDIATE"):
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
            if approve is not None:
                approve(self.entries())
            last = self._database.execute(
                "SELECT sequence, hash, recorded_at FROM spends ORDER BY sequence DESC LIMIT 1"
            ).fetchone()
            length, previous, before = last or (0, GENESIS, "")
            key = self.require_key()
            self._check_head(length, previous)
            recorded_at = _now()
            note = f"the clock went backwards: the entry before is dated {before}" if recorded_at < before else ""
            draft = Entry(length + 1, study, event.round, event, payload_digest, recorded_at, note, previous, "")
            entry = replace(draft, hash=hash_of(self.site, draft))
            self._database.execute("INSERT INTO spends VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", to_row(entry))
            self._sign(key, self.site, entry.sequence, entry.hash)
        return entry

    def entries(self, study: str | None = None) -> list[Entry]:
        """All spends in order, or those of one study; `LedgerError` if the file cannot be read."""
        with self._guarded():
            rows = self._database.execute("SELECT * FROM spends ORDER BY sequence").fetchall()
        found = [self._read(row) for row in rows]
        return [entry for entry in found if study is None or entry.study == study]

    def verify(self) -> tuple[int, str]:
        """Length and head hash of a ledger that holds; `LedgerError` saying what does not (see `inspect`)."""
        head = self.inspect().head
        return head.length, head.head

    def inspect(self) -> Findings:
        """Check file, chain, signed head, key and countersignatures.

        `LedgerError` tells apart: a damaged file, an edited entry, a truncated ledger, entries added without the key,
        a head whose signature does not hold, another site's key, and a countersignature that does not fit. A clock
        that went backwards is a finding and not an error: it happens to honest machines, and the order of the entries
        rests on the chain.
        """
        with self._guarded():
            damage = self._database.execute("PRAGMA integrity_check(1)").fetchone()
        if damage != ("ok",):
            raise LedgerError(f"{self.path}: the file is damaged", fix="restore the ledger from the copy you trust")
        # One transaction: a spend recorded meanwhile by the site must not look like an edit.
        with self._guarded(), self._transaction("DEFERRED"):
            entries = self.entries()
            previous = GENESIS
            for position, entry in enumerate(entries, start=1):
                intact = entry.sequence == position and entry.previous == previous
                if not intact or entry.hash != hash_of(self.site, entry) or entry.round != entry.event.round:
                    raise LedgerError(
                        f"{self.path}: entry {position} does not fit the chain; it or one before it was edited or"
                        " removed",
                        fix=RESTORE,
                    )
                previous = entry.hash
            key_compared = self.key_path.exists()
            if key_compared:
                self.require_key()
            self._check_head(len(entries), previous)
            head, witnesses = self.head(), self.countersignatures()
        known = [GENESIS, *(entry.hash for entry in entries)]
        for witness in witnesses:
            held = known[witness.length] if 0 <= witness.length < len(known) else None
            self._check_countersignature(witness, len(entries), held)
        clock = tuple(
            f"entry {later.sequence} is dated {later.recorded_at}, before entry {earlier.sequence}"
            f" ({earlier.recorded_at}): the site's clock went backwards"
            for earlier, later in itertools.pairwise(entries)
            if later.recorded_at < earlier.recorded_at
        )
        return Findings(head, tuple(entries), witnesses, clock, key_compared)

    def countersignatures(self) -> tuple[Countersignature, ...]:
        """The longest countersigned head of every coordinator."""
        with self._guarded():
            rows = self._database.execute("SELECT * FROM witnesses ORDER BY key").fetchall()
        return tuple(Countersignature(*row) for row in rows)

    def countersigned(self, key: str, length: int, head: str, signature: str) -> None:
        """Keep a coordinator's countersignature if it reaches further than the one kept.

        `LedgerError` if its signature does not hold, or if this ledger does not hold what he has seen: then it was
        rolled back, and nothing more may be spent in it.
        """
        witness = Countersignature(key, length, head, signature, _now())
        with self._guarded(), self._transaction("IMMEDIATE"):
            (entries,) = self._database.execute("SELECT COUNT(*) FROM spends").fetchone()
            at = self._database.execute("SELECT hash FROM spends WHERE sequence = ?", (length,)).fetchone()
            self._check_countersignature(witness, entries, GENESIS if length == 0 else at[0] if at else None)
            kept = self._database.execute("SELECT length FROM witnesses WHERE key = ?", (key,)).fetchone()
            if kept is None or kept[0] < length:
                self._database.execute("REPLACE INTO witnesses VALUES (?, ?, ?, ?, ?)", list(vars(witness).values()))

    def _check_countersignature(self, witness: Countersignature, entries: int, held: str | None) -> None:
        """Whether it is genuine and fits this ledger of `entries` entries, whose hash at that length is `held`."""
        if not head_holds("countersignature", witness.key, self.site, witness.length, witness.head, witness.signature):
            raise LedgerError(
                f"{self.path}: a coordinator's countersignature does not hold", fix="ask the coordinator for a new one"
            )
        if held != witness.head:
            raise LedgerError(
                f"{self.path}: the coordinator has seen {witness.length} entries that this ledger of {entries}"
                " does not hold: it was rolled back",
                fix="restore the latest copy of the ledger; without it the site cannot take part any longer",
            )

    def _check_head(self, length: int, head: str) -> None:
        """Whether the entries, whose chain holds, end where the site signed that they end."""
        signed = self.head()
        if not signed.holds:
            problem = "the signature of the head does not hold: the head was edited, or signed by another key"
        elif length < signed.length:
            problem = f"truncated: {signed.length} entries were signed and {length} are there"
        elif length > signed.length:
            problem = f"{length - signed.length} entries were added after the signed head without the site's key"
        elif head != signed.head:
            problem = "the entries were edited: they end in another hash than the one signed"
        else:
            return
        raise LedgerError(f"{self.path}: {problem}", fix=RESTORE)

    def _check_format(self, found: dict[str, str], site: str | None) -> None:
        format_ = found.get("format")
        if format_ != str(FORMAT):
            newer = format_ is not None and format_.isdecimal() and int(format_) > FORMAT
            raise LedgerError(
                f"{self.path}: ledger format {format_}, this version writes format {FORMAT}",
                fix=f"use {'a newer version' if newer else 'the version'} of Cohortium, the one that wrote it",
            )
        if "site" not in found or site not in (None, found["site"]):
            raise LedgerError(
                f"{self.path}: this ledger belongs to site {found.get('site')!r}, not to {site!r}",
                fix="correct the ledger's path or the site's name in site.toml",
            )

    def _read(self, row: tuple[Any, ...]) -> Entry:
        try:
            return from_row(row)
        except (ValueError, TypeError):  # whose text may quote what stands there
            raise LedgerError(
                f"{self.path}: entry {row[0]} cannot be read; it was edited or damaged", fix=RESTORE
            ) from None

    def _header(self) -> dict[str, str]:
        """The header by name; empty if the file has none."""
        exists = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'header'"
        if self._database.execute(exists).fetchone() is None:
            return {}
        return {str(key): str(value) for key, value in self._database.execute("SELECT key, value FROM header")}

    def _create(self, site: str) -> None:
        """Lay out a new ledger with its key; nothing if there is a ledger already."""
        if self._header():
            return
        with self._transaction("IMMEDIATE"):
            if self._header():  # made by another process meanwhile
                return
            # The key first: one without a ledger is taken up by the next start, a ledger without a key is refused.
            key = load_or_create_key(self.key_path)
            for table in TABLES:
                self._database.execute(table)
            fields = {"format": str(FORMAT), "site": site, "key": public_hex(key)}
            self._database.executemany("INSERT INTO header VALUES (?, ?)", list(fields.items()))
            self._sign(key, site, 0, GENESIS)

    def _sign(self, key: Ed25519PrivateKey, site: str, length: int, head: str) -> None:
        fields = {"length": str(length), "head": head, "signature": sign_head("ledger head", key, site, length, head)}
        self._database.executemany("REPLACE INTO header VALUES (?, ?)", list(fields.items()))

    @contextmanager
    def _transaction(self, kind: Literal["IMMEDIATE", "DEFERRED"]) -> Iterator[None]:
        self._database.execute(f"BEGIN {kind}")
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
            if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
                raise LedgerError(
                    f"{self.path}: another process holds the ledger ({error})",
                    fix="let it finish; one SuperNode or command at a time writes a ledger",
                ) from None
            raise LedgerError(
                f"{self.path}: the ledger cannot be used ({error})",
                fix="check disk space, permissions and that no other process holds the file",
            ) from None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
