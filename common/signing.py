"""DSSE envelopes over in-toto statements, signed with Ed25519 (https://github.com/secure-systems-lab/dsse).

One envelope may carry several signatures over the same payload bytes: the coordinator's, and those of sites that
countersign. Every way to write the same envelope differently is refused, so that nothing in it is open to a change.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.digest import canonical_json
from common.errors import VerifyError
from common.keys import key_id

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:cohortium:release:v1"
BLOCK = 1 << 20
AGAIN = "ask for the release again"


@dataclass(frozen=True)
class Envelope:
    """What a DSSE envelope holds, decoded: the signed bytes, and the signatures by key id, in their order."""

    payload: bytes
    signatures: Mapping[str, bytes]

    def signed_by(self, key: Ed25519PublicKey) -> bool:
        """Whether one of the signatures is that of `key`, whatever key id stands beside it."""
        return any(_holds(key, signature, self.payload) for signature in self.signatures.values())

    def statement(self) -> dict[str, Any]:
        """The payload as JSON; `VerifyError` unless it is canonical, the one spelling of what it says."""
        try:
            document = json.loads(self.payload)
            if isinstance(document, dict) and canonical_json(document) == self.payload:
                return document
        except (ValueError, RecursionError):
            pass
        raise VerifyError("the manifest's payload is not canonical JSON: programs may read it differently", fix=AGAIN)


@dataclass(frozen=True)
class Signers:
    """Who signed an envelope: the names of trusted keys with their key ids, and key ids that nobody here knows."""

    trusted: Mapping[str, str]
    unknown: tuple[str, ...]


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


def digests_of(file: BinaryIO) -> dict[str, str]:
    """SHA-256 and SHA-512 (hex) of what is left of `file`, read once, in blocks."""
    sha256, sha512 = hashlib.sha256(), hashlib.sha512()
    while block := file.read(BLOCK):
        sha256.update(block)
        sha512.update(block)
    return {"sha256": sha256.hexdigest(), "sha512": sha512.hexdigest()}


def statement_for(directory: Path, names: Sequence[str], predicate: Mapping[str, Any]) -> dict[str, Any]:
    """An in-toto statement whose subjects are the named files of `directory`, with their SHA-256 and SHA-512."""
    subjects = []
    for name in sorted(names):
        with (directory / name).open("rb") as file:
            subjects.append({"name": name, "digest": digests_of(file)})
    return {
        "_type": STATEMENT_TYPE,
        "subject": subjects,
        "predicateType": PREDICATE_TYPE,
        "predicate": dict(predicate),
    }


def sign(statement: Mapping[str, Any], key: Ed25519PrivateKey) -> dict[str, Any]:
    """A DSSE envelope over the canonical JSON of `statement`."""
    payload = canonical_json(statement)
    return {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [_signature(key, payload)],
    }


def add_signature(envelope: Any, key: Ed25519PrivateKey) -> dict[str, Any]:
    """The envelope with the signature of `key` over the same payload bytes behind those it has.

    `VerifyError` if it is malformed, or if `key` has signed it already.
    """
    opened = read_envelope(envelope)
    opened.statement()
    return _with(envelope, opened, _signature(key, opened.payload))


def merge_signature(envelope: Any, countersignature: Any, key: Ed25519PublicKey) -> dict[str, Any]:
    """The envelope with the signature of `key` that the envelope `countersignature` carries over the same payload.

    `VerifyError` if either is malformed, the payloads differ, the signature does not hold, or is there already.
    """
    opened, other = read_envelope(envelope), read_envelope(countersignature)
    if other.payload != opened.payload:
        raise VerifyError("it signs another manifest than this one", fix="ask the site to sign this release")
    signature = other.signatures.get(key_id(key))
    if signature is None or not _holds(key, signature, opened.payload):
        raise VerifyError(
            f"the key {key_id(key)[:16]}… has not signed it", fix="ask the site for its countersignature again"
        )
    return _with(envelope, opened, {"keyid": key_id(key), "sig": base64.b64encode(signature).decode()})


def read_envelope(envelope: Any) -> Envelope:
    """Decode an envelope, whoever signed it; `VerifyError` for another form, payload type, or a repeated key id."""
    try:
        if set(envelope) != {"payload", "payloadType", "signatures"}:
            raise KeyError
        signatures = [(s["keyid"], _decoded(s["sig"])) for s in envelope["signatures"] if set(s) == {"keyid", "sig"}]
        opened = Envelope(_decoded(envelope["payload"]), dict(signatures))
        if len(signatures) != len(envelope["signatures"]) or not all(isinstance(k, str) for k in opened.signatures):
            raise KeyError
    except (KeyError, TypeError, AttributeError, binascii.Error, ValueError):
        raise VerifyError("the manifest is not a DSSE envelope", fix=AGAIN) from None
    if envelope["payloadType"] != PAYLOAD_TYPE:
        raise VerifyError(f"the manifest has an unknown payload type, expected {PAYLOAD_TYPE}", fix=AGAIN)
    if len(opened.signatures) != len(signatures):
        raise VerifyError("the manifest names the same key twice among its signatures", fix=AGAIN)
    return opened


def open_envelope(envelope: Any, key: Ed25519PublicKey) -> dict[str, Any]:
    """The statement inside, if `key` signed it; `VerifyError` otherwise."""
    opened = read_envelope(envelope)
    signature = opened.signatures.get(key_id(key))
    if signature is None:
        raise VerifyError(
            f"the manifest is not signed by the key {key_id(key)[:16]}…", fix="use the coordinator's public key"
        )
    if not _holds(key, signature, opened.payload):
        raise VerifyError("the manifest's signature does not hold: it was changed after signing")
    return opened.statement()


def signers_of(opened: Envelope, keys: Mapping[str, Ed25519PublicKey]) -> Signers:
    """Which of the trusted `keys`, by name, signed. A key that is not among them proves nothing and is only named.

    `VerifyError` if the signature of a trusted key does not hold, or stands under the key id of another.
    """
    names = {key_id(key): name for name, key in keys.items()}
    trusted: dict[str, str] = {}
    for identity, signature in opened.signatures.items():
        name = names.get(identity)
        if name is not None:
            if not _holds(keys[name], signature, opened.payload):
                raise VerifyError(
                    f"the signature of {name} ({identity[:16]}…) does not hold: it or the manifest was changed"
                )
            trusted[name] = identity
            continue
        real = next((known for known, key in keys.items() if _holds(key, signature, opened.payload)), None)
        if real is not None:
            raise VerifyError(f"the signature of {real} stands under another key id, {identity[:16]}…", fix=AGAIN)
    return Signers(trusted, tuple(identity for identity in opened.signatures if identity not in names))


def load_json(content: bytes) -> Any:
    """JSON without repeated members, which programs read differently; `ValueError` otherwise."""

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a member is repeated")
        return found

    try:
        return json.loads(content, object_pairs_hook=members)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _with(envelope: Any, opened: Envelope, signature: dict[str, str]) -> dict[str, Any]:
    if signature["keyid"] in opened.signatures:
        raise VerifyError(f"the key {signature['keyid'][:16]}… has signed this manifest already")
    return {**envelope, "signatures": [*envelope["signatures"], signature]}


def _signature(key: Ed25519PrivateKey, payload: bytes) -> dict[str, str]:
    signature = key.sign(_pre_authentication_encoding(payload))
    return {"keyid": key_id(key.public_key()), "sig": base64.b64encode(signature).decode()}


def _holds(key: Ed25519PublicKey, signature: bytes, payload: bytes) -> bool:
    try:
        key.verify(signature, _pre_authentication_encoding(payload))
    except InvalidSignature:
        return False
    return True


def _decoded(text: str) -> bytes:
    """Base64 in its one spelling: `ValueError` also if unused bits of the last character are set."""
    content = base64.b64decode(text, validate=True)
    if base64.b64encode(content).decode() != text:
        raise ValueError("another spelling of the same bytes")
    return content


def _pre_authentication_encoding(payload: bytes) -> bytes:
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
