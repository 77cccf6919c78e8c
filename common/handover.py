"""The handover of the coordinator's release key: the old key and the new one sign a statement that names the new one.

A site that pinned the old key can follow from statement to statement. A statement by a stolen key proves nothing: after
a theft the new fingerprint has to come another way.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.errors import VerifyError
from common.files import write_atomic
from common.keys import key_id
from common.signing import STATEMENT_TYPE, open_envelope, public_pem, sign

PREDICATE_TYPE = "urn:cohortium:key-handover:v1"


def write_handover(path: Path, consortium: str, old: Ed25519PrivateKey, new: Ed25519PrivateKey) -> None:
    """Write the statement that `new` follows `old`, signed by both."""
    pem = public_pem(new.public_key())
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": "release.pub", "digest": {"sha256": hashlib.sha256(pem).hexdigest()}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "consortium": consortium,
            "old_key": key_id(old.public_key()),
            "new_key": pem.decode(),
            "at": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        },
    }
    envelope = sign(statement, old)
    envelope["signatures"] += sign(statement, new)["signatures"]
    write_atomic(path, json.dumps(envelope, indent=2) + "\n")


def follow_handover(path: Path, pinned: Ed25519PublicKey) -> Ed25519PublicKey:
    """The key that follows `pinned` according to a handover statement; `VerifyError` if either has not signed it."""
    try:
        envelope = json.loads(path.read_bytes())
    except OSError as error:
        raise VerifyError(f"{path}: cannot be read ({error.strerror})", fix="name a handover statement") from None
    except (ValueError, RecursionError):
        raise VerifyError(f"{path}: not a handover statement", fix="ask the coordinator for it again") from None
    statement = open_envelope(envelope, pinned)
    try:
        if statement["predicateType"] != PREDICATE_TYPE or statement["predicate"]["old_key"] != key_id(pinned):
            raise KeyError("predicateType")
        new = serialization.load_pem_public_key(statement["predicate"]["new_key"].encode())
        if not isinstance(new, Ed25519PublicKey):
            raise TypeError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise VerifyError(
            f"{path}: signed by the key you pinned, but not a handover of it", fix="ask the coordinator"
        ) from None
    open_envelope(envelope, new)
    return new
