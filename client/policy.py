"""The `[policy]` of site.toml: what the steward allows, and every reason why a study is not."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, field_validator, model_validator

from client.hours import EXAMPLE, is_open, parse_hours
from common.config import Section
from common.schema import Schema
from common.study import Mode, Protocol

Epsilon = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Count = Annotated[int, Field(ge=1, strict=True)]


class PolicySection(Section):
    """What the steward allows, whatever the coordinator asks."""

    modes: tuple[Mode, ...] = Field(default=("constrained",), description="training modes this site takes part in")
    out_of_bounds: Literal["clip", "refuse"] = Field(
        default="clip", description='values outside declared bounds: "clip" (moved to the bound, counted) or "refuse"'
    )
    withheld_columns: tuple[str, ...] = Field(
        default=(), description="columns this site never uses: missing for all its patients; they are not even read"
    )
    min_patients: Annotated[int, Field(ge=1)] = Field(default=20, description="take part only with this many patients")
    min_count: Count = Field(
        default=11,
        description="floor for every count of patients that leaves; the larger of this and min_patients wins",
    )
    max_update_norm: Annotated[float, Field(gt=0)] = Field(
        default=10.0, description="largest update radius C a study may ask for"
    )
    max_epsilon: Epsilon | None = Field(
        default=None,
        description="refuse a study with which all studies of this site together would exceed this epsilon",
    )
    max_epsilon_per_study: Epsilon | None = Field(
        default=None, description="refuse a study that would exceed this epsilon alone"
    )
    max_epsilon_per_year: Epsilon | None = Field(
        default=None,
        description="refuse a study with which it and all studies with a spend in the last 365 days would exceed this",
    )
    max_release_rows: Annotated[int, Field(ge=0, strict=True)] = Field(
        default=0,
        description="most synthetic rows a study may draw through this site's own encoder; 0: no such release",
    )
    evaluation: Literal["none", "accounted", "unnoised"] = Field(
        default="accounted",
        description='evaluations this site answers: "accounted" (noised, in the ledger with an epsilon), "unnoised" as'
        ' well (exact counts under min_count, which no epsilon covers), or "none"',
    )
    anchor: bool = Field(
        default=True,
        strict=True,
        description="answer a study's anchor: noised statistics, in the ledger with an epsilon",
    )
    stop_after_anchor: bool = Field(
        default=False,
        strict=True,
        description="answer no round after an anchor, until the steward has looked at the anchored decoder",
    )
    max_memory_mb: Count | None = Field(
        default=None, description="memory in MiB that a study's table and training may take; default: no limit"
    )
    opening_hours: tuple[str, ...] = Field(
        default=(), description=f"when this site answers, for example {EXAMPLE}; default: always"
    )
    timezone: str | None = Field(default=None, description='of the opening hours, for example "Europe/Berlin"')
    simulation: bool = Field(
        default=False, description="allow seeded randomness and the non-private mode; only where no patient is real"
    )

    @field_validator("withheld_columns")
    @classmethod
    def _names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not all(name.strip() for name in names):
            raise ValueError("a column name is empty")
        return names

    @field_validator("opening_hours")
    @classmethod
    def _hours(cls, hours: tuple[str, ...]) -> tuple[str, ...]:
        for entry in hours:
            parse_hours(entry)
        return hours

    @field_validator("timezone")
    @classmethod
    def _zone(cls, name: str | None) -> str | None:
        if name is not None:
            _zone_of(name)
        return name

    @model_validator(mode="after")
    def _both(self) -> PolicySection:
        if bool(self.opening_hours) != (self.timezone is not None):
            raise ValueError('opening_hours and timezone go together, for example timezone = "Europe/Berlin"')
        return self

    @property
    def least_patients(self) -> int:
        """The smallest number of patients that may leave."""
        return max(self.min_patients, self.min_count)

    def withheld(self, schema: Schema) -> tuple[str, ...]:
        """The columns of `schema` that this site withholds; case is ignored, so that a capital withholds no less."""
        wanted = {name.strip().casefold() for name in self.withheld_columns}
        return tuple(name for name in schema.names if name.strip().casefold() in wanted)

    def open_at(self, moment: datetime) -> bool:
        """Whether the site answers at this moment."""
        return self.timezone is None or is_open(self.opening_hours, moment, _zone_of(self.timezone))

    def objections(self, protocol: Protocol, site: str) -> list[str]:
        """Every reason why this policy forbids the study to the site of this name; empty if it may run."""
        study, found = protocol.study, []
        if study.training.mode not in self.modes:
            found.append(f"mode {study.training.mode!r} is not among the allowed modes {list(self.modes)}")
        if study.training.mode == "none" and not self.simulation:
            found.append("mode 'none' sends unprojected updates and is for simulations only")
        if study.study.seed is not None and not self.simulation:
            found.append("the study fixes a seed; randomness at a hospital comes from the operating system")
        if study.training.update_norm > self.max_update_norm:
            found.append(
                f"update_norm {study.training.update_norm:g} exceeds this site's limit {self.max_update_norm:g}"
            )
        if study.release.method == "channel" and self.max_release_rows == 0:
            found.append("the study releases rows through this site's encoder (channel), max_release_rows allows none")
        if study.anchor.epsilon is not None and not self.anchor:
            found.append(
                "the study begins with an anchor, noised statistics of the patients, and this site answers none"
            )
        method = study.evaluation.method
        if method != "none" and method != self.evaluation != "unnoised":
            found.append(f"the study evaluates the cohort {method}, this site's policy allows {self.evaluation!r}")
        found += self._column_objections(protocol.schema)
        if study.sites and site not in study.sites:
            found.append(f"the study declares its sites and {site!r} is not among them")
        return found

    def _column_objections(self, schema: Schema) -> list[str]:
        withheld = self.withheld(schema)
        found = [
            f"column {name!r} is required by the study and among this site's withheld_columns; it can be withheld only"
            " where a value may be missing"
            for name in withheld
            if schema[name].required
        ]
        if len(withheld) == len(schema.names):
            found.append("every column of the study is among this site's withheld_columns")
        return found


def hint_of_withheld(policy: PolicySection, schema: Schema) -> str:
    """What the log says where a withheld name is not of this study: right in most cases, a slip of the pen in some."""
    known = {name.strip().casefold() for name in schema.names}
    strange: Sequence[str] = [n for n in policy.withheld_columns if n.strip().casefold() not in known]
    return f"withheld_columns names no column of this study: {', '.join(map(repr, strange))}" if strange else ""


def _zone_of(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f'{name!r} is no time zone; write for example "Europe/Berlin" or "UTC"') from None
