import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.digest import canonical_json
from common.enrolment import enrolment_text, make_enrolment, read_enrolment
from common.errors import VerifyError
from common.handover import follow_handover, write_handover
from common.keys import key_id, new_p384, openssh_public, sign_p384
from common.privacy.ledger_keys import public_hex, sign_head

NODE, LEDGER = new_p384(), Ed25519PrivateKey.generate()
NOW = datetime(2026, 11, 22, 10, 0, 0, tzinfo=UTC)


def document() -> dict[str, Any]:
    return json.loads(enrolment_text(make_enrolment("north", NODE, LEDGER, "0.1.0", NOW)))


def write(tmp_path: Path, content: Any) -> Path:
    path = tmp_path / "enrolment-north.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def signed_again(found: dict[str, Any], **content: Any) -> dict[str, Any]:
    """As somebody with both keys could make it."""
    found["content"] |= content
    signed = canonical_json(found["content"])
    return found | {"ledger_signature": LEDGER.sign(signed).hex(), "node_signature": sign_p384(NODE, signed)}


def test_a_request_says_what_the_site_declared(tmp_path: Path) -> None:
    content = read_enrolment(write(tmp_path, document()))
    assert (content.site, content.created) == ("north", "2026-11-22T10:00:00Z")
    assert content.node_key == openssh_public(NODE) and content.ledger_key == public_hex(LEDGER)


def test_a_request_holds_no_private_key() -> None:
    text = enrolment_text(make_enrolment("north", NODE, LEDGER, "0.1.0"))
    assert LEDGER.private_bytes_raw().hex() not in text
    assert f"{NODE.private_numbers().private_value:x}" not in text and "PRIVATE" not in text
    assert set(json.loads(text)) == {"content", "ledger_signature", "node_signature"}
    assert set(json.loads(text)["content"]) == {
        "purpose", "format", "site", "node_key", "ledger_key", "version", "created",
    }  # fmt: skip


def test_the_fingerprint_covers_name_and_both_keys() -> None:
    prints = {
        make_enrolment(site, node, ledger, "0.1.0").content.fingerprint
        for site, node, ledger in [
            ("north", NODE, LEDGER),
            ("south", NODE, LEDGER),
            ("north", new_p384(), LEDGER),
            ("north", NODE, Ed25519PrivateKey.generate()),
        ]
    }
    assert len(prints) == 4
    later = make_enrolment("north", NODE, LEDGER, "0.2.0").content.fingerprint
    assert later in prints


def edited(field: str, value: Any) -> Callable[[], Any]:
    def make() -> Any:
        found = document()
        found["content"][field] = value
        return found

    return make


def other_node() -> Any:
    found = document()
    foreign = json.loads(enrolment_text(make_enrolment("north", new_p384(), LEDGER, "0.1.0", NOW)))
    return found | {"node_signature": foreign["node_signature"]}


def other_ledger() -> Any:
    found = document()
    foreign = Ed25519PrivateKey.generate()
    return found | {"ledger_signature": foreign.sign(canonical_json(found["content"])).hex()}


def a_ledger_head() -> Any:
    """A signature the ledger key gave for something else."""
    return document() | {"ledger_signature": sign_head("ledger head", LEDGER, "north", 0, "0" * 64)}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (edited("site", "south"), "the node key has not signed this request; it was edited"),
        (edited("created", "2027-01-01T00:00:00Z"), "the node key has not signed"),
        (edited("node_key", openssh_public(new_p384())), "the node key has not signed"),
        (other_node, "the node key has not signed"),
        (other_ledger, "the ledger key has not signed"),
        (a_ledger_head, "the ledger key has not signed"),
        (lambda: signed_again(document(), format=2), "format 2, this version reads format 1"),
        (lambda: signed_again(document(), purpose="cohortium ledger head"), "something else that was signed"),
        (lambda: signed_again(document(), site="../north"), r"site.*should match"),
        (lambda: signed_again(document(), site="north\n"), r"site.*should match"),
        (lambda: signed_again(document(), patients=412), "patients: unknown key"),
        (lambda: signed_again(document(), node_key="ssh-ed25519 AAAA"), "node_key: not a public key"),
        (lambda: signed_again(document(), ledger_key="00"), "ledger_key"),
        (lambda: document() | {"note": "x"}, "note"),
        (lambda: document()["content"], "not an enrolment request"),
        (lambda: "[" * 100_000, "not an enrolment request"),
        (lambda: "{}", "not an enrolment request"),
        (lambda: "[]", "not an enrolment request"),
        (lambda: "\x00", "not an enrolment request"),
        (lambda: json.dumps(document() | {"x": "y" * 70_000}), "not an enrolment request"),
    ],
)
def test_what_is_wrong_with_a_request_is_told_apart(tmp_path: Path, make: Callable[[], Any], expected: str) -> None:
    path = write(tmp_path, make())
    with pytest.raises(VerifyError, match=expected) as caught:
        read_enrolment(path)
    assert str(path) in str(caught.value) and caught.value.fix


def test_a_request_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match=r"none\.json: cannot be read"):
        read_enrolment(tmp_path / "none.json")


# ---------------------------------------------------------------- handover of the release key


def test_a_site_follows_the_release_key_from_statement_to_statement(tmp_path: Path) -> None:
    first, second, third = (Ed25519PrivateKey.generate() for _ in range(3))
    write_handover(tmp_path / "1.json", "Trial", first, second)
    write_handover(tmp_path / "2.json", "Trial", second, third)
    found = follow_handover(tmp_path / "2.json", follow_handover(tmp_path / "1.json", first.public_key()))
    assert key_id(found) == key_id(third.public_key())
    with pytest.raises(VerifyError, match="not signed by the key"):
        follow_handover(tmp_path / "2.json", first.public_key())


def test_nobody_is_followed_who_did_not_sign_himself(tmp_path: Path) -> None:
    old, new, path = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate(), tmp_path / "1.json"
    write_handover(path, "Trial", old, new)
    envelope = json.loads(path.read_text())
    path.write_text(json.dumps(envelope | {"signatures": envelope["signatures"][:1]}))
    with pytest.raises(VerifyError, match="not signed by the key"):
        follow_handover(path, old.public_key())
    # the new key cannot pass the statement off as a handover of itself
    path.write_text(json.dumps(envelope))
    with pytest.raises(VerifyError, match="not a handover of it"):
        follow_handover(path, new.public_key())
    path.write_text("{")
    with pytest.raises(VerifyError, match="not a handover statement"):
        follow_handover(path, old.public_key())
