"""Pictures of fidelity: marginals, correlation maps, patterns of missing values, what gives rows away."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from server.report.svg import (
    GREY,
    HATCH,
    REAL,
    SYNTHETIC,
    drawing,
    figure,
    figure_of,
    one_axis,
    quiet,
    shortened,
    to_svg,
)

LEVELS = 8  # of a category that have bars of their own
LABEL = 16  # letters of a level
NUMBERS = ("number", "integer", "date")
SIZE = (2.5, 1.75)
# Blue for negative, orange for positive, as the rest of the report; white is 0.
DIVERGING = LinearSegmentedColormap.from_list("correlation", [REAL, "#FFFFFF", SYNTHETIC])
SHOWN_NAMES = 36  # features of a map whose names can be read


def marginal(column: Mapping[str, Any], name: str, description: str) -> str:
    """One column: patients as a filled area or plain bars, synthetic rows as a line or hatched bars."""
    left = 0.42
    if column["kind"] not in NUMBERS:
        left = 0.15 + 0.058 * max(len(shortened(line[0], LABEL)) for line in folded_levels(column))
    with drawing():
        axis = one_axis(*SIZE, left=left, bottom=0.25)
        draw_marginal(axis, column)
        return to_svg(figure_of(axis), name, description)


def marginals_figure(columns: Sequence[Mapping[str, Any]], across: int) -> Figure:
    """Several columns in one figure with a legend, for a document that holds one picture."""
    with drawing():
        rows = -(-len(columns) // across)
        drawn = figure(2.75 * across, 2.0 * rows)
        axes = np.atleast_1d(drawn.subplots(rows, across)).ravel()
        for axis, column in zip(axes, columns, strict=False):
            draw_marginal(axis, column)
        for axis in axes[len(columns) :]:
            axis.set_axis_off()
        handles, labels = axes[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
        return drawn


def draw_marginal(axis: Axes, column: Mapping[str, Any]) -> None:
    """The shares of one column as `common.evaluation.marginals` gives them."""
    quiet(axis)
    title = column["column"] + (" (log scale)" if column["scale"] == "log" else "")
    axis.set_title(shortened(title, 34), fontsize=8)
    axis.tick_params(labelsize=6.5)
    if column["kind"] in NUMBERS:
        _draw_number(axis, column)
    else:
        _draw_levels(axis, column)


def _draw_number(axis: Axes, column: Mapping[str, Any]) -> None:
    bins, labels = len(column["real"]), column["labels"]
    edges = np.arange(bins + 1) - (0.5 if len(labels) == bins else 0.0)
    axis.stairs(column["real"], edges, fill=True, color=REAL, alpha=0.45, linewidth=0, label="patients")
    axis.stairs(column["synthetic"], edges, color=SYNTHETIC, linewidth=1.3, label="synthetic rows")
    ticks = [0, (len(labels) - 1) // 2, len(labels) - 1]
    places, names = [float(t) for t in ticks], [labels[t] for t in ticks]
    if column["real_missing"] or column["synthetic_missing"]:
        at, width = bins * 1.12 + 0.5, max(bins / 24, 0.2)
        axis.bar(at - width / 2, column["real_missing"], width, color=REAL, alpha=0.45)
        _hatched(axis.bar(at + width / 2, column["synthetic_missing"], width, fill=False, edgecolor=SYNTHETIC))
        places.append(at)
        names.append("missing")
    axis.set_xticks(places, names)
    # The labels at both ends of the range keep away from their neighbours.
    axis.get_xticklabels()[0].set_horizontalalignment("left")
    axis.get_xticklabels()[2].set_horizontalalignment("right")
    axis.set_ylim(0, None)


def folded_levels(column: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Label, real and synthetic share of the most common levels, of all others together, and of what is missing."""
    lines = list(zip(column["labels"], column["real"], column["synthetic"], strict=True))
    if len(lines) > LEVELS:
        kept = sorted(range(len(lines)), key=lambda k: -max(lines[k][1:]))[: LEVELS - 1]
        others = [line for k, line in enumerate(lines) if k not in kept]
        rest = (f"{len(others)} others", sum(o[1] for o in others), sum(o[2] for o in others))
        lines = [*(lines[k] for k in sorted(kept)), rest]
    if column["real_missing"] or column["synthetic_missing"]:
        lines.append(("missing", column["real_missing"], column["synthetic_missing"]))
    return lines


def _draw_levels(axis: Axes, column: Mapping[str, Any]) -> None:
    lines = folded_levels(column)
    places = np.arange(len(lines))
    axis.barh(places - 0.2, [line[1] for line in lines], 0.4, color=REAL, alpha=0.45, label="patients")
    synthetic = axis.barh(
        places + 0.2, [line[2] for line in lines], 0.4, fill=False, edgecolor=SYNTHETIC, label="synthetic rows"
    )
    _hatched(synthetic)
    axis.set_yticks(places, [shortened(line[0], LABEL) for line in lines])
    axis.invert_yaxis()


def _hatched(bars: Any) -> None:
    for bar in bars:
        bar.set(hatch=HATCH, linewidth=0.8)


def correlation_map(
    matrix: Sequence[Sequence[float]], features: Sequence[str], title: str, name: str, description: str, most: float = 1
) -> str:
    """One square matrix; `most` is the value of the strongest colour."""
    size, named = len(features), len(features) <= SHOWN_NAMES
    with drawing():
        axis = one_axis(3.9, 3.7, left=0.95, bottom=0.95) if named else one_axis(3.2, 2.9, left=0.1, bottom=0.1)
        image = axis.imshow(np.array(matrix), cmap=DIVERGING, vmin=-most, vmax=most, interpolation="none")
        axis.set_title(title)
        labels = [shortened(feature, 22) for feature in features] if named else []
        axis.set_yticks(range(size) if named else [], labels, fontsize=4.5)
        axis.set_xticks(range(size) if named else [], labels, fontsize=4.5, rotation=90)
        axis.tick_params(length=0, pad=1)
        bar = figure_of(axis).colorbar(image, ax=axis, shrink=0.6, ticks=[-most, 0, most])
        bar.ax.tick_params(labelsize=6, width=0.5)
        bar.ax.set_yticklabels([f"−{most:g}", "0", f"{most:g}"])
        return to_svg(figure_of(axis), name, description)


def missing_patterns(patterns: Sequence[Mapping[str, Any]], name: str, description: str) -> str:
    """Rows are the common patterns; a filled square says that the column is missing, bars how often."""
    columns = sorted({column for pattern in patterns for column in pattern["columns"]})
    heights = 0.22 * len(patterns) + 1.1
    with drawing():
        drawn = figure(max(3.6, min(0.2 * len(columns) + 2.4, 5.2)), heights)
        left, right = drawn.subplots(1, 2, sharey=True, width_ratios=[max(len(columns), 4), 7])
        places = np.arange(len(patterns))
        shown = {column: k for k, column in enumerate(columns)}
        dots = [(shown[c], k) for k, pattern in enumerate(patterns) for c in pattern["columns"]]
        empty = set(itertools.product(range(len(columns)), range(len(patterns)))) - set(dots)
        for points, colour, size in ((sorted(empty), "#D0D0D0", 2.0), (sorted(dots), "#1A1A1A", 4.5)):
            if points:
                left.plot(*zip(*points, strict=True), "s", color=colour, markersize=size)
        left.set_xticks(range(len(columns)), [shortened(c, 20) for c in columns], rotation=90, fontsize=6)
        left.set_xlim(-0.6, max(len(columns), 1) - 0.4)
        left.set_yticks([])
        left.spines[:].set_visible(False)
        left.set_title("lacks", fontsize=7)
        right.barh(places - 0.2, [p["real"] for p in patterns], 0.4, color=REAL, alpha=0.45, label="patients")
        _hatched(
            right.barh(
                places + 0.2,
                [p["synthetic"] for p in patterns],
                0.4,
                fill=False,
                edgecolor=SYNTHETIC,
                label="synthetic rows",
            )
        )
        right.set_xlabel("share of rows", fontsize=7)
        right.tick_params(labelsize=6)
        right.invert_yaxis()
        quiet(right)
        drawn.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=7)
    return to_svg(drawn, name, description)


def give_aways(columns: Sequence[Mapping[str, Any]], name: str, description: str) -> str:
    """By how much a classifier's AUROC falls when a column is shuffled, with the standard deviation over folds."""
    with drawing():
        drawn = figure(3.6, 0.2 * len(columns) + 0.7)
        axis = drawn.subplots()
        places = np.arange(len(columns))
        axis.barh(places, [c["drop"] for c in columns], 0.6, color=GREY, alpha=0.6)
        axis.errorbar(
            [c["drop"] for c in columns],
            places,
            xerr=[c["deviation"] for c in columns],
            fmt="none",
            color="#1A1A1A",
            linewidth=0.8,
        )
        axis.set_yticks(places, [shortened(c["column"], 24) for c in columns], fontsize=6.5)
        axis.set_xlabel("fall of the AUROC when the column is shuffled", fontsize=7)
        axis.invert_yaxis()
        quiet(axis)
    return to_svg(drawn, name, description)
