"""A real PostgreSQL for the tests, in a directory of its own, gone afterwards."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PASSWORD = "pw-Vienna-88"  # no reply and no log may hold it


@dataclass(frozen=True)
class Server:
    """A running server with one superuser, `owner`."""

    port: int

    def url(self, user: str = "owner", password: str = PASSWORD, scheme: str = "postgresql") -> str:
        return f"{scheme}://{user}:{password}@127.0.0.1:{self.port}/postgres"

    def run(self, *statements: str) -> list[Any]:
        import psycopg

        with psycopg.connect(self.url(), autocommit=True) as connection:
            for statement in statements[:-1]:
                connection.execute(statement)  # pyright: ignore[reportArgumentType, reportCallIssue]
            cursor = connection.execute(statements[-1])  # pyright: ignore[reportArgumentType, reportCallIssue]
            return cursor.fetchall() if cursor.description else []


@contextmanager
def postgres() -> Iterator[Server]:
    """Start one; skip with the reason where there are no binaries."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'cohortium[sql]'")
    pytest.importorskip("sqlalchemy", reason="SQLAlchemy is not installed: pip install 'cohortium[sql]'")
    found = [*sorted(Path("/usr/lib/postgresql").glob("*/bin")), *map(Path, os.environ["PATH"].split(":"))]
    binaries = next((folder for folder in reversed(found) if (folder / "initdb").exists()), None)
    if binaries is None:
        pytest.skip("no PostgreSQL here (initdb is neither in PATH nor under /usr/lib/postgresql): apt-get install it")
    folder = Path(tempfile.mkdtemp(prefix="cohortium-pg-"))
    account = _account()
    if account:  # PostgreSQL refuses to run as root
        shutil.chown(folder, account)
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data, log = str(folder / "data"), str(folder / "log")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"

    def call(*command: str) -> None:
        subprocess.run([str(binaries / command[0]), *command[1:]], user=account, cwd=folder, check=True, **quiet)

    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    secret = ("--auth=scram-sha-256", f"--pwfile={folder / 'password'}")
    try:
        call("initdb", "-D", data, "-U", "owner", "--no-sync", "-E", "UTF8", "--locale=C", *secret)
        call("pg_ctl", "-D", data, "-l", log, "-o", options, "-w", "start")
        try:
            yield Server(port)
        finally:
            call("pg_ctl", "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _account() -> str | None:
    """Another account than root, if root is who runs the tests."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in ("postgres", "nobody") if name in known)
