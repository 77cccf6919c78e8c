"""The coordinator's folder: consortium CA, server certificate, release key, and public facts in consortium.json.

Made whole or not at all; private keys are 0600 and never leave it. With a CA of the hospital's own, ca.key is missing.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.audit import AUDIT_LOG, AuditLog, logged
from common.certificates import (
    check_ca,
    check_dates,
    fingerprint,
    general_name,
    handshake_problem,
    read_certificates,
    subject_of,
    timestamp,
)
from common.errors import OutputError, UsageError
from common.files import write_atomic
from common.folders import aside, new_folder
from common.handover import write_handover
from common.keys import (
    KeyUse,
    create_key,
    create_private,
    key_id,
    load_ed25519,
    load_p384,
    new_p384,
    private_bytes,
    read_private_file,
    replace_private,
)
from common.signing import public_pem
from server.authority import LOCAL, issue, make_ca, permits

FORMAT = 1
FACTS = "consortium.json"
INIT_FIRST = "name the folder that `cohortium init-consortium` made"
CA_KEY = KeyUse(
    "the consortium CA's key",
    OutputError,
    "the consortium CA's key is missing",
    "restore it from its backup; a new CA has to be brought to every site",
)
SERVER_KEY = KeyUse("the server's key", OutputError, "the server's key is missing", "name the server's PEM key")
RELEASE_KEY = KeyUse(
    "the coordinator's release key",
    OutputError,
    "the coordinator's release key is missing",
    "restore it from its backup; a new one has to be brought to every site",
)


@dataclass(frozen=True)
class Given:
    """Certificate, key and CA that a hospital or company has already."""

    certificate: Path
    key: Path
    ca: Path


def init_consortium(
    directory: Path,
    name: str,
    addresses: Sequence[str],
    *,
    permit: Sequence[str] = (),
    days: int = 825,
    ca_days: int = 3650,
    given: Given | None = None,
) -> dict[str, Any]:
    """Make the coordinator's folder and return the public facts; nothing is left behind if it fails."""
    if not name.strip() or len(name) > 64 or not name.isprintable():
        raise UsageError("--name: expected 1 to 64 printable characters", fix="name the consortium")
    _check_addresses(addresses)
    _check_addresses(permit)
    if not given and not 1 <= days <= ca_days:
        raise UsageError(
            f"--days {days} with --ca-days {ca_days}: the server's certificate must live at least a day and not longer"
            " than its CA",
            fix="choose 1 <= days <= ca-days",
        )
    facts: dict[str, Any] = {"format": FORMAT, "name": name, "addresses": list(addresses), "created": _now()}
    with new_folder(directory) as folder:
        if given is None:
            facts["permitted"] = sorted({*LOCAL, *addresses, *permit})
            ca_key = new_p384()
            create_key(folder / "ca.key", ca_key)
            write_atomic(folder / "ca.pem", _pem(make_ca(ca_key, name, facts["permitted"], ca_days)))
            key, certificate = _issue(folder, addresses, days)
            create_private(folder / "server.key", key)
            write_atomic(folder / "server.pem", certificate)
        else:
            check_given(given, addresses)
            write_atomic(folder / "ca.pem", given.ca.read_bytes())
            write_atomic(folder / "server.pem", given.certificate.read_bytes())
            create_private(folder / "server.key", read_private_file(given.key, SERVER_KEY))
        release = Ed25519PrivateKey.generate()
        create_key(folder / "release.key", release)
        write_atomic(folder / "release.pub", public_pem(release.public_key()))
        facts = _write_facts(folder, facts)
        about = {"fingerprint": facts["ca"][0]["sha256"], "release_key": facts["release_key"]["key_id"]}
        audit_of(folder).append("init-consortium", name=name, addresses=list(addresses), **about)
        return facts


def audit_of(directory: Path) -> AuditLog:
    """The coordinator's audit log."""
    return AuditLog(directory / AUDIT_LOG, "coordinator")


def load_facts(directory: Path) -> dict[str, Any]:
    """consortium.json; `OutputError` if it is missing, damaged, or of a newer version."""
    path = directory / FACTS
    try:
        facts = json.loads(path.read_bytes())
        format_, _ = facts["format"], (facts["name"], facts["addresses"])
    except OSError as error:
        raise OutputError(f"{path}: cannot be read ({error.strerror})", fix=INIT_FIRST) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise OutputError(f"{path}: not a consortium's facts; it was edited or damaged", fix=INIT_FIRST) from None
    if format_ != FORMAT:
        raise OutputError(
            f"{path}: format {format_}, this version writes format {FORMAT}",
            fix="use the version of Cohortium that wrote it",
        )
    return facts


def load_release_key(directory: Path) -> Ed25519PrivateKey:
    """The coordinator's key for releases and countersignatures."""
    return load_ed25519(directory / "release.key", RELEASE_KEY)


def renew_certificate(
    directory: Path, addresses: Sequence[str] = (), *, days: int = 825, given: Given | None = None
) -> dict[str, Any]:
    """A new server key and certificate under the same CA; the old ones stay beside them as .old-<date>.

    Stopped between the two files, it leaves a pair that does not fit; running it again mends that.
    """
    with locked(directory):
        facts = load_facts(directory)
        addresses = list(addresses) or facts["addresses"]
        _check_addresses(addresses)
        if given is not None:
            check_given(given, addresses)
            key_bytes, chain = read_private_file(given.key, SERVER_KEY), given.certificate.read_bytes()
        elif "permitted" not in facts:
            raise UsageError(
                f"{directory}: this consortium uses a CA of its own institution, whose key is not here",
                fix="let that CA renew the certificate and give --server-certificate, --server-key",
            )
        else:
            outside = [address for address in addresses if not permits(facts["permitted"], address)]
            if outside:
                raise UsageError(
                    f"--address {', '.join(outside)}: this CA certifies only {', '.join(facts['permitted'])}",
                    fix="choose among these, or make a new CA with init-consortium and bring it to every site",
                )
            if days < 1:
                raise UsageError(f"--days {days}: expected at least 1", fix="choose more days")
            key_bytes, chain = _issue(directory, addresses, days)
        certificate = _facts_of(x509.load_pem_x509_certificates(chain)[0])
        about = {"fingerprint": certificate["sha256"], "not_after": certificate["not_after"], "addresses": addresses}
        with logged(audit_of(directory), "renew-certificate", **about):
            if (directory / "server.pem").exists():
                write_atomic(aside(directory / "server.pem"), (directory / "server.pem").read_bytes())
            replace_private(directory / "server.key", key_bytes, aside(directory / "server.key"))
            write_atomic(directory / "server.pem", chain)
            return _write_facts(directory, facts | {"addresses": addresses})


def rotate_release_key(directory: Path) -> dict[str, Any]:
    """A new release key, and a statement signed by the old one that names it; the old public key stays.

    The old private key is not kept: a stolen old key could otherwise name any number of successors.
    """
    with locked(directory):
        facts = load_facts(directory)
        old = load_release_key(directory)
        new = Ed25519PrivateKey.generate()
        before, after = key_id(old.public_key()), key_id(new.public_key())
        with logged(audit_of(directory), "rotate-release-key", fingerprint=after, former=before):
            kept = directory / f"release.pub.old-{before[:16]}"
            write_atomic(kept, public_pem(old.public_key()))
            handover = directory / f"release-handover-{before[:16]}-{after[:16]}.json"
            write_handover(handover, facts["name"], old, new)
            try:
                replace_private(directory / "release.key", private_bytes(new), None)
            except BaseException:
                handover.unlink(missing_ok=True)
                raise
            write_atomic(directory / "release.pub", public_pem(new.public_key()))
            former = [*facts.get("former_release_keys", []), {"key_id": before, "file": kept.name, "until": _now()}]
            return _write_facts(directory, facts | {"former_release_keys": former, "handover": handover.name})


def check_given(given: Given, addresses: Sequence[str]) -> None:
    """`UsageError` for a CA, certificate or key of one's own that sites would refuse, or that the server cannot use."""
    check_ca(given.ca, UsageError)
    chain = read_certificates(given.certificate, UsageError)
    for certificate in chain:
        check_dates(given.certificate, certificate, UsageError)
    content = read_private_file(given.key, SERVER_KEY)
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UsageError(
            f"{given.key}: not a readable PEM private key without a password", fix="give the key as PEM, unencrypted"
        ) from None
    if _spki(key.public_key()) != _spki(chain[0].public_key()):
        raise UsageError(
            f"{given.key}: not the key of the certificate {given.certificate} ({subject_of(chain[0])})",
            fix="name the key that belongs to it; the server's own certificate comes first in its file",
        )
    for address in addresses:
        problem = handshake_problem(str(given.certificate), str(given.key), str(given.ca), address)
        if problem:
            raise UsageError(
                f"{given.certificate}: a site that trusts {given.ca} refuses it at {address}: {problem}",
                fix="the file must hold the server's certificate, then every intermediate one; its names (SAN) must"
                " cover every --address, its purpose must allow TLS servers",
            )


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One process at a time changes the folder."""
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise OutputError(f"{directory}: cannot be opened ({error.strerror})", fix=INIT_FIRST) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # released when it is closed
        yield
    finally:
        os.close(handle)


def _issue(folder: Path, addresses: Sequence[str], days: int) -> tuple[bytes, bytes]:
    """A server's key and certificate (PEM), signed with the CA in `folder`."""
    ca_key = load_p384(folder / "ca.key", CA_KEY)
    ca = check_ca(folder / "ca.pem", OutputError)[0]
    if _spki(ca.public_key()) != _spki(ca_key.public_key()):
        raise OutputError(f"{folder / 'ca.key'}: not the key of ca.pem", fix="put back the pair that belongs together")
    key = new_p384()
    return private_bytes(key), _pem(issue(ca, ca_key, key.public_key(), addresses, days))


def _write_facts(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """consortium.json from what lies in the folder; only public facts."""
    facts = facts | {
        "ca": [_facts_of(certificate) for certificate in check_ca(folder / "ca.pem", OutputError)],
        "server": _facts_of(read_certificates(folder / "server.pem", OutputError)[0]),
        "release_key": {"file": "release.pub", "key_id": key_id(load_release_key(folder).public_key())},
    }
    write_atomic(folder / FACTS, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    return facts


def _facts_of(certificate: x509.Certificate) -> dict[str, str]:
    return {
        "subject": subject_of(certificate),
        "sha256": fingerprint(certificate),
        "not_after": timestamp(certificate.not_valid_after_utc),
    }


def _check_addresses(addresses: Sequence[str]) -> None:
    for address in addresses:
        try:
            general_name(address)
        except ValueError as error:
            raise UsageError(
                f"--address: {error}", fix="give names and addresses without a port, such as consortium.example.org"
            ) from None


def _spki(key: Any) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _now() -> str:
    return timestamp(datetime.now(UTC))
