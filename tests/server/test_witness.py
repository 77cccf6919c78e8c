"""The coordinator's memory of the sites' ledgers, and the strategy that acts on it."""

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import FederationError
from common.privacy.ledger_keys import SignedHead, head_holds, public_hex, sign_head
from common.records import MessageError
from server.witness import ROLLED_BACK, Witness

COORDINATOR, SITE, OTHER = (Ed25519PrivateKey.generate() for _ in range(3))
STUDY = "a" * 64
A, B, C = "a" * 64, "b" * 64, "c" * 64


def signed(length: int, head: str, key: Ed25519PrivateKey = SITE) -> tuple[int, str, str]:
    return length, head, sign_head("ledger head", key, "north", length, head)


def joins(witness: Witness, length: int, head: str, key: Ed25519PrivateKey = SITE) -> None:
    witness.joined(SignedHead("north", *signed(length, head, key), public_hex(key)))


@pytest.fixture
def witness(tmp_path: Path) -> Witness:
    witness = Witness(tmp_path / "ledger-heads.json", COORDINATOR)
    joins(witness, 3, A)
    return witness


def test_what_was_seen_survives_a_restart(witness: Witness) -> None:
    witness.spent("north", signed(4, B), STUDY, 1, "digest")
    assert not witness.path.exists()
    witness.save()
    again = Witness(witness.path, COORDINATOR)
    assert again["north"] == witness["north"]
    assert (again["north"].length, again["north"].head, again["north"].round) == (4, B, 1)
    written = witness.path.stat().st_mtime_ns
    again.save()
    assert witness.path.stat().st_mtime_ns == written, "nothing new, nothing written"


def test_a_new_spend_lengthens_the_ledger(witness: Witness) -> None:
    with pytest.raises(MessageError, match="without a new entry"):
        witness.spent("north", signed(3, A), STUDY, 1, "one")
    witness.spent("north", signed(4, B), STUDY, 1, "one")
    witness.spent("north", signed(4, B), STUDY, 1, "one")  # the identical bytes, sent again
    for study, number, payload in ((STUDY, 2, "one"), (STUDY, 1, "two"), (A[:-1] + "b", 1, "one")):
        with pytest.raises(MessageError, match="without a new entry"):
            witness.spent("north", signed(4, B), study, number, payload)
    witness.spent("north", signed(9, C), STUDY, 2, "two")  # other studies of the site spend in it too
    assert witness["north"].length == 9


@pytest.mark.parametrize(("length", "head"), [(2, A), (0, C), (3, B)])
def test_a_ledger_that_does_not_extend_the_last_one_was_rolled_back(witness: Witness, length: int, head: str) -> None:
    with pytest.raises(MessageError, match=f"^{ROLLED_BACK}$"):
        witness.spent("north", signed(length, head), STUDY, 1, "one")
    with pytest.raises(MessageError, match=f"^{ROLLED_BACK}$"):
        joins(witness, length, head)
    assert (witness["north"].length, witness["north"].head) == (3, A)


def test_a_site_that_joins_again_need_not_have_spent(witness: Witness) -> None:
    joins(witness, 3, A)
    joins(witness, 5, B)
    assert witness["north"].length == 5


def test_a_spend_whose_reply_was_lost_may_be_answered_again_once(witness: Witness) -> None:
    witness.spent("north", signed(4, B), STUDY, 1, "one")
    joins(witness, 5, C)  # it has spent round 2 meanwhile; the coordinator was down and never got the reply
    witness.spent("north", signed(5, C), STUDY, 2, "two")
    witness.spent("north", signed(5, C), STUDY, 2, "two")
    with pytest.raises(MessageError, match="without a new entry"):
        witness.spent("north", signed(5, C), STUDY, 3, "three")


def test_another_key_is_a_rollback_and_a_false_signature_is_refused(witness: Witness) -> None:
    with pytest.raises(MessageError, match=f"{ROLLED_BACK}: it is signed by another key"):
        joins(witness, 4, B, OTHER)
    with pytest.raises(MessageError, match="not signed by the key it names"):
        witness.joined(SignedHead("south", *signed(4, B), public_hex(SITE)))  # north's signature
    for false in (signed(4, B, OTHER), (5, *signed(4, B)[1:]), (4, B, "0" * 128)):
        with pytest.raises(MessageError, match="not signed by the key with which it joined"):
            witness.spent("north", false, STUDY, 1, "one")
    assert witness["north"].length == 3


def test_the_countersignature_is_the_coordinators_over_the_last_head(witness: Witness) -> None:
    witness.spent("north", signed(4, B), STUDY, 1, "one")
    seen = witness.countersigned("north")
    assert (seen.site, seen.length, seen.head, seen.key) == ("north", 4, B, public_hex(COORDINATOR))
    assert head_holds("countersignature", seen.key, "north", 4, B, seen.signature)
    assert not seen.holds, "and cannot pass for a site's own signature"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sites": 3}', '{"sites": {"north": {"length": 3}}}', "null"])
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "heads.json").write_text(text)
    with pytest.raises(FederationError, match="not the heads"):
        Witness(tmp_path / "heads.json", COORDINATOR)


def test_the_file_holds_no_private_key(witness: Witness) -> None:
    witness.save()
    text = witness.path.read_text()
    assert set(json.loads(text)) == {"coordinator_key", "sites"}
    assert COORDINATOR.private_bytes_raw().hex() not in text and "PRIVATE" not in text
