"""Private key files: mode 0600 from their first byte, never replaced, never printed, refused if open to others.

Ed25519 keys (ledger, releases) and TLS keys are PEM PKCS8. Flower's node authentication wants an elliptic curve key in
OpenSSH's format: `flower-supernode --auth-supernode-private-key` reads it with `load_ssh_private_key`, and `flwr
supernode register` reads the public half as one line of OpenSSH ("ecdsa-sha2-nistp384 AAAA...").
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from common.errors import CohortiumError, OutputError, SiteError
from common.files import sync_directory

PrivateKey: TypeAlias = Ed25519PrivateKey | ec.EllipticCurvePrivateKey
BACKUP = "restore the key from its backup"


@dataclass(frozen=True)
class KeyUse:
    """What a key file is for: how errors call it, which kind they are, and what a missing one means."""

    what: str
    error: type[CohortiumError]
    missing: str
    missing_fix: str
    format: Literal["PEM", "OpenSSH"] = "PEM"
    fix: str = BACKUP


NODE_KEY = KeyUse(
    what="the node key",
    error=SiteError,
    missing="this site's key for Flower's node authentication is missing",
    missing_fix="restore it from its backup, or make a new one with `cohortium-site rotate-node-key`",
    format="OpenSSH",
)


def key_id(key: Ed25519PublicKey | str) -> str:
    """How people are shown an Ed25519 key, everywhere: SHA-256 (hex) of its 32 raw bytes, given as such or as hex."""
    if isinstance(key, str):
        raw = bytes.fromhex(key)
    else:
        raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()


def load_ed25519(path: Path, use: KeyUse) -> Ed25519PrivateKey:
    """Read an Ed25519 key; `use.error` if it is missing, open to others, unreadable or of another type."""
    key = _load(path, use)
    if not isinstance(key, Ed25519PrivateKey):
        raise use.error(f"{path}: not an Ed25519 key", fix=use.fix)
    return key


def load_p384(path: Path, use: KeyUse) -> ec.EllipticCurvePrivateKey:
    """Read a key on the curve P-384; `use.error` if it is missing, open to others, unreadable or of another type."""
    key = _load(path, use)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise use.error(f"{path}: not an elliptic curve key on P-384", fix=use.fix)
    return key


def read_private_file(path: Path, use: KeyUse) -> bytes:
    """Content of a regular file that nobody but its owner can read; `use.error` otherwise."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise use.error(f"{path}: {use.what} is not a file", fix=use.fix)
        if mode & 0o077:
            raise use.error(
                f"{path}: {use.what} has permissions {stat.S_IMODE(mode):04o}; nobody but its owner may read it",
                fix=f"chmod 600 {path}, and ask who could have copied it",
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise use.error(f"{path}: {use.missing}", fix=use.missing_fix) from None
    except OSError as error:
        raise use.error(
            f"{path}: {use.what} cannot be read ({error.strerror})", fix="correct its owner and permissions"
        ) from None


def _load(path: Path, use: KeyUse) -> object:
    content = read_private_file(path, use)
    try:
        if use.format == "OpenSSH":
            return serialization.load_ssh_private_key(content, password=None)
        return serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise use.error(f"{path}: not a readable {use.format} private key without a password", fix=use.fix) from None


def new_p384() -> ec.EllipticCurvePrivateKey:
    """A new key on the curve P-384."""
    return ec.generate_private_key(ec.SECP384R1())


def create_key(path: Path, key: PrivateKey, *, openssh: bool = False) -> None:
    """Write `key` to a new file of mode 0600; `OutputError` if the name is taken or the file cannot be written."""
    create_private(path, private_bytes(key, openssh=openssh))


def create_private(path: Path, content: bytes) -> None:
    """Write a new file of mode 0600; `OutputError` if the name is taken or the file cannot be written."""
    try:
        link_private(path, content)
    except FileExistsError:
        raise OutputError(
            f"{path}: there is a key already, and keys are never replaced", fix="choose another folder"
        ) from None
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or 'input/output error'})",
            fix="free disk space or correct the permissions",
        ) from None


def private_bytes(key: PrivateKey, *, openssh: bool = False) -> bytes:
    """The key as it stands in its file: PEM PKCS8, or OpenSSH's format."""
    kind = serialization.PrivateFormat.OpenSSH if openssh else serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption())


def link_private(path: Path, content: bytes) -> None:
    """Write a new private file; `FileExistsError` if the name is taken.

    The file appears whole or not at all and never replaces another: it is written under a temporary name (O_EXCL,
    0600) and then linked, which fails if the name is taken.
    """
    temporary = _private_temporary(path, content)
    try:
        os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def replace_private(path: Path, content: bytes, keep_as: Path | None) -> None:
    """Put a new private file in the place of an old one in one step; the old one stays under the name `keep_as`.

    At every moment `path` is one of the two, whole. `OutputError` if that fails; then the old one is still in place.
    """
    try:
        temporary = _private_temporary(path, content)
        try:
            if keep_as is not None:
                os.link(path, keep_as)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(path.parent)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be replaced ({error.strerror or 'input/output error'})",
            fix="free disk space or correct the permissions; the old key is unchanged",
        ) from None


def _private_temporary(path: Path, content: bytes) -> Path:
    """A durable file beside `path`, mode 0600 from its first byte; the caller removes it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def openssh_public(key: ec.EllipticCurvePrivateKey) -> str:
    """The public half as one line of OpenSSH, the form `flwr supernode register` reads."""
    public = key.public_key()
    return public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def parse_openssh_public(line: str) -> ec.EllipticCurvePublicKey:
    """The P-384 key in a line of OpenSSH, exactly as `openssh_public` writes it; `ValueError` if not."""
    try:
        key = serialization.load_ssh_public_key(line.encode("ascii"))
    except (ValueError, UnsupportedAlgorithm):
        raise ValueError("not a public key in OpenSSH's form") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ValueError("not a public key on the curve P-384")
    written = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    if written != line:
        raise ValueError("a public key with something added to it")
    return key


def sign_p384(key: ec.EllipticCurvePrivateKey, content: bytes) -> str:
    """ECDSA with SHA-384 over `content`, as hex."""
    return key.sign(content, ec.ECDSA(hashes.SHA384())).hex()


def p384_holds(key: ec.EllipticCurvePublicKey, content: bytes, signature: str) -> bool:
    """Whether `signature` (hex) is that of `key` over `content`; False if malformed."""
    try:
        key.verify(bytes.fromhex(signature), content, ec.ECDSA(hashes.SHA384()))
    except (InvalidSignature, ValueError):
        return False
    return True
