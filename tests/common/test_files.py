import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.errors import ExitCode, OutputError
from common.files import append_line, atomic_path, write_atomic
from tests.disk import full_disk


@contextmanager
def read_only_folder() -> Iterator[Path]:
    """A folder that this process may not write to, and no root for as long as it lasts."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        (folder / "old.txt").write_text("old")
        folder.chmod(0o555)
        if root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o700)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", ["", "zwölf\n", b"\x00\xff" * 100_000])
def test_content_arrives_and_replaces_what_was_there(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "deep" / "er" / "file.bin"
    write_atomic(path, "something else")
    write_atomic(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert names(path.parent) == ["file.bin"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_follow_the_umask(tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        write_atomic(tmp_path / "file", "x")
        assert os.umask(mask) == mask, "and the umask is as it was"
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "cohort.csv"
    write_atomic(path, "old")
    with full_disk(10_000), pytest.raises(OutputError) as caught:
        write_atomic(path, "x" * 100_000)
    assert str(path) in str(caught.value) and "How to mend it" in str(caught.value)
    assert caught.value.exit_code is ExitCode.OUTPUT
    assert path.read_text() == "old" and names(tmp_path) == ["cohort.csv"]


def test_a_full_disk_leaves_no_new_file(tmp_path: Path) -> None:
    with full_disk(10_000), pytest.raises(OutputError):
        write_atomic(tmp_path / "new", "x" * 100_000)
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_any_failure_inside_leaves_the_old_file_and_is_passed_on(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")
    with pytest.raises(type(error)) as caught, atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert caught.value is error
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_the_file_is_not_there_before_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists() and temporary.parent == tmp_path
    assert path.read_text() == "whole"


def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")
    code = (
        "import os, sys; from pathlib import Path; from common.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -signal.SIGKILL
    assert path.read_text() == "old"


@pytest.mark.parametrize("name", ["new.txt", "old.txt", "sub/new.txt"])
def test_a_missing_permission_is_named(name: str) -> None:
    with read_only_folder() as folder:
        with pytest.raises(OutputError, match="Permission denied"):
            write_atomic(folder / name, "new")
        assert names(folder) == ["old.txt"] and (folder / "old.txt").read_text() == "old"


def test_paths_that_cannot_be_files(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "folder", tmp_path / "file" / "below", tmp_path / ("n" * 300)):
        with pytest.raises(OutputError) as caught:
            write_atomic(path, "x")
        assert str(path) in str(caught.value)
    assert names(tmp_path) == ["file", "folder"]


def test_lines_are_appended_in_order(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    for line in ("one", "zwölf", ""):
        append_line(path, line)
    assert path.read_bytes() == "one\nzwölf\n\n".encode()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_appending_to_a_full_device_is_an_output_error() -> None:
    with pytest.raises(OutputError, match=r"/dev/full: cannot be written \(No space left on device\)"):
        append_line(Path("/dev/full"), "line")


def test_appending_where_nothing_can_be_written(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent" / "file"):
        with pytest.raises(OutputError, match="cannot be written"):
            append_line(path, "line")
    append_line(tmp_path / "file", "first")
    with full_disk(100), pytest.raises(OutputError):
        append_line(tmp_path / "file", "x" * 1000)
    assert (tmp_path / "file").read_text().startswith("first\n")
