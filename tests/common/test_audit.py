import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.audit import FIELDS, GENESIS, LONGEST_OUTCOME, AuditError, AuditLog, logged, read_audit
from common.errors import ExitCode, OutputError, UsageError
from tests.disk import full_disk


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "audit.jsonl"
    log = AuditLog(path, "steward")
    for i in range(5):
        log.append("approved", study=f"s{i}", digest="d" * 64, outcome="ok", note="zwölf", number=i)
    return path


def test_lines_say_when_who_what_and_how_it_ended(path: Path) -> None:
    entries = read_audit(path)
    assert [entry["sequence"] for entry in entries] == [1, 2, 3, 4, 5]
    first = entries[0]
    assert (first["actor"], first["action"], first["study"], first["outcome"]) == ("steward", "approved", "s0", "ok")
    assert first["previous"] == GENESIS and entries[1]["previous"] == first["hash"]
    assert set(first) == {*FIELDS, "note", "number"} and first["note"] == "zwölf"
    assert first["time"].endswith("Z")
    assert abs(datetime.fromisoformat(first["time"]) - datetime.now(UTC)) < timedelta(minutes=5)


def test_a_later_process_goes_on_where_the_last_one_ended(path: Path) -> None:
    code = "import sys; from pathlib import Path; from common.audit import AuditLog;"
    code += "[AuditLog(Path(sys.argv[1]), sys.argv[2]).append('x') for _ in range(40)]"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), f"w{i}"]) for i in range(3)]
    assert all(writer.wait(60) == 0 for writer in writers)
    entries = read_audit(path)
    assert len(entries) == 125 and {entry["actor"] for entry in entries[5:]} == {"w0", "w1", "w2"}


def without(line: int) -> Callable[[list[str]], list[str]]:
    return lambda lines: lines[:line] + lines[line + 1 :]


def edited(line: int, old: str, new: str) -> Callable[[list[str]], list[str]]:
    return lambda lines: [text.replace(old, new) if i == line else text for i, text in enumerate(lines)]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (without(0), 1),
        (without(2), 3),
        (edited(1, "approved", "denied"), 2),
        (edited(3, '"number": 3', '"number": 4'), 4),
        (edited(0, "steward", "nobody"), 1),
        (lambda lines: [lines[1], lines[0], *lines[2:]], 1),
        (lambda lines: [*lines[:2], lines[1], *lines[2:]], 3),
        (lambda lines: [*lines[:2], "", *lines[2:]], 3),
        (lambda lines: [*lines[:2], "[1]", *lines[2:]], 3),
        (lambda lines: [*lines[:4], "\x00" * 9], 5),
    ],
)
def test_what_was_changed_is_found_at_its_line(path: Path, change: Callable[[list[str]], list[str]], line: int) -> None:
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    with pytest.raises(AuditError, match=f"line {line} does not fit the chain") as caught:
        read_audit(path)
    assert caught.value.exit_code is ExitCode.VERIFY and "denied" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_byte_that_changes_the_content_is_found(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "audit.jsonl"
        for i in range(3):
            AuditLog(path, "a").append("x", number=i)
        before, content = read_audit(path), bytearray(path.read_bytes())
        position = data.draw(st.integers(0, len(content) - 2))
        content[position] ^= data.draw(st.integers(1, 255))
        path.write_bytes(bytes(content))
        try:
            after = read_audit(path)
        except AuditError:
            return
    assert after == before  # a blank that became a tab: the same content in other bytes


def test_a_torn_line_of_a_killed_process_is_not_counted_and_then_removed(path: Path) -> None:
    with path.open("a") as file:
        file.write('{"sequence": 6, "time": "20')
    assert len(read_audit(path)) == 5
    AuditLog(path, "b").append("y")
    assert [entry["actor"] for entry in read_audit(path)] == ["steward"] * 5 + ["b"]


def test_nothing_is_added_behind_a_damaged_end(path: Path) -> None:
    content = path.read_text() + "garbage\n"
    path.write_text(content)
    with pytest.raises(AuditError, match="the last line cannot be read"):
        AuditLog(path, "b").append("y")
    assert path.read_text() == content


def test_a_full_disk_leaves_whole_lines(path: Path) -> None:
    size = path.stat().st_size
    with full_disk(size + 20), pytest.raises(OutputError, match="cannot be written"):
        AuditLog(path, "b").append("y")
    assert path.stat().st_size == size and len(read_audit(path)) == 5


def test_what_no_line_can_hold(path: Path) -> None:
    log = AuditLog(path, "b")
    with pytest.raises(ValueError, match="fields of every line"):
        log.append("y", time="now")
    with pytest.raises(ValueError, match="JSON compliant"):
        log.append("y", number=float("nan"))
    with pytest.raises(ValueError, match="at most"):
        log.append("y", text="x" * (1 << 20))
    assert len(read_audit(path)) == 5 and json.loads(path.read_text().splitlines()[-1])["number"] == 4


def test_a_log_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="cannot be read"):
        read_audit(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    assert read_audit(tmp_path / "empty.jsonl") == []


def test_the_line_is_on_disk_before_what_it_speaks_of(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", "coordinator")
    with logged(log, "revoke", site="north"):
        (line,) = read_audit(log.path)
    assert (line["action"], line["site"], line["outcome"]) == ("revoke", "north", "ok")
    assert read_audit(log.path) == [line], "and one line is all"


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (UsageError("north: no\n  such   site", fix="x"), "north: no such site"),
        (UsageError("x" * 9000, fix="x"), "x" * LONGEST_OUTCOME),
        (ValueError("Zq7731"), "ValueError"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_a_failure_adds_a_line_that_quotes_only_our_own_messages(
    tmp_path: Path, error: BaseException, outcome: str
) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", "coordinator")
    with pytest.raises(type(error)) as caught, logged(log, "revoke", site="north"):
        raise error
    assert caught.value is error
    lines = [(line["action"], line["site"], line["outcome"]) for line in read_audit(log.path)]
    assert lines == [("revoke", "north", "ok"), ("revoke failed", "north", outcome)]


def test_what_cannot_be_logged_is_not_done(tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").mkdir()
    done = []
    with pytest.raises(OutputError), logged(AuditLog(tmp_path / "audit.jsonl", "coordinator"), "revoke"):
        done.append(1)
    assert done == []
