"""What is handed out: the signed files of a release and their manifest, and nothing else of the run's folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from common.bundles import MANIFEST
from common.bundles_archive import write_archive
from common.errors import OutputError, UsageError
from common.folders import new_folder
from server.release import verify_release

SUFFIX = ".tar.zst"


def bundle_release(folder: Path, out: Path, key: Path | None = None) -> list[str]:
    """Write an archive if `out` ends in .tar.zst, else a new folder; returns the names of the files in it.

    `VerifyError` if the release is not what was signed, before or after; `OutputError` if `out` is taken.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: not a folder", fix="name the folder of a finished run")
    statement = verify_release(folder, key)
    names = sorted([MANIFEST, *(subject["name"] for subject in statement["subject"])])
    whose = key or next(path for path in (folder / "simulation-key.pub", folder / "release.pub") if path.exists())
    if out.name.endswith(SUFFIX):
        if out.exists():
            raise OutputError(f"{out}: exists; releases are never written over", fix="choose another name")
        write_archive(out, folder, names)
    else:
        with new_folder(out) as made:
            for name in names:
                shutil.copyfile(folder / name, made / name)
            made.chmod(0o755)
    verify_release(out, whose)  # a file that changed meanwhile must not go out unnoticed
    return names
