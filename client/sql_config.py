"""The `[site.sql]` of site.toml: a database and one query, and never a password in the file."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl

from pydantic import Field, field_validator, model_validator

from client.sql_text import query_problem
from common.config import Section
from common.errors import SiteError

MENDING = (
    'write url = "env:COHORTIUM_DATABASE_URL" and set that variable for the node, or url = "file:database-url.txt", a'
    " file with permissions 0600"
)
_SECRET_KEY = re.compile(r"pass|pwd|secret|token|odbc", re.IGNORECASE)


class SqlSection(Section):
    """A read-only query that gives one row a patient. No value of this section is ever repeated in an error."""

    url: str = Field(description='"env:VARIABLE", "file:PATH" (0600), or a URL without a password')
    query: str | None = Field(default=None, description="one SELECT, its columns named as in the schema")
    query_file: Path | None = Field(default=None, description="a file with the query, relative to this file")
    key: str | None = Field(default=None, description="unique column that fixes the order, instead of ORDER BY")
    timeout_seconds: Annotated[int, Field(ge=1, le=86_400, strict=True)] = Field(default=300, description="most time")
    max_rows: Annotated[int, Field(ge=1, strict=True)] = Field(default=1_000_000, description="most rows it may give")

    @model_validator(mode="before")
    @classmethod
    def _texts(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name in ("url", "query", "query_file", "key"):
                if name in values and not isinstance(values[name], str | Path):
                    raise ValueError(f"{name} must be text in quotes")
        return values

    @field_validator("url")
    @classmethod
    def _no_password(cls, url: str) -> str:
        kind, _, rest = url.partition(":")
        if kind in ("env", "file"):
            if not rest.strip() or rest.startswith("//"):
                raise ValueError(f"names nothing after {kind}:; {MENDING}")
        elif "://" not in url:
            raise ValueError(f"is not a database URL; {MENDING}")
        elif has_password(url):
            raise ValueError(f"holds a password, which never belongs into site.toml; {MENDING}")
        return url

    @model_validator(mode="after")
    def _one_query(self) -> SqlSection:
        if (self.query is None) == (self.query_file is None):
            raise ValueError("give either query or query_file")
        if self.query is not None and (problem := query_problem(self.query, ordered=self.key is None)):
            raise ValueError(f"query: {problem}")
        return self

    def within(self, folder: Path) -> SqlSection:
        """The same section with its paths made absolute."""
        changed: dict[str, Any] = {}
        if self.query_file is not None:
            changed["query_file"] = folder / self.query_file
        if self.url.startswith("file:"):
            changed["url"] = f"file:{folder / self.url.removeprefix('file:')}"
        return self.model_copy(update=changed)

    def read_url(self) -> str:
        """The URL itself, from the environment or its file; `SiteError` if it is not there."""
        kind, _, rest = self.url.partition(":")
        if kind == "env":
            if url := os.environ.get(rest, "").strip():
                return url
            raise SiteError(
                f"[site.sql] url: the environment variable {rest!r} is not set", fix="set it where the node is started"
            )
        return _read_secret(Path(rest)) if kind == "file" else self.url

    def read_query(self) -> str:
        """The query; `SiteError` if its file cannot be read or holds something else."""
        if self.query_file is None:
            return self.query or ""
        try:
            query = self.query_file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise SiteError(
                f"{self.query_file}: cannot be read ({reason})", fix="correct query_file in [site.sql]"
            ) from None
        if problem := query_problem(query, ordered=self.key is None):
            raise SiteError(f"{self.query_file}: {problem}", fix="correct the query")
        return query


def has_password(url: str) -> bool:
    """Whether a URL seems to carry a secret; in doubt it does."""
    kind, _, rest = url.partition("://")
    if kind.startswith("sqlite"):
        return False
    user, at, _ = rest.rpartition("@")
    query = rest.partition("?")[2]
    return (bool(at) and ":" in user) or any(_SECRET_KEY.search(name) for name, _ in parse_qsl(query, True))


def _read_secret(path: Path) -> str:
    try:
        mode = path.stat().st_mode
        url = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SiteError(f"{path}: cannot be read ({reason})", fix="correct url in [site.sql]") from None
    if stat.S_IMODE(mode) & 0o077:
        raise SiteError(
            f"{path}: others may read this file (permissions {stat.S_IMODE(mode):04o}, expected 0600)",
            fix=f"chmod 600 {path}; and change the password if somebody may have read it",
        )
    if not url:
        raise SiteError(f"{path}: is empty", fix="write the database URL into it")
    return url
