"""The audit log of a party: append-only JSON lines, each holding the hash of the one before.

A line says when (RFC 3339, UTC), who, what, about which study and digest, and how it ended. The chain shows an edit, a
removal or an insertion anywhere before the last line; whoever may write the file can still cut its end or write all of
it anew, so keep copies where he may not, and compare their last hashes. Lines never hold a patient's value.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.digest import sha256_of
from common.errors import CohortiumError, ExitCode, OutputError

AUDIT_LOG = "audit.jsonl"
GENESIS = "0" * 64
LONGEST_LINE = 1 << 20
LONGEST_OUTCOME = 500
FIELDS = ("sequence", "time", "actor", "action", "study", "digest", "outcome", "previous", "hash")


class AuditError(CohortiumError):
    """The audit log is not what was written."""

    exit_code = ExitCode.VERIFY


class AuditLog:
    """The log in the file `path`, to which `actor` appends; several processes may, one line at a time."""

    def __init__(self, path: Path, actor: str) -> None:
        self.path = path
        self.actor = actor

    def append(
        self, action: str, *, study: str = "", digest: str = "", outcome: str = "ok", **fields: Any
    ) -> dict[str, Any]:
        """Write one line durably and return it; `fields` are plain JSON values beside the usual ones.

        `OutputError` if it cannot be written, `AuditError` if the line before cannot be read: then nothing is added.
        """
        taken = sorted(set(fields) & set(FIELDS))
        if taken:
            raise ValueError(f"{taken} are fields of every line")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o640)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)  # released when the file is closed
                sequence, previous = self._end(handle)
                entry: dict[str, Any] = {
                    "sequence": sequence + 1,
                    "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
                    "actor": self.actor,
                    "action": action,
                    "study": study,
                    "digest": digest,
                    "outcome": outcome,
                    **fields,
                    "previous": previous,
                }
                entry["hash"] = sha256_of(entry)
                line = json.dumps(entry, ensure_ascii=False, allow_nan=False).encode() + b"\n"
                if len(line) > LONGEST_LINE:
                    raise ValueError(f"a line of the audit log has at most {LONGEST_LINE} bytes, got {len(line)}")
                self._write(handle, line)
            finally:
                os.close(handle)
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be written ({error.strerror or 'input/output error'})",
                fix="free disk space or correct the permissions",
            ) from None
        return entry

    def _write(self, handle: int, line: bytes) -> None:
        """The whole line or none of it."""
        size = os.fstat(handle).st_size
        try:
            if os.write(handle, line) != len(line):
                raise OSError(28, "No space left on device")
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, size)
            raise

    def _end(self, handle: int) -> tuple[int, str]:
        """Sequence number and hash of the last line; a torn one, left by a process that was killed, is removed."""
        size = os.fstat(handle).st_size
        start = max(0, size - 2 * LONGEST_LINE)
        tail = os.pread(handle, size - start, start)
        whole = tail[: tail.rfind(b"\n") + 1]
        if len(whole) < len(tail):
            os.ftruncate(handle, start + len(whole))
        if not whole:
            return 0, GENESIS
        try:
            entry = json.loads(whole[:-1].rsplit(b"\n", 1)[-1])
            return int(entry["sequence"]), str(entry["hash"])
        except (ValueError, KeyError, TypeError):
            raise AuditError(
                f"{self.path}: the last line cannot be read; it was edited or damaged",
                fix="restore the log from a copy you trust, or move it away to begin a new one",
            ) from None


@contextlib.contextmanager
def logged(log: AuditLog, action: str, **fields: Any) -> Iterator[None]:
    """First the line, durably, then what it speaks of: what cannot be logged is not done, and nothing done is missing.

    A failure adds the line "ACTION failed". A process that is killed in between leaves the first line alone; whether
    what it speaks of was done is then to be seen from the files it changes.
    """
    log.append(action, **fields)
    try:
        yield
    except BaseException as error:
        note_failure(log, f"{action} failed", error, **fields)
        raise


def note_failure(log: AuditLog, action: str, error: BaseException, **fields: Any) -> None:
    """A line whose outcome is the message of `error`; never raises, since `error` is on its way already."""
    outcome = error.message if isinstance(error, CohortiumError) else type(error).__name__  # a text may quote anything
    with contextlib.suppress(CohortiumError):
        log.append(action, outcome=" ".join(outcome.split())[:LONGEST_OUTCOME], **fields)


def read_audit(path: Path) -> list[dict[str, Any]]:
    """Every line of a log whose chain holds; `AuditError` naming the first line that does not fit.

    A torn last line without a line break is left by a process that was killed while writing, and is not counted.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise AuditError(f"{path}: cannot be read ({error.strerror})", fix="name an audit log") from None
    entries: list[dict[str, Any]] = []
    previous = GENESIS
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            entry = json.loads(line)
            body = {name: value for name, value in entry.items() if name != "hash"}
            holds = (entry["sequence"], entry["previous"], entry["hash"]) == (number, previous, sha256_of(body))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            holds = False
            entry = {}
        if not holds:
            raise AuditError(
                f"{path}: line {number} does not fit the chain; it or a line before it was edited, removed or inserted",
                fix="compare with a copy you trust; lines before this one hold",
            )
        previous = entry["hash"]
        entries.append(entry)
    return entries
