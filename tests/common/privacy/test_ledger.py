import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import common.privacy.ledger
from common.errors import ExitCode, LedgerError, StudyError
from common.privacy.events import BoundedInfluence, UnboundedInfluence
from common.privacy.ledger import GENESIS, Ledger
from common.privacy.ledger_entries import Entry
from common.privacy.ledger_keys import head_holds, public_hex, sign_head

STUDY = "a" * 64


def spend(ledger: Ledger, number: int, study: str = STUDY) -> Entry:
    return ledger.record(study, BoundedInfluence(number, 0.5, 0.25), f"payload {number}")


def filled(path: Path, rounds: int = 5) -> Path:
    with Ledger(path, "north") as ledger:
        for number in range(1, rounds + 1):
            spend(ledger, number)
    return path


def execute(path: Path, statement: str, *values: Any) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute(statement, values)


def error_of(path: Path, site: str = "north") -> str:
    """The message of the LedgerError with which opening or verifying fails."""
    with pytest.raises(LedgerError) as caught, Ledger(path, site) as ledger:
        ledger.verify()
    assert str(path) in str(caught.value) and "How to mend it" in str(caught.value)
    assert caught.value.exit_code is ExitCode.LEDGER
    return str(caught.value)


@contextmanager
def unprivileged() -> Iterator[Path]:
    """A folder nobody but root may write to, and no root for as long as it lasts."""
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        filled(folder / "old.sqlite")
        (folder / "old.sqlite").chmod(0o444)
        folder.chmod(0o555)
        if root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o700)


def test_spends_are_kept_in_order_and_survive_reopening(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "ledger.sqlite"
    with Ledger(path, "north") as ledger:
        assert ledger.verify() == (0, GENESIS) and ledger.entries() == []
        written = [spend(ledger, 1), spend(ledger, 2), spend(ledger, 1, "b" * 64)]
        written.append(ledger.record("b" * 64, UnboundedInfluence(2, 1.0), "other"))
    with Ledger(path, "north") as ledger:
        assert ledger.entries() == written
        assert [entry.sequence for entry in written] == [1, 2, 3, 4]
        assert ledger.entries("b" * 64) == written[2:] and ledger.entries("c") == []
        assert ledger.verify() == (4, written[-1].hash)


def test_the_chain_is_sha256_over_content_and_predecessor(tmp_path: Path) -> None:
    with Ledger(filled(tmp_path / "l.sqlite", 2), "north") as ledger:
        one, two = ledger.entries()
    assert one.previous == GENESIS and two.previous == one.hash
    event = {"type": "BoundedInfluence", "round": 2, "update_norm": 0.5, "weight": 0.25}
    content = ["north", 2, STUDY, event, "payload 2", two.recorded_at, "", one.hash]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert two.hash == hashlib.sha256(text.encode()).hexdigest()


def test_a_resend_is_not_a_new_spend(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    with Ledger(path, "north") as ledger:
        first = spend(ledger, 1)
        assert spend(ledger, 1) == first
    with Ledger(path, "north") as ledger:
        assert spend(ledger, 1) == first and ledger.entries() == [first]


@pytest.mark.parametrize(
    ("event", "payload"),
    [
        (BoundedInfluence(1, 0.5, 0.25), "other bytes"),
        (BoundedInfluence(1, 0.6, 0.25), "payload 1"),
        (BoundedInfluence(1, 0.5, 0.3), "payload 1"),
        (UnboundedInfluence(1, 0.25), "payload 1"),
    ],
)
def test_a_round_is_answered_once(tmp_path: Path, event: BoundedInfluence, payload: str) -> None:
    with Ledger(tmp_path / "l.sqlite", "north") as ledger:
        first = spend(ledger, 1)
        with pytest.raises(LedgerError, match="round 1 of this study has been spent"):
            ledger.record(STUDY, event, payload)
        assert ledger.entries() == [first], "and nothing was written"
        spend(ledger, 2)
        assert ledger.verify()[0] == 2


def test_a_spend_that_is_not_approved_is_not_written(tmp_path: Path) -> None:
    shown: list[int] = []

    def refuse(entries: Sequence[Entry]) -> None:
        shown.append(len(entries))
        raise StudyError("too much")

    with Ledger(filled(tmp_path / "l.sqlite"), "north") as ledger:
        before = ledger.verify()
        with pytest.raises(StudyError, match="too much"):
            ledger.record(STUDY, BoundedInfluence(6, 0.5, 0.25), "payload 6", refuse)
        assert ledger.verify() == before and shown == [5]
        ledger.record(STUDY, BoundedInfluence(5, 0.5, 0.25), "payload 5", refuse)  # a resend spends nothing
        ledger.record(STUDY, BoundedInfluence(6, 0.5, 0.25), "payload 6", lambda entries: shown.append(-len(entries)))
        assert shown == [5, -5] and ledger.verify()[0] == 6


@pytest.mark.parametrize("row", [1, 3, 5])
@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("study", "c" * 64),
        ("round", 77),
        ("event", '{"type": "BoundedInfluence", "round": 1, "update_norm": 0.1, "weight": 0.25}'),
        ("event", '{"type": "UnboundedInfluence", "round": 1, "weight": 0.25}'),
        ("payload_digest", "forged"),
        ("recorded_at", "2001-01-01T00:00:00+00:00"),
        ("note", "the clock went backwards: the entry before is dated 2001-01-01T00:00:00+00:00"),
        ("previous", GENESIS[:-1] + "1"),
        ("hash", "f" * 64),
        ("sequence", 99),
    ],
)
def test_an_edit_of_any_field_is_found(tmp_path: Path, row: int, column: str, value: Any) -> None:
    path = filled(tmp_path / "l.sqlite")
    execute(path, f"UPDATE spends SET {column} = ? WHERE sequence = ?", value, row)
    text = error_of(path)
    assert "does not fit the chain" in text and f"entry {row}" in text


@pytest.mark.parametrize(
    "event",
    [
        "not JSON",
        "{}",
        "[]",
        "5",
        '{"type": "Gaussian", "round": 2}',
        '{"type": [], "round": 2}',
        '{"type": "BoundedInfluence"}',
        '{"type": "BoundedInfluence", "round": 2, "update_norm": NaN, "weight": 0.25}',
        '{"type": "BoundedInfluence", "round": 2, "update_norm": Infinity, "weight": 0.25}',
    ],
)
def test_an_event_that_cannot_be_read_is_a_ledger_error(tmp_path: Path, event: str) -> None:
    path = filled(tmp_path / "l.sqlite")
    execute(path, "UPDATE spends SET event = ? WHERE sequence = 2", event)
    error_of(path)
    with Ledger(path, "north") as ledger, pytest.raises(LedgerError):
        spend(ledger, 2)


@pytest.mark.parametrize("column", ["study", "event", "payload_digest", "recorded_at", "note", "previous", "hash"])
def test_bytes_in_place_of_text_are_a_ledger_error(tmp_path: Path, column: str) -> None:
    path = filled(tmp_path / "l.sqlite")
    execute(path, f"UPDATE spends SET {column} = CAST({column} || 'x' AS BLOB) WHERE sequence = 2")
    error_of(path)


@pytest.mark.parametrize("row", [1, 2, 4])
def test_a_deleted_row_is_found(tmp_path: Path, row: int) -> None:
    path = filled(tmp_path / "l.sqlite")
    execute(path, "DELETE FROM spends WHERE sequence = ?", row)
    assert f"entry {row}" in error_of(path)


def test_a_deleted_row_is_found_when_the_numbers_are_closed_up(tmp_path: Path) -> None:
    path = filled(tmp_path / "l.sqlite")
    execute(path, "DELETE FROM spends WHERE sequence = 2")
    for row in (3, 4, 5):
        execute(path, "UPDATE spends SET sequence = ? WHERE sequence = ?", row - 1, row)
    assert "entry 2" in error_of(path)


def test_rows_in_another_order_are_found(tmp_path: Path) -> None:
    path = filled(tmp_path / "l.sqlite")
    for old, new in ((2, 100), (3, 2), (100, 3)):
        execute(path, "UPDATE spends SET sequence = ? WHERE sequence = ?", new, old)
    assert "entry 2" in error_of(path)


@pytest.mark.parametrize("sequence", [0, 6])
def test_an_inserted_row_is_found(tmp_path: Path, sequence: int) -> None:
    path = filled(tmp_path / "l.sqlite")
    execute(
        path,
        "INSERT INTO spends SELECT ?, study, 50, event, payload_digest, recorded_at, note, previous, hash FROM spends"
        " WHERE sequence = 5",
        sequence,
    )
    assert "does not fit the chain" in error_of(path)


@pytest.mark.parametrize("kept", [0, 1, 4])
def test_a_cut_off_tail_is_told_apart(tmp_path: Path, kept: int) -> None:
    path = filled(tmp_path / "l.sqlite")
    execute(path, "DELETE FROM spends WHERE sequence > ?", kept)
    assert f"truncated: 5 entries were signed and {kept} are there" in error_of(path)
    with Ledger(path, "north") as ledger, pytest.raises(LedgerError, match="truncated"):
        spend(ledger, 6)  # which would sign the shortened ledger


def test_another_sites_ledger_is_refused(tmp_path: Path) -> None:
    path = filled(tmp_path / "l.sqlite")
    assert "belongs to site 'north', not to 'south'" in error_of(path, "south")
    execute(path, "UPDATE header SET value = 'south' WHERE key = 'site'")
    assert "does not fit the chain" in error_of(path, "south"), "nor does renaming it help"


@pytest.mark.parametrize("format_", ["3", "1", "", "2.0"])
def test_another_format_is_refused(tmp_path: Path, format_: str) -> None:
    path = filled(tmp_path / "l.sqlite")
    execute(path, "UPDATE header SET value = ? WHERE key = 'format'", format_)
    assert f"ledger format {format_}, this version writes format 2" in error_of(path)
    assert ("a newer version" in error_of(path)) == (format_ == "3")


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    path.write_bytes(b"a steward's notes, " * 100)
    assert "the ledger cannot be used" in error_of(path)
    assert path.read_bytes() == b"a steward's notes, " * 100


def test_a_corrupted_file_is_a_ledger_error(tmp_path: Path) -> None:
    path = filled(tmp_path / "l.sqlite", 40)
    content = path.read_bytes()
    broken = [content[: len(content) // 2]]
    for start in range(0, len(content), 4096):
        page = bytearray(content)
        page[max(start, 100) : start + 3000] = b"\xa5" * (3000 - max(start, 100) + start)
        broken.append(bytes(page))
    assert len(broken) > 5
    for damaged in broken:
        path.write_bytes(damaged)
        # Reading the rows does not touch the index that answers "has this round been spent"; a spend does.
        with pytest.raises(LedgerError), Ledger(path, "north") as ledger:
            ledger.verify()
            spend(ledger, 3)


@pytest.mark.parametrize("name", ["new.sqlite", "old.sqlite", "sub/new.sqlite"])
def test_a_read_only_folder_is_a_ledger_error(name: str) -> None:
    with unprivileged() as folder, pytest.raises(LedgerError) as caught, Ledger(folder / name, "north") as ledger:
        spend(ledger, 9)
    assert Path(name).stem in str(caught.value) and "permissions" in str(caught.value)


def test_a_file_in_place_of_the_folder_is_a_ledger_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError), Ledger(tmp_path / "file" / "l.sqlite", "north"):
        pass


def test_every_commit_waits_for_the_disk(tmp_path: Path) -> None:
    # No test can cut the power; what SQLite promises for it hangs on this setting (3 is EXTRA).
    with Ledger(tmp_path / "l.sqlite", "north") as ledger:
        assert ledger._database.execute("PRAGMA synchronous").fetchone() == (3,)
        assert ledger._database.execute("PRAGMA journal_mode").fetchone() == ("delete",)


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def start(*processes: subprocess.Popen[str]) -> None:
    """Let all of them write at once, when each has opened the ledger."""
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()


WRITER = """
import sys
from pathlib import Path
from common.privacy.events import BoundedInfluence
from common.privacy.ledger import Ledger
path, first, last, study, payload = sys.argv[1:]
with Ledger(Path(path), "north") as ledger:
    print("ready", flush=True)
    sys.stdin.readline()  # the start signal
    for number in range(int(first), int(last)):
        ledger.record(study, BoundedInfluence(number, 0.5, 0.25), payload)
        print(number, flush=True)
"""


@pytest.mark.parametrize("acknowledged", [1, 7, 30])
def test_every_acknowledged_spend_survives_kill_minus_nine(tmp_path: Path, acknowledged: int) -> None:
    path = tmp_path / "l.sqlite"
    process = child(WRITER, path, 1, 1_000_000, STUDY, "payload")
    start(process)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(acknowledged)]
    process.send_signal(signal.SIGKILL)
    lines += process.stdout.readlines()
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    complete = [int(line) for line in lines if line.endswith("\n")]
    assert complete == list(range(1, len(complete) + 1)) and len(complete) >= acknowledged
    with Ledger(path, "north") as ledger:
        length, _ = ledger.verify()
        assert len(complete) <= length <= len(complete) + 1, "at most one spend was on disk and not yet acknowledged"
        assert [entry.round for entry in ledger.entries()] == list(range(1, length + 1))
        spend(ledger, length + 1)
        assert ledger.verify()[0] == length + 1


CREATOR = """
import sys
from pathlib import Path
from common.privacy.events import BoundedInfluence
from common.privacy.ledger import Ledger
print("ready", flush=True)
sys.stdin.readline()
for number in range(1_000_000):
    with Ledger(Path(sys.argv[1]) / str(number) / "ledger.sqlite", "north") as ledger:
        ledger.record("s", BoundedInfluence(1, 0.5, 0.25), "payload")
    print(number, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.003, 0.011])
def test_a_ledger_killed_while_it_is_made_is_made_by_the_next_start(tmp_path: Path, delay: float) -> None:
    process = child(CREATOR, tmp_path)
    start(process)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    lines += process.stdout.readlines()
    process.wait()
    process.stdout.close()
    complete = sum(line.endswith("\n") for line in lines)
    folders = sorted(tmp_path.iterdir(), key=lambda folder: int(folder.name))
    assert complete <= len(folders) <= complete + 1
    for number, folder in enumerate(folders):
        with Ledger(folder / "ledger.sqlite", "north") as ledger:
            length, _ = ledger.verify()
            assert length == 1 or (length == 0 and number == complete), "an acknowledged spend was lost"
            spend(ledger, 2)
            assert ledger.verify()[0] == length + 1


def test_a_ledger_that_another_process_holds_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled(tmp_path / "l.sqlite", 1)
    connect: Callable[..., sqlite3.Connection] = sqlite3.connect

    def impatient(path: Path, **options: Any) -> sqlite3.Connection:
        return connect(path, **(options | {"timeout": 0.05}))

    monkeypatch.setattr(sqlite3, "connect", impatient)
    with closing(connect(path, isolation_level=None)) as other, Ledger(path, "north") as ledger:
        other.execute("BEGIN IMMEDIATE")
        assert ledger.verify()[0] == 1  # reading is possible meanwhile
        with pytest.raises(LedgerError, match="another process holds the ledger"):
            spend(ledger, 2)
        other.execute("ROLLBACK")
        spend(ledger, 2)
        assert ledger.verify()[0] == 2


def test_two_processes_write_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    filled(path, 1)
    processes = [child(WRITER, path, 2, 32, study, "payload") for study in ("b" * 64, "c" * 64)]
    start(*processes)
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    with Ledger(path, "north") as ledger:
        assert ledger.verify()[0] == 61
        for study in ("b" * 64, "c" * 64):
            assert [entry.round for entry in ledger.entries(study)] == list(range(2, 32))


def test_of_two_processes_with_different_answers_one_wins_each_round(tmp_path: Path) -> None:
    path = tmp_path / "l.sqlite"
    loop = WRITER.replace(
        "        ledger.record(study, BoundedInfluence(number, 0.5, 0.25), payload)\n        print(number, flush=True)",
        "        try:\n"
        "            ledger.record(study, BoundedInfluence(number, 0.5, 0.25), payload)\n"
        "            print(number, flush=True)\n"
        "        except LedgerError:\n"
        "            pass",
    ).replace("import sys\n", "import sys\nfrom common.errors import LedgerError\n", 1)
    processes = {payload: child(loop, path, 1, 31, STUDY, payload) for payload in ("one", "two")}
    start(*processes.values())
    won = {payload: {int(n) for n in process.communicate()[0].split()} for payload, process in processes.items()}
    assert all(process.returncode == 0 for process in processes.values())
    assert not won["one"] & won["two"] and won["one"] | won["two"] == set(range(1, 31))
    with Ledger(path, "north") as ledger:
        assert {entry.round: entry.payload_digest for entry in ledger.entries()} == {
            number: payload for payload, numbers in won.items() for number in numbers
        }
        assert ledger.verify()[0] == 30


# ---------------------------------------------------------------- the site's key and the signed head


def pem(key: Any, password: bytes | None = None) -> bytes:
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def header(path: Path) -> dict[str, str]:
    with closing(sqlite3.connect(path)) as database:
        return dict(database.execute("SELECT key, value FROM header").fetchall())


def test_the_first_use_makes_a_key_for_the_owner_alone(tmp_path: Path) -> None:
    path = filled(tmp_path / "state" / "ledger.sqlite", 1)
    key = path.with_name("ledger.key")
    assert key.stat().st_mode & 0o777 == 0o600
    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    assert isinstance(loaded, Ed25519PrivateKey) and public_hex(loaded) == header(path)["key"]
    assert sorted(file.name for file in path.parent.iterdir()) == ["ledger.key", "ledger.sqlite"]
    before = key.read_bytes()
    filled(path, 2)
    assert key.read_bytes() == before


def test_every_spend_signs_the_new_head(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite", "north") as ledger:
        seen = [ledger.head()]
        for number in (1, 2):
            entry = spend(ledger, number)
            seen.append(ledger.head())
            assert (seen[-1].length, seen[-1].head) == (number, entry.hash)
        spend(ledger, 2)
        assert ledger.head() == seen[-1], "a resend signs nothing new"
    assert (seen[0].length, seen[0].head) == (0, GENESIS)
    assert all(head.holds and head.site == "north" for head in seen) and len({h.signature for h in seen}) == 3
    one = seen[1]
    assert not head_holds("ledger head", one.key, "south", one.length, one.head, one.signature)
    assert not head_holds("ledger head", one.key, "north", 2, one.head, one.signature)
    assert not head_holds("countersignature", one.key, "north", one.length, one.head, one.signature)
    for malformed in ("", "zz", one.signature[:-2], "ü" * 128):
        assert not head_holds("ledger head", one.key, "north", one.length, one.head, malformed)
        assert not head_holds("ledger head", malformed, "north", one.length, one.head, one.signature)


def spoil_key(kind: str, key: Path) -> str:
    """Spoil the key file; returns what the error must say."""
    if kind == "missing":
        key.unlink()
        return "is missing"
    if kind == "open to others":
        key.chmod(0o640)
        return "permissions 0640"
    if kind == "a folder":
        key.unlink()
        key.mkdir()
        return "is not a file"
    contents = {
        "empty": (b"", "not a readable PEM"),
        "garbage": (b"\x00 no key \xff", "not a readable PEM"),
        "another type": (pem(ec.generate_private_key(ec.SECP256R1())), "not an Ed25519 key"),
        "locked": (pem(Ed25519PrivateKey.generate(), b"secret"), "without a password"),
        "another key": (pem(Ed25519PrivateKey.generate()), "signed by another key"),
    }
    content, expected = contents[kind]
    key.write_bytes(content)
    return expected


KEY_FAULTS = ["missing", "open to others", "a folder", "empty", "garbage", "another type", "locked", "another key"]


@pytest.mark.parametrize("kind", KEY_FAULTS)
def test_a_ledger_is_not_continued_without_its_key(tmp_path: Path, kind: str) -> None:
    path = filled(tmp_path / "ledger.sqlite", 2)
    expected = spoil_key(kind, tmp_path / "ledger.key")
    with Ledger(path, "north") as ledger, pytest.raises(LedgerError, match=expected):
        spend(ledger, 3)
    if kind != "missing":
        with Ledger(path, "north") as ledger, pytest.raises(LedgerError, match=expected):
            ledger.verify()
    with Ledger(path, "north") as ledger:
        assert len(ledger.entries()) == 2 and ledger.head().length == 2


@pytest.mark.parametrize("kind", KEY_FAULTS[1:7])
def test_a_new_ledger_does_not_take_an_unusable_key(tmp_path: Path, kind: str) -> None:
    key = tmp_path / "ledger.key"
    key.write_bytes(pem(Ed25519PrivateKey.generate()))
    key.chmod(0o600)
    expected = spoil_key(kind, key)
    with pytest.raises(LedgerError, match=expected):
        Ledger(tmp_path / "ledger.sqlite", "north")


def test_a_start_that_died_after_the_key_goes_on_with_it(tmp_path: Path) -> None:
    path = filled(tmp_path / "ledger.sqlite", 1)
    before = (tmp_path / "ledger.key").read_bytes()
    path.write_bytes(b"")  # what a kill between the key and the first commit leaves
    with Ledger(path, "north") as ledger:
        spend(ledger, 1)
        ledger.verify()
    assert (tmp_path / "ledger.key").read_bytes() == before


def test_a_copy_without_the_key_can_be_checked(tmp_path: Path) -> None:
    path = filled(tmp_path / "ledger.sqlite")
    (tmp_path / "copy").mkdir()
    copy = tmp_path / "copy" / "north.sqlite"
    copy.write_bytes(path.read_bytes())
    with Ledger(path) as ledger, Ledger(copy) as other:
        assert other.site == "north" and other.verify() == ledger.verify()
        assert ledger.inspect().key_compared and not other.inspect().key_compared
    assert [file.name for file in copy.parent.iterdir()] == ["north.sqlite"]
    with pytest.raises(LedgerError, match="there is no ledger"):
        Ledger(tmp_path / "none.sqlite")
    assert not (tmp_path / "none.sqlite").exists()


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("length", "4", "signature of the head does not hold"),
        ("length", "five", "signed head was edited or removed"),
        ("head", "f" * 64, "signature of the head does not hold"),
        ("signature", "0" * 128, "signature of the head does not hold"),
        ("key", "0" * 64, "signed by another key"),
    ],
)
def test_an_edited_head_is_found(tmp_path: Path, field: str, value: str, expected: str) -> None:
    path = filled(tmp_path / "l.sqlite")
    execute(path, "UPDATE header SET value = ? WHERE key = ?", value, field)
    assert expected in error_of(path)
    execute(path, "DELETE FROM header WHERE key = ?", field)
    assert "signed head was edited or removed" in error_of(path)


def forge(path: Path, last: int, key: Ed25519PrivateKey | None = None) -> None:
    """Rewrite the chain to `last` entries as someone with this software but another key, or none, could."""
    twin = path.with_name("twin.sqlite")
    with Ledger(twin, "north") as ledger:
        for number in range(1, last + 1):
            ledger.record(STUDY, BoundedInfluence(number, 0.1, 0.25), f"forged {number}")
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("ATTACH ? AS twin", (str(twin),))
        database.execute("DELETE FROM spends")
        database.execute("INSERT INTO spends SELECT * FROM twin.spends")
    if key is not None:
        head = header(twin)["head"]
        signature = sign_head("ledger head", key, "north", last, head)
        fields = {"length": str(last), "head": head, "signature": signature, "key": public_hex(key)}
        for name, value in fields.items():
            execute(path, "UPDATE header SET value = ? WHERE key = ?", value, name)


@pytest.mark.parametrize(
    ("last", "expected"),
    [(5, "the entries were edited"), (7, "2 entries were added"), (3, "truncated: 5 entries were signed and 3")],
)
def test_a_chain_computed_anew_needs_the_key(tmp_path: Path, last: int, expected: str) -> None:
    path = filled(tmp_path / "l.sqlite")
    forge(path, last)
    assert expected in error_of(path)
    with Ledger(path, "north") as ledger, pytest.raises(LedgerError, match=expected.split(":")[0]):
        spend(ledger, 9)


def test_a_ledger_signed_by_another_key_is_told_apart(tmp_path: Path) -> None:
    path = filled(tmp_path / "l.sqlite")
    forge(path, 5, Ed25519PrivateKey.generate())
    assert "signed by another key than l.key" in error_of(path)


# ---------------------------------------------------------------- the clock


def test_a_clock_that_goes_backwards_is_noted_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "l.sqlite"
    times = [f"2026-03-{day:02d}T00:00:00+00:00" for day in (10, 11, 5, 5, 6)]
    with Ledger(path, "north") as ledger:
        for number, now in enumerate(times, start=1):
            monkeypatch.setattr(common.privacy.ledger, "_now", lambda now=now: now)
            spend(ledger, number)
        found = ledger.inspect()
        assert ledger.verify()[0] == 5
    assert [entry.recorded_at for entry in found.entries] == times, "what the clock said, not what it should have said"
    notes = [entry.note for entry in found.entries]
    assert notes == ["", "", f"the clock went backwards: the entry before is dated {times[1]}", "", ""]
    assert len(found.clock) == 1 and "entry 3" in found.clock[0] and "went backwards" in found.clock[0]


def test_no_finding_in_an_orderly_ledger(tmp_path: Path) -> None:
    with Ledger(filled(tmp_path / "l.sqlite")) as ledger:
        found = ledger.inspect()
    assert found.clock == () and found.witnesses == () and found.key_compared
    assert (found.head.length, found.head.head) == (5, found.entries[-1].hash)


# ---------------------------------------------------------------- countersignatures

COORDINATOR = Ed25519PrivateKey.generate()


def countersign(ledger: Ledger, length: int, head: str, key: Ed25519PrivateKey = COORDINATOR) -> None:
    signature = sign_head("countersignature", key, "north", length, head)
    ledger.countersigned(public_hex(key), length, head, signature)


def test_the_longest_countersignature_of_every_coordinator_is_kept(tmp_path: Path) -> None:
    path, other = filled(tmp_path / "l.sqlite"), Ed25519PrivateKey.generate()
    with Ledger(path, "north") as ledger:
        hashes = [GENESIS, *(entry.hash for entry in ledger.entries())]
        before = ledger.head()
        countersign(ledger, 0, GENESIS)
        countersign(ledger, 4, hashes[4])
        countersign(ledger, 2, hashes[2])  # late, but true
        countersign(ledger, 1, hashes[1], other)
        assert ledger.head() == before, "countersignatures are no part of the chain"
    with Ledger(path, "north") as ledger:
        kept = {witness.key: (witness.length, witness.head) for witness in ledger.inspect().witnesses}
    assert kept == {public_hex(COORDINATOR): (4, hashes[4]), public_hex(other): (1, hashes[1])}


def test_a_coordinator_who_has_seen_more_shows_that_the_ledger_was_rolled_back(tmp_path: Path) -> None:
    path = filled(tmp_path / "l.sqlite", 3)
    backup = path.read_bytes()
    filled(path, 5)
    with Ledger(path, "north") as ledger:
        length, head = ledger.verify()
    path.write_bytes(backup)
    with Ledger(path, "north") as ledger:
        assert ledger.verify()[0] == 3, "an old copy is consistent in itself"
        with pytest.raises(LedgerError, match="seen 5 entries that this ledger of 3 does not hold: it was rolled back"):
            countersign(ledger, length, head)
        with pytest.raises(LedgerError, match="rolled back"):
            countersign(ledger, 3, "f" * 64)
        assert ledger.countersignatures() == ()


def test_a_countersignature_that_nobody_gave_is_refused(tmp_path: Path) -> None:
    path = filled(tmp_path / "l.sqlite", 2)
    with Ledger(path, "north") as ledger:
        own = ledger.head()
        with pytest.raises(LedgerError, match="countersignature does not hold"):
            ledger.countersigned(own.key, own.length, own.head, own.signature)  # a head's signature is none
        countersign(ledger, 2, own.head)
    execute(path, "UPDATE witnesses SET length = 1")
    assert "countersignature does not hold" in error_of(path)
