"""What the coordinator's processes share: addresses, the state folder, logs, and that a child ends with its parent."""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
import threading
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.errors import FederationError, OutputError, UsageError
from common.files import write_atomic
from common.keys import KeyUse, create_private, read_private_file

SERVICES = ("superlink", "executor")  # of the health protocol
SECRET = KeyUse(
    "the secret between the SuperLink and its executor",
    OutputError,
    "the secret between the SuperLink and its executor is missing",
    "start the SuperLink again; it makes a new one",
    fix="remove it and start the SuperLink again",
)


@dataclass(frozen=True)
class StateFolder:
    """`state` in the consortium's folder: the SuperLink's database, its secret, the settings of every run."""

    consortium: Path

    @property
    def path(self) -> Path:
        """The folder itself."""
        return self.consortium / "state"

    @property
    def database(self) -> Path:
        """The SuperLink's SQLite database."""
        return self.path / "superlink.db"

    @property
    def secret(self) -> Path:
        """With which the executor claims tasks."""
        return self.path / "executor.secret"

    @property
    def home(self) -> Path:
        """FLWR_HOME."""
        return self.path / "flwr"

    @property
    def runs(self) -> Path:
        """Settings of every launch, by name."""
        return self.path / "runs"

    @property
    def addresses(self) -> Path:
        """Where the SuperLink listens."""
        return self.path / "superlink.json"

    @property
    def serving(self) -> Path:
        """The run that the executor has in hand."""
        return self.path / "serving.json"

    @property
    def answered(self) -> Path:
        """Touched by the executor whenever the SuperLink has answered it."""
        return self.path / "executor.answered"

    @property
    def lock(self) -> Path:
        """Held by the process that runs the SuperLink."""
        return self.path / "superlink.lock"

    def prepare(self) -> None:
        """Make the folder (0700) with a secret (0600); `OutputError` if that fails."""
        try:
            for folder in (self.path, self.home, self.runs):
                folder.mkdir(mode=0o700, exist_ok=True)
                folder.chmod(0o700)
        except OSError as error:
            raise OutputError(
                f"{self.path}: cannot be made ({error.strerror})", fix="correct the permissions of the folder"
            ) from None
        if not self.secret.exists():
            create_private(self.secret, secrets.token_hex(32).encode())
        read_private_file(self.secret, SECRET)

    def write_addresses(self, public: str, private: str, health: str) -> None:
        """Note where the SuperLink and the health probe listen, for `launch` and `status`."""
        document = {"public": public, "private": private, "health": health, "pid": os.getpid(), "started": _now()}
        write_atomic(self.addresses, json.dumps(document, indent=1))

    def read_addresses(self) -> dict[str, Any]:
        """Where the SuperLink listens; `FederationError` if it was never started from this folder."""
        try:
            document = json.loads(self.addresses.read_text(encoding="utf-8"))
            split_address(document["private"])
            return document
        except (OSError, ValueError, KeyError, TypeError, UsageError):
            raise FederationError(
                f"{self.consortium}: no SuperLink was started from this folder",
                fix=f"cohortium start-superlink --consortium {self.consortium} --public HOST:PORT",
            ) from None


def environment(state: StateFolder) -> dict[str, str]:
    """For every process of Flower: nothing is reported or looked up elsewhere, nothing written outside the folder."""
    return os.environ | {
        "FLWR_HOME": str(state.home.resolve()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # a `server` or `common` in the user's working folder is not ours
    }


def split_address(address: str, option: str = "") -> tuple[str, int]:
    """Host and port of HOST:PORT or [IPV6]:PORT; `UsageError` naming `option` for anything else."""
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    if not colon or not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise UsageError(f"{option} {address!r} is not HOST:PORT".strip(), fix="for example 127.0.0.1:8000")
    return host, int(port)


def end_with_parent() -> None:
    """End this process when its parent does, however that ended: its standard input is a pipe that the parent holds."""

    def watch() -> None:
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record; of an exception only its type, since its text may quote anything."""
        document: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info and record.exc_info[0]:
            document["exception"] = record.exc_info[0].__name__
        return json.dumps(document, ensure_ascii=False)


class _NotRoutine(logging.Filter):
    """Drops Flower's lines about every single request, several a second."""

    ROUTINE = ("[Fleet.", "[Runtime.", "ControlServicer.List")

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno > logging.INFO or not record.getMessage().startswith(self.ROUTINE)


def quiet_routine() -> None:
    """No line for every request; errors stay."""
    logging.getLogger("flwr").addFilter(_NotRoutine())


def use_json_logs() -> None:
    """Every logger of this process, Flower's included, writes JSON lines to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.INFO)  # Flower's own logger lets everything pass
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for name in ("flwr", "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
