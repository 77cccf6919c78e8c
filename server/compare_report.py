"""What a comparison leaves and shows: compare.json, compare.html, and the last screen."""

from __future__ import annotations

import json
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.table import Table as RichTable

from common.files import write_atomic
from server.compare_figure import epsilon_terms, figure_data
from server.compare_records import METRICS, Comparison, Line, Spread
from server.figures import utility_against_epsilon

JSON_NAME, HTML_NAME = "compare.json", "compare.html"
NO_AXIS = (
    "A run without a finite ε is drawn as a level: it has no place on the ε axis, and its distance to a dpsgd run is"
    " not an exchange rate between privacy and utility. A dpsgd run whose ε is infinite is not drawn."
)


def write_comparison(comparison: Comparison, out: Path) -> None:
    """Write the document and the page, each whole or not at all."""
    write_atomic(out / JSON_NAME, json.dumps(comparison.model_dump(mode="json"), indent=1, allow_nan=False))
    write_atomic(out / HTML_NAME, render_comparison(comparison))


def render_comparison(comparison: Comparison) -> str:
    """The page as HTML that needs no network. Names come from files that people write: everything is escaped."""
    environment = Environment(
        loader=PackageLoader("server", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["spread"] = spread_text
    environment.filters["epsilon"] = epsilon_text
    data = figure_data(comparison)
    return environment.get_template("compare.html.j2").render(
        comparison=comparison,
        metrics=METRICS,
        terms=epsilon_terms(comparison),
        figure=None if data is None else utility_against_epsilon(data),
        figure_in_words="" if data is None else data.in_words,
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


def epsilon_text(line: Line) -> str:
    """The cell of the table; what the number is an ε of stands below it."""
    if line.epsilon is None:
        return "not known"
    return f"{line.epsilon:.3g}" if isinstance(line.epsilon, float) else "no finite ε"


def spread_text(value: Spread | None, finished: int = 1, *, ranges: bool = True) -> str:
    """Mean, and the range over several seeds; how many where a seed has no value."""
    if value is None:
        return "not defined"
    text = f"{value.mean:.3f}" + (f" ({value.low:.3f}-{value.high:.3f})" if ranges and value.count > 1 else "")
    return text + (f", {value.count} of {finished} seeds" if value.count < finished else "")
