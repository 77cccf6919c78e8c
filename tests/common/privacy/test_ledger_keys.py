"""The site's key, the signed head, and the coordinator's countersignatures."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import LedgerError
from common.privacy.events import BoundedInfluence
from common.privacy.ledger import GENESIS, Ledger
from common.privacy.ledger_keys import head_holds, public_hex, sign_head
from tests.common.privacy.ledgers import STUDY, error_of, execute, filled, spend

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
