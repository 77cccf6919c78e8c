import base64
import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ExitCode, VerifyError
from common.signing import (
    add_signature,
    digests_of,
    key_id,
    load_json,
    load_public_key,
    merge_signature,
    open_envelope,
    public_pem,
    read_envelope,
    sign,
    signers_of,
    statement_for,
)

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
STATEMENT = {"subject": [], "predicate": {"study": "zwölf", "rounds": 3}}
ENVELOPE = sign(STATEMENT, KEY)
PAYLOAD = base64.b64decode(ENVELOPE["payload"])
SIGNATURE = base64.b64decode(ENVELOPE["signatures"][0]["sig"])


def refused(envelope: Any, key: Ed25519PrivateKey = KEY) -> str:
    with pytest.raises(VerifyError) as caught:
        open_envelope(envelope, key.public_key())
    assert caught.value.exit_code is ExitCode.VERIFY
    return str(caught.value)


def flipped(content: bytes, bit: int) -> str:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return base64.b64encode(bytes(changed)).decode()


def bundle(folder: Path) -> dict[str, Any]:
    (folder / "cohort.csv").write_bytes(b"a,b\n1,2\n")
    (folder / "empty.json").write_bytes(b"")
    (folder / "not-listed.txt").write_bytes(b"x")
    return statement_for(folder, ["empty.json", "cohort.csv"], {"study": "trial"})


def test_what_was_signed_comes_out() -> None:
    assert open_envelope(ENVELOPE, KEY.public_key()) == STATEMENT
    assert open_envelope(json.loads(json.dumps(ENVELOPE)), KEY.public_key()) == STATEMENT


def test_the_signature_is_over_the_dsse_pre_authentication_encoding() -> None:
    # "DSSEv1" SP LEN(type) SP type SP LEN(body) SP body, from the DSSE protocol.
    kind = b"application/vnd.in-toto+json"
    KEY.public_key().verify(SIGNATURE, b" ".join([b"DSSEv1", b"28", kind, str(len(PAYLOAD)).encode(), PAYLOAD]))
    assert json.loads(PAYLOAD) == STATEMENT
    raw = KEY.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    assert ENVELOPE["signatures"][0]["keyid"] == hashlib.sha256(raw).hexdigest() == key_id(KEY.public_key())


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 8 * len(PAYLOAD) - 1))
def test_a_flipped_bit_in_the_payload_is_found(bit: int) -> None:
    assert "does not hold" in refused({**ENVELOPE, "payload": flipped(PAYLOAD, bit)})


@pytest.mark.parametrize("bit", range(0, 8 * len(SIGNATURE), 7))
def test_a_flipped_bit_in_the_signature_is_found(bit: int) -> None:
    envelope = copy.deepcopy(ENVELOPE)
    envelope["signatures"][0]["sig"] = flipped(SIGNATURE, bit)
    assert "does not hold" in refused(envelope)


@pytest.mark.parametrize("signature", [b"", SIGNATURE[:-1], SIGNATURE + b"\x00", b"\x00" * 64])
def test_a_signature_of_another_length_or_zeros(signature: bytes) -> None:
    envelope = copy.deepcopy(ENVELOPE)
    envelope["signatures"][0]["sig"] = base64.b64encode(signature).decode()
    assert "does not hold" in refused(envelope)


def test_another_key_and_another_type() -> None:
    assert "is not signed by the key" in refused(ENVELOPE, OTHER)
    assert "unknown payload type" in refused({**ENVELOPE, "payloadType": "text/plain"})
    # The right name on another's signature does not help.
    envelope = copy.deepcopy(sign(STATEMENT, OTHER))
    envelope["signatures"][0]["keyid"] = key_id(KEY.public_key())
    assert "does not hold" in refused(envelope)


def test_one_valid_signature_among_several_is_found() -> None:
    envelope = {**ENVELOPE, "signatures": [*sign(STATEMENT, OTHER)["signatures"], *ENVELOPE["signatures"]]}
    for key in (KEY, OTHER):
        assert open_envelope(envelope, key.public_key()) == STATEMENT


@pytest.mark.parametrize(
    "envelope",
    [
        None,
        [],
        "text",
        {},
        {**ENVELOPE, "payload": 5},
        {**ENVELOPE, "payload": "not base64!"},
        {**ENVELOPE, "payload": "zwölf"},
        {**ENVELOPE, "signatures": None},
        {**ENVELOPE, "signatures": [5]},
        {**ENVELOPE, "signatures": [{}]},
        {**ENVELOPE, "signatures": [{"keyid": [], "sig": ""}]},
        {**ENVELOPE, "signatures": [{"keyid": "a", "sig": 7}]},
        {**ENVELOPE, "comment": "trust me"},
        {**ENVELOPE, "signatures": [{**ENVELOPE["signatures"][0], "note": ""}]},
        {key: value for key, value in ENVELOPE.items() if key != "payloadType"},
    ],
)
def test_what_is_no_envelope_is_refused(envelope: Any) -> None:
    assert "is not a DSSE envelope" in refused(envelope)


def test_no_signature_at_all() -> None:
    assert "is not signed by the key" in refused({**ENVELOPE, "signatures": []})


def test_the_statement_names_files_and_digests(tmp_path: Path) -> None:
    statement = bundle(tmp_path)
    assert statement["_type"] == "https://in-toto.io/Statement/v1" and statement["predicate"] == {"study": "trial"}
    assert statement["subject"] == [
        {"name": name, "digest": {"sha256": hashlib.sha256(c).hexdigest(), "sha512": hashlib.sha512(c).hexdigest()}}
        for name, c in (("cohort.csv", b"a,b\n1,2\n"), ("empty.json", b""))
    ]


def test_large_files_are_read_once_in_blocks(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000  # more than two blocks
    (tmp_path / "large").write_bytes(content)
    with (tmp_path / "large").open("rb") as file:
        found = digests_of(file)
        assert not file.read()
    assert found == {"sha256": hashlib.sha256(content).hexdigest(), "sha512": hashlib.sha512(content).hexdigest()}


def test_a_second_signature_is_over_the_same_bytes_and_keeps_the_first() -> None:
    both = add_signature(ENVELOPE, OTHER)
    assert both["payload"] == ENVELOPE["payload"] and both["signatures"][:1] == ENVELOPE["signatures"]
    assert both["signatures"][1] == sign(STATEMENT, OTHER)["signatures"][0]
    assert len(ENVELOPE["signatures"]) == 1  # the one given is not changed
    for key in (KEY, OTHER):
        assert open_envelope(both, key.public_key()) == STATEMENT
        with pytest.raises(VerifyError, match="signed this manifest already"):
            add_signature(both, key)
    merged = merge_signature(ENVELOPE, sign(STATEMENT, OTHER), OTHER.public_key())
    assert merged == both


def test_only_a_genuine_signature_over_the_same_bytes_is_merged() -> None:
    public = OTHER.public_key()
    with pytest.raises(VerifyError, match="another manifest"):
        merge_signature(ENVELOPE, sign({**STATEMENT, "subject": [1]}, OTHER), public)
    with pytest.raises(VerifyError, match="has not signed it"):
        merge_signature(ENVELOPE, sign(STATEMENT, KEY), public)
    forged = sign(STATEMENT, KEY)
    forged["signatures"][0]["keyid"] = key_id(public)
    with pytest.raises(VerifyError, match="has not signed it"):
        merge_signature(ENVELOPE, forged, public)
    with pytest.raises(VerifyError, match="already"):
        merge_signature(ENVELOPE, ENVELOPE, KEY.public_key())


def test_who_of_the_trusted_keys_signed() -> None:
    third = Ed25519PrivateKey.generate()
    envelope = add_signature(add_signature(ENVELOPE, OTHER), third)
    trusted = {"coordinator": KEY.public_key(), "anna": OTHER.public_key()}
    found = signers_of(read_envelope(envelope), trusted)
    assert found.trusted == {"coordinator": key_id(KEY.public_key()), "anna": key_id(OTHER.public_key())}
    assert found.unknown == (key_id(third.public_key()),)
    envelope["signatures"][1]["keyid"] = "0" * 64
    with pytest.raises(VerifyError, match="signature of anna stands under another key id, 0000"):
        signers_of(read_envelope(envelope), trusted)
    envelope["signatures"][1] = {"keyid": key_id(OTHER.public_key()), "sig": envelope["signatures"][0]["sig"]}
    with pytest.raises(VerifyError, match=r"signature of anna .* does not hold"):
        signers_of(read_envelope(envelope), trusted)


def test_a_key_id_that_is_there_twice() -> None:
    twice = {**ENVELOPE, "signatures": ENVELOPE["signatures"] * 2}
    assert "the same key twice" in refused(twice)


@pytest.mark.parametrize(
    "payload",
    [b'{"predicate":{}, "subject":[]}', b'{"subject":[],"predicate":{}}', b'{"a":1,"a":2}', b"[]", b"no JSON", b"\xff"],
)
def test_what_is_signed_must_be_canonical(payload: bytes) -> None:
    kind = b"application/vnd.in-toto+json"
    signature = KEY.sign(b" ".join([b"DSSEv1", b"28", kind, str(len(payload)).encode(), payload]))
    envelope = copy.deepcopy(ENVELOPE)
    envelope["payload"] = base64.b64encode(payload).decode()
    envelope["signatures"][0]["sig"] = base64.b64encode(signature).decode()
    assert "not canonical" in refused(envelope)
    with pytest.raises(VerifyError, match="not canonical"):
        add_signature(envelope, OTHER)  # nobody signs what may be read in two ways


def test_another_spelling_of_the_same_base64() -> None:
    signature = ENVELOPE["signatures"][0]["sig"]
    assert signature.endswith("==")
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    other = signature[:-3] + letters[letters.index(signature[-3]) + 1] + "=="
    assert base64.b64decode(other, validate=True) == base64.b64decode(signature)
    envelope = copy.deepcopy(ENVELOPE)
    envelope["signatures"][0]["sig"] = other
    assert "is not a DSSE envelope" in refused(envelope)


@pytest.mark.parametrize("text", [b'{"a":1,"a":1}', b'[{"b":1,"b":2}]', b"{", b"[" * 100_000])
def test_repeated_members_are_no_json(text: bytes) -> None:
    with pytest.raises(ValueError):
        load_json(text)


def test_public_keys_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(public_pem(KEY.public_key()))
    assert key_id(load_public_key(path)) == key_id(KEY.public_key()) != key_id(OTHER.public_key())
    curve = generate_private_key(SECP256R1()).public_key()
    path.write_bytes(curve.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(VerifyError, match="not an Ed25519 key"):
        load_public_key(path)


@pytest.mark.parametrize(
    "content", [None, b"", b"text", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"]
)
def test_unreadable_public_keys(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "key.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(VerifyError, match="not a readable PEM public key"):
        load_public_key(path)
