"""Small disks that can be filled: file systems in memory, mounted for a test."""

import subprocess
from pathlib import Path

BLOCK = b"\0" * 65536


class Disk:
    """A file system of `mebibytes` at `folder`; `OSError` where this machine does not allow one."""

    def __init__(self, folder: Path, mebibytes: int) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        options = f"size={mebibytes}m,mode=0700"
        mount = ["mount", "-t", "tmpfs", "-o", options, "cohortium-test", str(folder)]
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise OSError(f"{folder}: a small file system cannot be mounted here ({done.stderr.strip()})")

    def fill(self) -> None:
        """Not a byte is left."""
        with (self.folder / "ballast").open("ab", buffering=0) as file:
            for size in (len(BLOCK), 1):
                try:
                    while file.write(BLOCK[:size]):
                        pass
                except OSError:
                    continue

    def free(self) -> None:
        """Space again."""
        (self.folder / "ballast").unlink()

    def close(self) -> None:
        """Unmount it, whoever still has a file open there."""
        subprocess.run(["umount", "-l", str(self.folder)], capture_output=True, check=False)
