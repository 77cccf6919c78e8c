"""Before the SuperNode starts: can the coordinator's SuperLink be reached, is it the right one, is the clock right?

Flower's own messages for these failures name exceptions. Here each has one sentence.
"""

from __future__ import annotations

import email.utils
import re
import socket
import ssl
import time
from pathlib import Path

from client.connection import ConnectionSection
from common.certificates import check_ca
from common.errors import FederationError, SiteError
from common.keys import NODE_KEY, load_p384

TIMEOUT = 10.0
# Flower refuses a request that claims to be more than 5 s in the future, or older than 305 s.
AHEAD, BEHIND = 5.0, 300.0
_EXPIRED, _NOT_YET, _OTHER_NAME = (10,), (9,), (62, 64)  # OpenSSL's X509_V_ERR codes


class UnreachableError(FederationError):
    """The SuperLink does not answer; it may later."""


def check_files(connection: ConnectionSection) -> None:
    """`SiteError` if the CA or the node key cannot be used."""
    check_ca(connection.root_certificates, SiteError)
    load_p384(connection.node_key, NODE_KEY)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT or [IPV6]:PORT."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def check_superlink(connection: ConnectionSection, source: Path) -> None:
    """`UnreachableError` if nobody answers, `SiteError` for a wrong authority, name or clock; else nothing."""
    host, port = split_address(connection.superlink)
    context = ssl.create_default_context(cafile=str(connection.root_certificates))
    request = f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    try:
        with (
            socket.create_connection((host, port), timeout=TIMEOUT) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            before = time.time()
            secure.sendall(request.encode("ascii"))
            answer, after = _head(secure), time.time()
    except ssl.SSLCertVerificationError as error:
        raise _certificate(error, connection, source) from None
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise UnreachableError(
            f"the SuperLink {connection.superlink} cannot be reached ({reason})",
            fix=f"check `superlink` in {source}, the firewall (one outbound connection), and whether it is running",
        ) from None
    _check_clock(answer, before, after)


def _head(secure: ssl.SSLSocket) -> str:
    data = b""
    while b"\r\n\r\n" not in data and len(data) < 1 << 16:
        more = secure.recv(4096)
        if not more:
            break
        data += more
    return data.decode("latin-1")


def _certificate(error: ssl.SSLCertVerificationError, connection: ConnectionSection, source: Path) -> SiteError:
    code, address = error.verify_code, connection.superlink
    if code in _EXPIRED:
        text = f"the certificate of the SuperLink {address} has expired, or this machine's clock is wrong"
        fix = "compare the clock with `date -u`; else the coordinator has to renew the certificate"
    elif code in _NOT_YET:
        text = f"the certificate of the SuperLink {address} is not valid yet: this machine's clock is wrong"
        fix = "set the clock (NTP) and start again"
    elif code in _OTHER_NAME:
        text = f"the certificate of the SuperLink is not for the name in `superlink`, {address}"
        fix = f"write the name the coordinator gave you into {source}, or ask for a certificate with this name"
    else:
        text = f"the SuperLink {address} shows a certificate that {connection.root_certificates} has not signed"
        fix = "ask the coordinator for the consortium's ca.pem; if it is right, somebody stands between you and him"
    return SiteError(text, fix=fix)


def _check_clock(answer: str, before: float, after: float) -> None:
    found = re.search(r"^date:\s*(.+?)\s*$", answer, re.IGNORECASE | re.MULTILINE)
    if found is None:
        return
    try:
        theirs = email.utils.parsedate_to_datetime(found[1]).timestamp()  # whole seconds, rounded down
    except (ValueError, TypeError):
        return
    ahead, behind = before - theirs - 1.0, theirs - after
    if ahead > AHEAD or behind > BEHIND:
        how = f"{ahead:.0f} s ahead of" if ahead > AHEAD else f"{behind:.0f} s behind"
        raise SiteError(
            f"this machine's clock is {how} the SuperLink's; signed requests would be refused",
            fix="set the clock (NTP: `timedatectl set-ntp true`) and start again",
        )
