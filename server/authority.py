"""The consortium's own certification authority: it certifies the server's addresses and nothing else.

Pure functions of keys, names and dates. The CA permits only the host names it was made for (X.509 name constraints), so
that a hospital that trusts it trusts nobody under another name. IP addresses are not constrained: gRPC's BoringSSL
refuses every certificate below a CA with such a constraint ("unsupported name constraint type").
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.certificates import general_name

# Flower's own processes reach the SuperLink on the same machine under these.
LOCAL = ("localhost", "127.0.0.1", "::1")
SKEW = timedelta(hours=1)


def make_ca(
    key: ec.EllipticCurvePrivateKey, name: str, permitted: Sequence[str], days: int, now: datetime | None = None
) -> x509.Certificate:
    """A self-signed CA certificate that may certify servers at the host names in `permitted` and all below them."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} Cohortium CA"[:64])])
    now = now or datetime.now(UTC)
    ski = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    hosts = [name for name in map(general_name, permitted) if isinstance(name, x509.DNSName)]
    subtrees = [x509.DNSName(_host(name)) for name in hosts]
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs=False), critical=True)
        .add_extension(x509.NameConstraints(subtrees, None), critical=True)
        .add_extension(ski, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ski), critical=False)
        .sign(key, hashes.SHA384())
    )


def issue(
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    public: ec.EllipticCurvePublicKey,
    addresses: Sequence[str],
    days: int,
    now: datetime | None = None,
) -> x509.Certificate:
    """A server's certificate for `addresses` and the machine itself, no longer valid than its CA's."""
    now = now or datetime.now(UTC)
    names = list(dict.fromkeys(general_name(address) for address in (*addresses, *LOCAL)))
    ski = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, addresses[0][:64])]))
        .issuer_name(ca.subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(max(now - SKEW, ca.not_valid_before_utc))
        .not_valid_after(min(now + timedelta(days=days), ca.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ski), critical=False)
        .sign(ca_key, hashes.SHA384())
    )


def permits(permitted: Sequence[str], address: str) -> bool:
    """Whether a CA made for `permitted` may certify `address`."""
    wanted = general_name(address)
    if isinstance(wanted, x509.IPAddress):
        return True
    host = _host(wanted)
    below = [_host(name) for name in map(general_name, permitted) if isinstance(name, x509.DNSName)]
    return any(host == name or host.endswith(f".{name}") for name in below)


def _host(name: x509.GeneralName) -> str:
    return str(name.value).removeprefix("*.")


def _key_usage(*, signs: bool) -> x509.KeyUsage:
    """A server signs handshakes; a CA signs certificates and revocation lists."""
    return x509.KeyUsage(
        digital_signature=signs,
        key_cert_sign=not signs,
        crl_sign=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
