"""A new folder of private files: whole or not at all, and never over something that is there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from common.errors import OutputError
from common.files import sync_directory


@contextmanager
def new_folder(directory: Path) -> Iterator[Path]:
    """Yield a temporary folder (mode 0700) that takes the place of `directory`, absent or empty, if the block succeeds.

    `OutputError` if something is there already or the folder cannot be made; then nothing is left behind.
    """
    directory = Path(os.path.abspath(directory))  # noqa: PTH100 - a link stays one
    try:
        if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
            raise OutputError(f"{directory}: exists and is not a folder", fix="choose another folder")
        if directory.is_dir() and any(directory.iterdir()):
            raise OutputError(
                f"{directory}: is not empty; keys and configuration are never written over",
                fix="choose another folder",
            )
        directory.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    except OSError as error:
        raise _not_made(directory, error) from None
    try:
        yield folder
        sync_directory(folder)
        folder.rename(directory)  # onto an empty folder or none; fails if it was filled meanwhile
        sync_directory(directory.parent)
    except OSError as error:
        raise _not_made(directory, error) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def aside(path: Path) -> Path:
    """A free name beside `path` for the version that is being replaced: NAME.old-<UTC time>."""
    name = f"{path.name}.old-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    candidates = [path.with_name(name), *(path.with_name(f"{name}-{number}") for number in range(2, 1000))]
    return next(candidate for candidate in candidates if not candidate.exists())


def _not_made(directory: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{directory}: cannot be made ({error.strerror or 'input/output error'})",
        fix="choose another folder, free disk space or correct the permissions",
    )
