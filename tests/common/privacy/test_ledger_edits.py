"""Every edit of the file is found, and told apart."""

from pathlib import Path
from typing import Any

import pytest

from common.errors import LedgerError
from common.privacy.ledger import GENESIS, Ledger
from tests.common.privacy.ledgers import error_of, execute, filled, spend


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
