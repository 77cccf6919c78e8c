"""A TLS server on loopback, what a client that trusts one CA says of it, and a CA of two levels."""

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from server.authority import make_ca


@contextmanager
def serving(chain: Path, key: Path) -> Iterator[int]:
    """A server that shakes hands and hangs up; yields its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    with socket.create_server(("127.0.0.1", 0)) as listener:

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
                            secure.sendall(b"hello")
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


def signed(key: EllipticCurvePrivateKey, by: EllipticCurvePrivateKey, name: str, issuer: str) -> x509.Certificate:
    """A CA's certificate as an institution's two-level authority has them."""
    names = [x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, text)]) for text in (name, issuer)]
    ski, aki = (x509.SubjectKeyIdentifier.from_public_key(found.public_key()) for found in (key, by))
    model = make_ca(key, name, ["localhost"], 9).extensions.get_extension_for_class(x509.KeyUsage).value
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder(names[1], names[0], key.public_key(), 7, now - timedelta(1), now + timedelta(99))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(model, critical=True)
        .add_extension(ski, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(aki), critical=False)
        .sign(by, hashes.SHA384())
    )
