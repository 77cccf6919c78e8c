"""What a report is made of: the documents of a run, as its files hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.study import Protocol
from server.audit_records import Audit
from server.compare_records import Comparison

NOT_THOROUGH = "not measured: this run was evaluated for fidelity and utility only"
NO_PATIENTS = (
    "not possible because no patient was at hand where this page was made: the patients of different hospitals never"
    " meet"
)


@dataclass(frozen=True)
class Documents:
    """One run. `metrics` exists where the coordinator owns the patients (a simulation), `evaluation` where the sites
    compared, `channel` where the sites made the rows. `consortium` is None for a simulation.
    """

    protocol: Protocol
    sites: Mapping[str, Any]
    rounds: Sequence[Mapping[str, Any]]
    statement: Mapping[str, Any]
    rows: int
    metrics: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    channel: Mapping[str, Any] | None = None
    consortium: str | None = None
    gates: Mapping[str, Any] | None = None
    audit: Audit | None = None
    comparison: Comparison | None = None
    again: str = ""  # how a page that is not the one of the release says so

    @property
    def bound(self) -> float | None:
        """The study's Lipschitz bound, if it has one."""
        study = self.protocol.study
        return study.model.decoder_lipschitz if study.training.mode != "none" else None

    @property
    def certificate(self) -> float:
        """The largest certificate of any round."""
        return max(line["certificate"] for line in self.rounds)

    @property
    def exposures(self) -> dict[str, Mapping[str, Any]]:
        """What each site sent, in the statement's words."""
        return {entry["site"]: entry["exposure"] for entry in self.statement["entries"]}

    def part(self, name: str) -> tuple[Mapping[str, Any] | None, str]:
        """A part of metrics.json, and why there is none; the reason of a part that is there in part as well."""
        if self.metrics is None:
            return None, NO_PATIENTS
        found = self.metrics.get(name)
        if found is None:
            return None, NOT_THOROUGH
        reason = str(found.get("reason") or "")
        return (None if reason and len(found) == 1 else found), reason

    def sampled(self, name: str) -> str:
        """Which rows a part of metrics.json looked at, if not at all."""
        cut = (self.metrics or {}).get("sampled", {}).get(name)
        if not cut:
            return ""
        return f"Measured on some of the rows only: {', '.join(f'{rows} of {table}' for table, rows in cut.items())}."
