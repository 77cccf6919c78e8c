"""connection.toml: where the coordinator's SuperLink is and which keys speak for either side; facts, no policy."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field, field_validator

from common.certificates import general_name
from common.config import Section, read_toml, validate
from common.errors import SiteError


def check_address(value: str) -> str:
    """HOST:PORT as it is; `ValueError` if it is not one."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/@\s]+)):(\d{1,5})", value)
    if found is None or not 1 <= int(found[3]) <= 65535:
        raise ValueError(f"expected HOST:PORT, such as consortium.example.org:443, got {value!r}")
    general_name(found[1] or found[2])
    return value


class ConnectionSection(Section):
    """How to reach the coordinator."""

    superlink: str = Field(description="HOST:PORT of the SuperLink")
    root_certificates: Path = Field(description="the consortium's ca.pem; nobody else is believed")
    node_key: Path = Field(description="private key of Flower's node authentication, mode 0600")
    release_key: str | None = Field(
        default=None, pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the coordinator's release key, if pinned"
    )

    @field_validator("superlink")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        return check_address(value)


class ConnectionConfig(Section):
    """The file."""

    connection: ConnectionSection


def load_connection(path: str | Path) -> ConnectionSection:
    """Read connection.toml; paths in it become absolute. `SiteError` lists every problem found."""
    path = Path(path)
    document = read_toml(path, SiteError, fix="name the folder that `cohortium-site init` made")
    found = validate(ConnectionConfig, document, str(path), SiteError).connection
    folder = path.resolve().parent
    return found.model_copy(
        update={"root_certificates": folder / found.root_certificates, "node_key": folder / found.node_key}
    )
