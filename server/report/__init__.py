"""The report: one self-contained HTML file that a hospital's browser opens without a network, and that prints to A4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common.study import Protocol
from server.audit_records import Audit
from server.report.documents import Documents
from server.report.page import render


def render_report(
    protocol: Protocol,
    sites: Mapping[str, Any],
    rounds: Sequence[Mapping[str, Any]],
    statement: Mapping[str, Any],
    metrics: Mapping[str, Any],
    *,
    evaluation: Mapping[str, Any] | None = None,
    channel: Mapping[str, Any] | None = None,
    gates: Mapping[str, Any] | None = None,
    audit: Mapping[str, Any] | None = None,
) -> str:
    """The report of a simulation, from its documents alone.

    `metrics` is metrics.json, `evaluation` evaluation.json, `channel` release.json, `gates` gates.json and `audit`
    audit.json as `server.audit_records.Audit` dumps it; pydantic's `ValidationError` if it is none.
    """
    return render(
        Documents(
            protocol=protocol,
            sites=sites,
            rounds=rounds,
            statement=statement,
            rows=metrics["rows"]["synthetic"],
            metrics=metrics,
            evaluation=evaluation,
            channel=channel,
            gates=gates,
            audit=None if audit is None else Audit.model_validate(audit),
        )
    )


def render_deployment(
    protocol: Protocol,
    consortium: str,
    sites: Mapping[str, Any],
    rounds: Sequence[Mapping[str, Any]],
    statement: Mapping[str, Any],
    *,
    evaluation: Mapping[str, Any] | None = None,
    channel: Mapping[str, Any] | None = None,
    gates: Mapping[str, Any] | None = None,
    audit: Mapping[str, Any] | None = None,
) -> str:
    """The report of a study between hospitals, with the documents of `render_report`; no patient is at hand."""
    rows = protocol.study.release.rows if channel is None else sum(channel["rows"].values())
    return render(
        Documents(
            protocol=protocol,
            sites=sites,
            rounds=rounds,
            statement=statement,
            rows=rows,
            evaluation=evaluation,
            channel=channel,
            consortium=consortium,
            gates=gates,
            audit=None if audit is None else Audit.model_validate(audit),
        )
    )
