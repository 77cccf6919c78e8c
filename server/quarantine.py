"""A candidate whose gates failed: kept on disk, apart, and with nothing about it that looks like a release.

The manifest goes first and comes back last, so that there is no moment at which a failed candidate could be taken for a
release. Every step can be repeated after a crash.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.bundles import KEYS
from common.errors import OutputError
from common.files import sync_directory, write_atomic
from common.gates import NOT_RELEASED, GatesDocument, failed_in_words
from common.override import FORMER
from server.release_readme import README
from server.run import RunFiles


def moved(files: RunFiles) -> list[Path]:
    """What only a release has any use for: it moves into quarantine."""
    return [
        files.cohort_csv,
        files.cohort_parquet,
        files.privacy,
        files.metrics,
        files.report,
        files.evaluation,
        files.audit,
        files.gates,
    ]


def copied(files: RunFiles) -> list[Path]:
    """What would be released and what the run needs as well: it stays, and quarantine has a copy."""
    return [files.study, files.sites, files.rounds, files.release]


def quarantine(files: RunFiles, document: GatesDocument) -> Path:
    """Put the candidate away; returns the folder. `OutputError` if the disk does not take it."""
    folder = files.quarantine
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
        write_atomic(folder / NOT_RELEASED, _notice(document))
        if files.manifest.exists():
            files.manifest.replace(folder / FORMER)
        for path in (files.out / README, *(files.out / name for name in KEYS)):
            path.unlink(missing_ok=True)
        write_atomic(files.gates, gates_text(document))
        _put_away(files)
        for path in copied(files):
            if path.exists():
                write_atomic(folder / path.name, path.read_bytes())
        sync_directory(files.out)
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written ({error.strerror})", fix="free space or correct the permissions; nothing was"
            " released",
        ) from None  # fmt: skip
    return folder


@contextmanager
def out_of_quarantine(files: RunFiles) -> Iterator[bool]:
    """Take the candidate back for another attempt; whether there was one. Whatever fails puts it into quarantine again.

    NOT-RELEASED.txt stays until `leave`.
    """
    held = (files.quarantine / NOT_RELEASED).is_file()
    try:
        if held:
            for path in moved(files):
                kept = files.quarantine / path.name
                if kept.exists():
                    kept.replace(path)
        yield held
    except BaseException:
        if held and files.quarantine.is_dir():
            _put_away(files)
        raise


def leave(files: RunFiles) -> None:
    """The gates are open: nothing is in quarantine any more. A former manifest is back, with its countersignatures."""
    former = files.quarantine / FORMER
    if former.exists():
        former.replace(files.manifest)
    shutil.rmtree(files.quarantine, ignore_errors=True)


def gates_text(document: GatesDocument) -> str:
    """gates.json."""
    return document.model_dump_json(indent=1)


def _put_away(files: RunFiles) -> None:
    for path in moved(files):
        if path.exists():
            path.replace(files.quarantine / path.name)


def _notice(document: GatesDocument) -> str:
    return (
        "This is not a release. Gates of the study failed, and nothing here may be passed on.\n\n"
        f"{failed_in_words(document.gates)}\n\n"
        "Once what failed is mended, `cohortium release RUN` evaluates the gates again. docs/release.md says how a\n"
        "gate can be overridden, with a reason and a second person's signature.\n"
    )
