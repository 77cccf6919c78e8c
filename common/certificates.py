"""X.509 as both sides need it: read certificates, check a CA, and judge a server's chain by a real TLS handshake."""

from __future__ import annotations

import ipaddress
import re
import ssl
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from common.errors import CohortiumError

DNS_NAME = re.compile(
    r"(?=.{1,253}$)(\*\.)?([a-zA-Z0-9_]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9])?\.)*[a-zA-Z][a-zA-Z0-9-]{0,62}"
)


def read_certificates(path: Path, error: type[CohortiumError]) -> list[x509.Certificate]:
    """Every certificate of a PEM file, at least one; `error` if it cannot be read, or holds a private key as well."""
    try:
        content = path.read_bytes()
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror})", fix="name a PEM file with a certificate") from None
    if b"PRIVATE KEY" in content:
        raise error(
            f"{path}: holds a private key, a certificate was expected", fix="name the file that holds only certificates"
        )
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError:
        raise error(f"{path}: not a PEM certificate", fix="name a PEM file (-----BEGIN CERTIFICATE-----)") from None


def check_ca(path: Path, error: type[CohortiumError]) -> list[x509.Certificate]:
    """The certificates of a file in which each is a CA's and none is expired; `error` naming what is wrong."""
    found = read_certificates(path, error)
    for certificate in found:
        try:
            constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
            is_ca = constraints.ca
        except (x509.ExtensionNotFound, ValueError):
            is_ca = False
        if not is_ca:
            raise error(
                f"{path}: {subject_of(certificate)} is not the certificate of a certification authority",
                fix="name the consortium's ca.pem; a server's certificate does not do",
            )
        check_dates(path, certificate, error)
    return found


def check_dates(path: Path, certificate: x509.Certificate, error: type[CohortiumError]) -> None:
    """`error` if the certificate is not valid now."""
    now = datetime.now(UTC)
    subject = subject_of(certificate)
    if certificate.not_valid_after_utc < now:
        raise error(
            f"{path}: {subject} expired at {timestamp(certificate.not_valid_after_utc)}",
            fix="ask for a renewed certificate, or correct this machine's clock",
        )
    if certificate.not_valid_before_utc > now:
        raise error(
            f"{path}: {subject} is not valid before {timestamp(certificate.not_valid_before_utc)}",
            fix="correct this machine's clock",
        )


def subject_of(certificate: x509.Certificate) -> str:
    """The certificate's subject as text."""
    return certificate.subject.rfc4514_string() or "the certificate"


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 (hex) of the whole certificate, as `openssl x509 -fingerprint -sha256` shows it with colons."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC, to the second."""
    return moment.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def general_name(address: str) -> x509.GeneralName:
    """A host name or an IP address as X.509 writes it; `ValueError` if it is neither."""
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        pass
    if not DNS_NAME.fullmatch(address):
        raise ValueError(f"{address!r} is neither a host name nor an IP address")
    return x509.DNSName(address.lower())


def handshake_problem(chain: str, key: str, ca: str, address: str) -> str:
    """Why a client that trusts only `ca` refuses a server with this chain (paths) at `address`; empty if it does not.

    A TLS handshake in memory: OpenSSL itself judges chain, dates, purpose and name, as it will on the wire.
    """
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        server.load_cert_chain(chain, key, password="")
    except ssl.SSLError as problem:
        return f"certificate and key do not belong together or cannot be used ({problem.reason or 'unreadable'})"
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.load_verify_locations(ca)
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    host = server.wrap_bio(to_server, to_client, server_side=True)
    guest = client.wrap_bio(to_client, to_server, server_hostname=address)
    waiting = [guest, host]
    try:
        for _ in range(20):
            for side in list(waiting):
                try:
                    side.do_handshake()
                    waiting.remove(side)
                except ssl.SSLWantReadError:
                    continue
            if not waiting:
                return ""
    except ssl.SSLCertVerificationError as problem:
        return problem.verify_message
    except ssl.SSLError as problem:
        return problem.reason or "the handshake failed"
    return "the handshake does not end"
