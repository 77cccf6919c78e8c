"""site.toml: what this hospital runs on and what it allows, whatever the coordinator asks. It never leaves the site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from client.policy import PolicySection as PolicySection
from client.sql_config import SqlSection
from common.config import Section, read_toml, validate
from common.errors import SiteError
from common.study import SITE_NAME, Protocol


class SiteSection(Section):
    """Where things are."""

    name: str = Field(pattern=f"^{SITE_NAME}$", description="the site's name in the consortium")
    sql: SqlSection | None = Field(default=None, description="the patient table as a read-only query, instead of data")
    data: Path | None = Field(
        default=None, validate_default=True, description="patient table, .csv or .parquet, relative to this file"
    )
    state: Path = Field(description="directory for the ledger, the encoder and the site's log; back it up")
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description='"auto", "cpu" or "cuda[:n]"')
    threads: Annotated[int, Field(ge=1)] | None = Field(default=None, description="CPU threads; default: all")

    @field_validator("sql", mode="before")
    @classmethod
    def _section(cls, value: object) -> object:
        if value is not None and not isinstance(value, dict | SqlSection):
            raise ValueError("is a section of its own: write [site.sql] with url and query")  # might hold a password
        return value

    @field_validator("data", mode="before")
    @classmethod
    def _file(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, str) and "://" in value:
            raise ValueError("names a file; a database goes into [site.sql] with url and query")
        if value is None and info.data.get("sql", ...) is None:
            raise ValueError("is required: a .csv or .parquet file, unless [site.sql] names a query")
        if value is not None and info.data.get("sql") is not None:
            raise ValueError("and [site.sql] cannot both be given: a site has one patient table")
        return value


class SiteConfig(Section):
    """One hospital's configuration."""

    site: SiteSection
    policy: PolicySection = Field(default_factory=PolicySection)

    @property
    def source(self) -> str:
        """Where the patients come from, as the site's own log names it."""
        return "[site.sql]" if self.site.data is None else str(self.site.data)

    def objections(self, protocol: Protocol) -> list[str]:
        """Every reason why this site's policy forbids the study; empty if it may run."""
        return self.policy.objections(protocol, self.site.name)


def load_site(path: str | Path) -> SiteConfig:
    """Read site.toml; paths in it become absolute. `SiteError` lists every problem found."""
    path = Path(path)
    document = read_toml(path, SiteError, fix="check the path of site.toml")
    config = validate(SiteConfig, document, str(path), SiteError)
    folder, site = path.resolve().parent, config.site
    places = {"state": folder / site.state}
    if site.data is not None:
        places["data"] = folder / site.data
    sql = site.sql and site.sql.within(folder)
    return config.model_copy(update={"site": site.model_copy(update={**places, "sql": sql})})
