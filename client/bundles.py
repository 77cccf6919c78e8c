"""App bundles that a coordinator offers: kept as bytes for review, never unpacked, imported or installed.

A bundle is a zip archive named by the SHA-256 of its bytes. It is read in memory only, within limits, for a list of its
files and their difference to another bundle or to what is installed here.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from client.approvals import DIGEST
from common.errors import SiteError
from common.files import write_atomic

LARGEST_BUNDLE = 10 << 20
LARGEST_CONTENT = 50 << 20  # of all files of a bundle together, unpacked
MOST_FILES = 5000
MOST_WAITING = 8
LONGEST_DIFFERENCE = 400  # lines shown of one file
LISTING = ".info/CONTENT"  # Flower's own list of the files with their digests
PACKAGES = ("client", "common", "server")

Change = Literal["added", "removed", "changed"]


@dataclass(frozen=True)
class File:
    """A file of a bundle."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Difference:
    """How one file differs; `lines` is a unified diff of a text file, empty for any other."""

    change: Change
    name: str
    lines: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"change": self.change, "file": self.name, "diff": list(self.lines)}


class BundleStore:
    """The bundles under review, and those that were approved, in the site's state folder."""

    def __init__(self, state: Path) -> None:
        self.folder = state / "approvals" / "bundles"

    def path(self, digest: str) -> Path:
        """Where the bundle of this digest is, if it is kept."""
        if not re.fullmatch(DIGEST, digest):
            raise ValueError("not a SHA-256")
        return self.folder / f"{digest}.fab"

    def keep(self, content: bytes, decided: Iterable[str] = ()) -> bool:
        """Keep a bundle for review; False if it is too large or too many wait. Those in `decided` do not count."""
        path = self.path(hashlib.sha256(content).hexdigest())
        if path.exists():
            return True
        settled = set(decided)
        waiting = [known for known in self.folder.glob("*.fab") if known.stem not in settled]
        if len(content) > LARGEST_BUNDLE or len(waiting) >= MOST_WAITING:
            return False
        write_atomic(path, content)
        return True

    def load(self, digest: str) -> bytes | None:
        """The bytes, or None if they are not here or are others."""
        try:
            content = self.path(digest).read_bytes()
        except OSError:
            return None
        return content if hashlib.sha256(content).hexdigest() == digest else None

    def forget(self, digest: str) -> None:
        """Remove a bundle that was denied."""
        self.path(digest).unlink(missing_ok=True)


def read_bundle(content: bytes) -> dict[str, bytes]:
    """Every file of a bundle by name; `SiteError` for what is no archive or exceeds the limits."""
    files: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            if len(members) > MOST_FILES:
                raise SiteError(f"the bundle has {len(members)} files, at most {MOST_FILES} are read", fix=_DENY)
            left = LARGEST_CONTENT
            for member in members:
                with archive.open(member) as file:
                    data = file.read(left + 1)  # not the size that the archive claims
                left -= len(data)
                if left < 0:
                    raise SiteError("the bundle's files are larger than 50 MiB together", fix=_DENY)
                if member.filename in files:
                    raise SiteError(f"the bundle holds {printable(member.filename)} twice", fix=_DENY)
                files[member.filename] = data
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError, NotImplementedError):
        raise SiteError("the bundle is not a readable zip archive", fix=_DENY) from None
    return files


def list_files(files: Mapping[str, bytes]) -> list[File]:
    """Name, size and digest of every file, in order."""
    return [File(name, len(files[name]), hashlib.sha256(files[name]).hexdigest()) for name in sorted(files)]


def installed_files() -> dict[str, bytes]:
    """The code that is installed here, named as in a bundle."""
    root = Path(__file__).resolve().parent.parent
    found: dict[str, bytes] = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            if path.is_file() and "__pycache__" not in path.parts:
                found[path.relative_to(root).as_posix()] = path.read_bytes()
    return found


def differences(old: Mapping[str, bytes], new: Mapping[str, bytes]) -> list[Difference]:
    """What was added, removed and changed from `old` to `new`, by name."""
    found: list[Difference] = []
    for name in sorted((set(old) | set(new)) - {LISTING}):
        before, after = old.get(name), new.get(name)
        if before == after:
            continue
        change: Change = "added" if before is None else "removed" if after is None else "changed"
        found.append(Difference(change, name, _lines(name, before or b"", after or b"") if after is not None else ()))
    return found


def printable(text: str) -> str:
    """Text of a stranger for a terminal: control characters and invisible ones (bidirectional marks too) escaped."""
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode("ascii") for c in text)


def _lines(name: str, before: bytes, after: bytes) -> tuple[str, ...]:
    if b"\0" in before or b"\0" in after:
        return ()
    try:
        texts = [content.decode("utf-8").split("\n") for content in (before, after)]
    except UnicodeDecodeError:
        return ()
    if max(map(len, texts)) > 20_000:
        return ("(too long to be compared line by line)",)
    lines = [printable(line) for line in difflib.unified_diff(texts[0], texts[1], name, name, lineterm="")]
    if len(lines) > LONGEST_DIFFERENCE:
        more = len(lines) - LONGEST_DIFFERENCE
        lines = [*lines[:LONGEST_DIFFERENCE], f"... {more} more lines, which --json shows no more than this does"]
    return tuple(lines)


_DENY = "deny it, and ask the coordinator for a bundle made with `flwr build`"
