"""Keys and signatures of ledger heads: the site's own, and the coordinator's countersignature (privacy.md, section 4).

A head is (site, length, hash of the last entry). It is signed as canonical JSON together with its purpose, so that no
signature of a site can pass for a countersignature or the other way round. Keys and signatures travel as lower-case
hex of their raw bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.digest import canonical_json
from common.errors import LedgerError
from common.keys import KeyUse, link_private, load_ed25519, private_bytes

Purpose = Literal["ledger head", "countersignature"]
KEY_HEX = r"[0-9a-f]{64}"
HEAD_HEX = r"[0-9a-f]{64}"
SIGNATURE_HEX = r"[0-9a-f]{128}"
LEDGER_KEY = KeyUse(
    what="the ledger's key",
    error=LedgerError,
    missing="the key of this site's ledger is missing; a new one would not continue the ledger",
    missing_fix="restore the key from its backup; without it the site cannot go on with this ledger",
)


@dataclass(frozen=True)
class SignedHead:
    """How long a ledger is and how it ends, under the key of its site."""

    site: str
    length: int
    head: str
    signature: str
    key: str

    @property
    def holds(self) -> bool:
        """Whether `key` signed exactly this head."""
        return head_holds("ledger head", self.key, self.site, self.length, self.head, self.signature)


def sign_head(purpose: Purpose, key: Ed25519PrivateKey, site: str, length: int, head: str) -> str:
    """The signature (hex) of a head."""
    return key.sign(_content(purpose, site, length, head)).hex()


def head_holds(purpose: Purpose, key: str, site: str, length: int, head: str, signature: str) -> bool:
    """Whether `signature` (hex) is that of `key` (hex of the raw public key) over this head; False if malformed."""
    try:
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
        public.verify(bytes.fromhex(signature), _content(purpose, site, length, head))
    except (InvalidSignature, ValueError):
        return False
    return True


def public_hex(key: Ed25519PrivateKey) -> str:
    """The raw public key as hex."""
    return key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()


def load_key(path: Path) -> Ed25519PrivateKey:
    """Read the site's key; `LedgerError` if it is missing, open to others, unreadable or of another type."""
    return load_ed25519(path, LEDGER_KEY)


def load_or_create_key(path: Path) -> Ed25519PrivateKey:
    """The key at `path`, made (PEM PKCS8, mode 0600) if there is none; for the first use of a ledger only.

    The file appears whole or not at all and never replaces another.
    """
    if path.exists() or path.is_symlink():
        return load_key(path)
    key = Ed25519PrivateKey.generate()
    try:
        link_private(path, private_bytes(key))
    except FileExistsError:
        return load_key(path)
    return key


def _content(purpose: Purpose, site: str, length: int, head: str) -> bytes:
    return canonical_json({"purpose": f"cohortium {purpose}", "site": site, "length": length, "head": head})
