"""A release as one file: a tar of plain files, always the same bytes for the same content, compressed with zstandard.

Reading takes nothing else than what writing makes: every header is compared byte for byte with the one that its name
and size would give. So there are no links, folders, extended headers or paths to be careful with. Nothing is unpacked.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import zstandard

from common.errors import OutputError, VerifyError
from common.files import atomic_path
from common.signing import BLOCK, digests_of

LEVEL = 10
LARGEST_FILE = 1 << 36  # 64 GiB: far more than ten million rows
MOST_FILES = 64
FEED = 2048  # bytes given to zstandard at once: the most that they can become is 64 MiB
WINDOW = 1 << 27
PROBLEM_FIX = "it is damaged or was not made by `cohortium bundle-release`; ask for it again"


def write_archive(path: Path, folder: Path, names: Sequence[str]) -> None:
    """Write the named files of `folder`, sorted, without times or owners; `OutputError` if that fails."""
    with atomic_path(path) as temporary, temporary.open("wb") as out:
        compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True, write_content_size=False)
        with compressor.stream_writer(out, closefd=False) as stream:
            total = 0
            for name in sorted(names):
                size = (folder / name).stat().st_size
                stream.write(_header(name, size))
                with (folder / name).open("rb") as file:
                    written = 0
                    while block := file.read(BLOCK):
                        stream.write(block)
                        written += len(block)
                if written != size:
                    raise OutputError(f"{folder / name}: changed while it was read", fix="run the command again")
                stream.write(bytes(-size % tarfile.BLOCKSIZE))
                total += tarfile.BLOCKSIZE + size + -size % tarfile.BLOCKSIZE
            stream.write(bytes(_end(total)))


def read_archive(
    path: Path, keep: Sequence[str], largest_kept: int
) -> tuple[dict[str, dict[str, str] | None], dict[str, bytes]]:
    """Digests of every file in the archive, and the content of those named in `keep`, in one pass.

    `VerifyError` if it is not exactly what `write_archive` makes of these files.
    """
    digests: dict[str, dict[str, str] | None] = {}
    kept: dict[str, bytes] = {}
    try:
        with path.open("rb") as file:
            stream = _Stream(file)
            total, last = 0, ""
            while any(header := stream.take(tarfile.BLOCKSIZE)):
                info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
                name, size = info.name, info.size
                plain = name == Path(name).name and name not in ("", "..") and 0 <= size <= LARGEST_FILE
                if not plain or header != _header(name, size) or not last < name or len(digests) == MOST_FILES:
                    raise VerifyError(f"{path}: holds something else than plain files in order", fix=PROBLEM_FIX)
                member = _Member(stream, size, largest_kept if name in keep else 0)
                digests[name] = digests_of(member)  # type: ignore[arg-type] - it reads, and that is all
                if name in keep and size <= largest_kept:
                    kept[name] = bytes(member.kept)
                padding = -size % tarfile.BLOCKSIZE
                if any(stream.take(padding)):
                    raise VerifyError(f"{path}: bytes are hidden behind {name}", fix=PROBLEM_FIX)
                total, last = total + tarfile.BLOCKSIZE + size + padding, name
            if any(stream.take(_end(total) - tarfile.BLOCKSIZE)) or not stream.finished():
                raise VerifyError(f"{path}: something follows its last file", fix=PROBLEM_FIX)
    except OSError as error:
        raise VerifyError(f"{path}: cannot be read ({error.strerror})", fix="name a folder or a .tar.zst") from None
    except (zstandard.ZstdError, tarfile.TarError, EOFError, UnicodeError):
        raise VerifyError(f"{path}: not a whole .tar.zst", fix=PROBLEM_FIX) from None
    return digests, kept


class _Stream:
    """The uncompressed bytes of one zstandard frame; `EOFError` where they end too early."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj()
        self._ready = memoryview(b"")

    def some(self, most: int) -> bytes:
        """At least one and at most so many bytes."""
        while not self._ready:
            fed = self._file.read(FEED)
            if self._frame.eof or not fed:
                raise EOFError
            self._ready = memoryview(self._frame.decompress(fed))
        taken, self._ready = self._ready[:most], self._ready[most:]
        return bytes(taken)

    def take(self, count: int) -> bytes:
        """Exactly so many bytes."""
        found = bytearray()
        while len(found) < count:
            found += self.some(count - len(found))
        return bytes(found)

    def finished(self) -> bool:
        """Whether the frame ended here, with its checksum, and nothing follows it."""
        while not self._ready and not self._frame.eof and (fed := self._file.read(FEED)):
            self._ready = memoryview(self._frame.decompress(fed))
        return not self._ready and self._frame.eof and not self._frame.unused_data and not self._file.read(1)


class _Member:
    """One file of the archive, to be read once; what was read is kept if it is small."""

    def __init__(self, stream: _Stream, size: int, keep: int) -> None:
        self._stream, self._left = stream, size
        self._keep = size <= keep
        self.kept = bytearray()

    def read(self, most: int) -> bytes:
        if not self._left:
            return b""
        found = self._stream.some(min(most, self._left))
        self._left -= len(found)
        if self._keep:
            self.kept += found
        return found


def _header(name: str, size: int) -> bytes:
    """The 512 bytes before a file: mode 0644, no time, no owner. A longer name than fits is refused."""
    if len(name.encode()) > tarfile.LENGTH_NAME:
        raise OutputError(f"{name}: its name is too long for the archive", fix="use a shorter name")
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")


def _end(total: int) -> int:
    """Zero bytes behind the files: two blocks, and as many as fill the last record."""
    return 2 * tarfile.BLOCKSIZE + -(total + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE
