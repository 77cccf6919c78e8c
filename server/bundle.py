"""The app bundle that Flower ships to the sites, and whose SHA-256 they approve: the installed code, reproducibly.

The sites run their own installed code and never this bundle; it stands for the code that the coordinator runs. The same
installation always gives the same bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from common.console import distribution_version
from common.errors import FederationError

ROOMS = ("client", "common", "server")
# What is run; templates of reports are not.
SUFFIX = ".py"
RUN_KEY = "cohortium-run"


@dataclass(frozen=True)
class Bundle:
    """The bytes that are shipped, and what sites approve."""

    content: bytes
    files: int

    @property
    def digest(self) -> str:
        """SHA-256 (hex)."""
        return hashlib.sha256(self.content).hexdigest()


def build_bundle() -> Bundle:
    """The bundle of this installation; `FederationError` if Flower does not take it."""
    from flwr.cli.build import build_fab_from_files

    files: dict[str, bytes | Path] = {"pyproject.toml": _pyproject().encode()}
    for room in ROOMS:
        # `__path__` and not the file of __init__: an editable installation and a wheel alike
        root = Path(next(iter(import_module(room).__path__)))
        for path in sorted(root.rglob("*")):
            if path.suffix == SUFFIX and path.is_file() and "__pycache__" not in path.parts:
                files[f"{room}/{path.relative_to(root).as_posix()}"] = path.read_bytes()
    try:
        content, _ = build_fab_from_files(files)
    except ValueError as error:
        raise FederationError(
            f"Flower does not accept the app bundle: {error}", fix="install Cohortium and its dependencies again"
        ) from None
    return Bundle(content, len(files))


def _pyproject() -> str:
    return f"""[project]
name = "cohortium"
version = "{distribution_version().split("+")[0]}"
description = "One pooled synthetic patient cohort from several hospitals"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "cohortium"
fab-include = [{", ".join(f'"{room}/**/*{SUFFIX}"' for room in ROOMS)}]

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
{RUN_KEY} = ""
"""
