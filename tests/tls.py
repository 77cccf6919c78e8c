"""Certificates as an institution's own authority makes them, a TLS server, and a client that trusts one CA."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from common.certificates import check_ca
from common.errors import OutputError
from common.keys import load_p384
from server.authority import issue
from server.consortium import CA_KEY, SERVER_KEY


def certificate(
    key: EllipticCurvePrivateKey,
    name: str,
    *,
    by: EllipticCurvePrivateKey | None = None,
    issuer: str | None = None,
    ca: bool = True,
    days: int = 99,
    age: int = 1,
) -> x509.Certificate:
    """A CA's certificate, or another's, made `age` days ago for `days` days; signed with its own key unless told."""
    by, then = by or key, datetime.now(UTC) - timedelta(days=age)
    names = [x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, text)]) for text in (name, issuer or name)]
    ski, aki = (x509.SubjectKeyIdentifier.from_public_key(found.public_key()) for found in (key, by))
    uses = dict.fromkeys(("data_encipherment", "key_agreement", "encipher_only", "decipher_only"), False)
    uses |= {"key_encipherment": False, "content_commitment": False}
    usage = x509.KeyUsage(digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, **uses)
    serial = x509.random_serial_number()
    return (
        x509.CertificateBuilder(names[1], names[0], key.public_key(), serial, then, then + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(ski, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(aki), critical=False)
        .sign(by, hashes.SHA384())
    )


def say_hello(secure: ssl.SSLSocket) -> None:
    """What a server answers unless told otherwise."""
    secure.sendall(b"hello")


@contextmanager
def serving(
    chain: Path, key: Path, answer: Callable[[ssl.SSLSocket], None] = say_hello, host: str = "127.0.0.1"
) -> Iterator[int]:
    """A server that shakes hands, answers and hangs up; yields its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    with socket.create_server((host, 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    try:
                        connection.settimeout(10)
                        with context.wrap_socket(connection, server_side=True) as secure:
                            answer(secure)
                    except OSError:
                        continue

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def greet(port: int, ca: Path, name: str, flags: ssl.VerifyFlags = ssl.VerifyFlags.VERIFY_X509_STRICT) -> str:
    """ "hello", or why the client refused."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(ca)
    context.verify_flags |= flags
    with socket.create_connection(("127.0.0.1", port), timeout=10) as plain:
        try:
            with context.wrap_socket(plain, server_hostname=name) as secure:
                return secure.recv(5).decode()
        except ssl.SSLCertVerificationError as error:
            return error.verify_message


def certify(consortium: Path, host: str, until: datetime) -> None:
    """Give the server of a consortium a certificate of its CA that ends then."""
    ca = check_ca(consortium / "ca.pem", OutputError)[0]
    ca_key, key = load_p384(consortium / "ca.key", CA_KEY), load_p384(consortium / "server.key", SERVER_KEY)
    made = issue(ca, ca_key, key.public_key(), [host], 1, until - timedelta(days=1))
    (consortium / "server.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
