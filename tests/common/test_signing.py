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
    key_id,
    load_public_key,
    open_envelope,
    public_pem,
    sign,
    statement_for,
    verify_files,
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
    assert "is not signed by the key" in refused({**ENVELOPE, "payloadType": "text/plain"})
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
        {"name": "cohort.csv", "digest": {"sha256": hashlib.sha256(b"a,b\n1,2\n").hexdigest()}},
        {"name": "empty.json", "digest": {"sha256": hashlib.sha256(b"").hexdigest()}},
    ]
    assert verify_files(tmp_path, statement) == ["cohort.csv", "empty.json"]


@pytest.mark.parametrize("bit", range(8 * len(b"a,b\n1,2\n")))
def test_a_flipped_bit_in_a_file_is_found(tmp_path: Path, bit: int) -> None:
    statement = bundle(tmp_path)
    content = bytearray((tmp_path / "cohort.csv").read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    (tmp_path / "cohort.csv").write_bytes(content)
    with pytest.raises(VerifyError, match=r"1 file\(s\) are not what was signed\n  - cohort.csv: changed"):
        verify_files(tmp_path, statement)


def test_every_file_that_differs_is_named(tmp_path: Path) -> None:
    statement = bundle(tmp_path)
    (tmp_path / "cohort.csv").unlink()
    (tmp_path / "cohort.csv").mkdir()
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "not-listed.txt").write_text("changed, and nobody's business")
    with pytest.raises(VerifyError) as caught:
        verify_files(tmp_path, statement)
    assert "cohort.csv: missing" in str(caught.value) and "empty.json: changed after signing" in str(caught.value)
    assert "not-listed" not in str(caught.value)


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
