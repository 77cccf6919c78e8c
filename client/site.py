"""site.toml: what this hospital runs on and what it allows, whatever the coordinator asks. It never leaves the site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from common.config import Section, read_toml, validate
from common.errors import SiteError
from common.study import SITE_NAME, Mode, Protocol


class SiteSection(Section):
    """Where things are."""

    name: str = Field(pattern=f"^{SITE_NAME}$", description="the site's name in the consortium")
    data: Path = Field(description="patient table, .csv or .parquet, relative to this file")
    state: Path = Field(description="directory for the ledger, the encoder and the site's log; back it up")
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description='"auto", "cpu" or "cuda[:n]"')
    threads: Annotated[int, Field(ge=1)] | None = Field(default=None, description="CPU threads; default: all")


class PolicySection(Section):
    """What the steward allows."""

    modes: tuple[Mode, ...] = Field(default=("constrained",), description="training modes this site takes part in")
    out_of_bounds: Literal["clip", "refuse"] = Field(
        default="clip", description='values outside declared bounds: "clip" (moved to the bound, counted) or "refuse"'
    )
    min_patients: Annotated[int, Field(ge=1)] = Field(default=20, description="take part only with this many patients")
    max_update_norm: Annotated[float, Field(gt=0)] = Field(
        default=10.0, description="largest update radius C a study may ask for"
    )
    max_epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)] | None = Field(
        default=None,
        description="refuse a study with which all studies of this site together would exceed this epsilon",
    )
    max_release_rows: Annotated[int, Field(ge=0, strict=True)] = Field(
        default=0,
        description="most synthetic rows a study may draw through this site's own encoder; 0: no such release",
    )
    simulation: bool = Field(
        default=False, description="allow seeded randomness and the non-private mode; only where no patient is real"
    )


class SiteConfig(Section):
    """One hospital's configuration."""

    site: SiteSection
    policy: PolicySection = Field(default_factory=PolicySection)

    def objections(self, protocol: Protocol) -> list[str]:
        """Every reason why this site's policy forbids the study; empty if it may run."""
        study, found = protocol.study, []
        if study.training.mode not in self.policy.modes:
            found.append(f"mode {study.training.mode!r} is not among the allowed modes {list(self.policy.modes)}")
        if study.training.mode == "none" and not self.policy.simulation:
            found.append("mode 'none' sends unprojected updates and is for simulations only")
        if study.study.seed is not None and not self.policy.simulation:
            found.append("the study fixes a seed; randomness at a hospital comes from the operating system")
        if study.training.update_norm > self.policy.max_update_norm:
            found.append(
                f"update_norm {study.training.update_norm:g} exceeds this site's limit {self.policy.max_update_norm:g}"
            )
        if study.release.method == "channel" and self.policy.max_release_rows == 0:
            found.append("the study releases rows through this site's encoder (channel), max_release_rows allows none")
        if study.sites and self.site.name not in study.sites:
            found.append(f"the study declares its sites and {self.site.name!r} is not among them")
        return found


def load_site(path: str | Path) -> SiteConfig:
    """Read site.toml; paths in it become absolute. `SiteError` lists every problem found."""
    path = Path(path)
    document = read_toml(path, SiteError, fix="check the path of site.toml")
    config = validate(SiteConfig, document, str(path), SiteError)
    folder = path.resolve().parent
    site = config.site.model_copy(update={"data": folder / config.site.data, "state": folder / config.site.state})
    return config.model_copy(update={"site": site})
