"""What a comparison leaves and shows: compare.json, compare.html, and the last screen."""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table as RichTable

from common.files import write_atomic
from server.compare_figure import NO_AXIS, epsilon_terms, epsilon_text, figure_data, spread_text
from server.compare_records import METRICS, Comparison
from server.report.environment import environment
from server.report.figures_frontier import utility_against_epsilon

JSON_NAME, HTML_NAME = "compare.json", "compare.html"


def write_comparison(comparison: Comparison, out: Path) -> None:
    """Write the document and the page, each whole or not at all."""
    write_atomic(out / JSON_NAME, json.dumps(comparison.model_dump(mode="json"), indent=1, allow_nan=False))
    write_atomic(out / HTML_NAME, render_comparison(comparison))


def render_comparison(comparison: Comparison) -> str:
    """The page as HTML that needs no network. Names come from files that people write: everything is escaped."""
    templates = environment()
    templates.filters["spread"] = spread_text
    templates.filters["epsilon"] = epsilon_text
    data = figure_data(comparison)
    return templates.get_template("compare.html.j2").render(
        comparison=comparison,
        metrics=METRICS,
        terms=epsilon_terms(comparison),
        figure=None if data is None else utility_against_epsilon(data),
        no_axis=NO_AXIS,
    )


def comparison_table(comparison: Comparison) -> RichTable:
    """The last screen: the table of the page, without the exposure, which `comparison_notes` has."""
    table = RichTable(title=f"{comparison.study}: utility and formal privacy")
    table.add_column("run", style="bold", no_wrap=True)
    table.add_column("ε", no_wrap=True)
    shown = [name for name in METRICS if any(line.metrics[name] for line in comparison.table)]
    for name in shown:
        table.add_column(METRICS[name], justify="right")
    table.add_column("s", justify="right")
    for line in comparison.table:
        if not line.finished:
            table.add_row(line.run, "failed", *["" for _ in shown], "")
            continue
        seconds = "" if line.seconds is None else f"{line.seconds.mean:.0f}"
        some = f" ({line.finished} of {line.runs} seeds)" if line.finished < line.runs else ""
        # Ranges would not fit a terminal of 80 columns; the page has them.
        cells = [spread_text(line.metrics[name], line.finished, ranges=False) for name in shown]
        table.add_row(line.run + some, epsilon_text(line), *cells, seconds)
    return table


def comparison_notes(comparison: Comparison, out: Path) -> str:
    """What must stand below the table: what ε means, exposures, failures, notes and where the files are."""
    terms = epsilon_terms(comparison)
    parts = [f"Every ε is the largest over sites, {terms}."] if terms else []
    if len(comparison.seeds) > 1:
        parts.insert(0, f"Means over {len(comparison.seeds)} seeds; {HTML_NAME} has the ranges.")
    parts += [f"{line.run}: {line.exposure}." for line in comparison.table if line.exposure and line.mode != "dpsgd"]
    parts += [f"{line.run} failed: {reason}" for line in comparison.table for reason in line.failed]
    if comparison.utility_reason:
        parts.append(f"Utility is not complete: {comparison.utility_reason}.")
    parts += [*comparison.notes, comparison.caution]
    parts += ["", f"{out / HTML_NAME}", f"{out / JSON_NAME}", f"{out / 'runs'} (every run with its own report)"]
    return "\n".join(parts)
