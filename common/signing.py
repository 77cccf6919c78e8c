"""DSSE envelopes over in-toto statements, signed with Ed25519 (https://github.com/secure-systems-lab/dsse)."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.digest import canonical_json, sha256_of_file
from common.errors import VerifyError
from common.keys import key_id

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:cohortium:release:v1"


def public_pem(key: Ed25519PublicKey) -> bytes:
    """The public key as PEM."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def load_public_key(path: Path) -> Ed25519PublicKey:
    """Read a PEM public key; `VerifyError` if it is not an Ed25519 one."""
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError):
        raise VerifyError(f"{path}: not a readable PEM public key", fix="name the coordinator's public key") from None
    if not isinstance(key, Ed25519PublicKey):
        raise VerifyError(f"{path}: not an Ed25519 key", fix="name the coordinator's public key")
    return key


def statement_for(directory: Path, names: Sequence[str], predicate: Mapping[str, Any]) -> dict[str, Any]:
    """An in-toto statement whose subjects are the named files of `directory`, with their SHA-256."""
    subjects = [{"name": name, "digest": {"sha256": sha256_of_file(directory / name)}} for name in sorted(names)]
    return {
        "_type": STATEMENT_TYPE,
        "subject": subjects,
        "predicateType": PREDICATE_TYPE,
        "predicate": dict(predicate),
    }


def sign(statement: Mapping[str, Any], key: Ed25519PrivateKey) -> dict[str, Any]:
    """A DSSE envelope over the canonical JSON of `statement`."""
    payload = canonical_json(statement)
    signature = key.sign(_pre_authentication_encoding(payload))
    return {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": key_id(key.public_key()), "sig": base64.b64encode(signature).decode()}],
    }


def open_envelope(envelope: Any, key: Ed25519PublicKey) -> dict[str, Any]:
    """The statement inside, if `key` signed it; `VerifyError` otherwise."""
    try:
        payload = base64.b64decode(envelope["payload"], validate=True)
        signatures = {s["keyid"]: base64.b64decode(s["sig"], validate=True) for s in envelope["signatures"]}
        kind = envelope["payloadType"]
    except (KeyError, TypeError, AttributeError, binascii.Error, ValueError):
        raise VerifyError("the manifest is not a DSSE envelope", fix="ask for the release again") from None
    if kind != PAYLOAD_TYPE or key_id(key) not in signatures:
        raise VerifyError(
            f"the manifest is not signed by the key {key_id(key)[:16]}…", fix="use the coordinator's public key"
        )
    try:
        key.verify(signatures[key_id(key)], _pre_authentication_encoding(payload))
    except InvalidSignature:
        raise VerifyError("the manifest's signature does not hold: it was changed after signing") from None
    return json.loads(payload)


def verify_files(directory: Path, statement: Mapping[str, Any]) -> list[str]:
    """Names of the statement's files, all present with these digests; `VerifyError` names every one that differs."""
    wrong = []
    for subject in statement["subject"]:
        path = directory / subject["name"]
        if not path.is_file():
            wrong.append(f"{subject['name']}: missing")
        elif sha256_of_file(path) != subject["digest"]["sha256"]:
            wrong.append(f"{subject['name']}: changed after signing")
    if wrong:
        listing = "\n".join(f"  - {item}" for item in wrong)
        raise VerifyError(f"{directory}: {len(wrong)} file(s) are not what was signed\n{listing}", fix="do not use it")
    return [subject["name"] for subject in statement["subject"]]


def _pre_authentication_encoding(payload: bytes) -> bytes:
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
