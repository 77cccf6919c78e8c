"""The report's pictures, as SVG that stands inside an HTML page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.encoding.number import from_unit, to_unit
from common.schema import Column
from common.table import Table
from server.compare_figure import FigureData, Panel, label_positions

# Okabe-Ito colours, told apart by colour-blind readers and in grey.
REAL, SYNTHETIC = "#0072B2", "#D55E00"
DPSGD = "#0072B2"
LEVELS = {"constrained": ("#D55E00", "-"), "non-private": ("#009E73", "--"), "real": ("#595959", ":")}
COLUMNS_PER_ROW = 4
BINS = 24


def marginals(synthetic: Table, real: Table) -> str:
    """Small histograms of every column, real beside synthetic; missing values are a bar of their own."""
    return _svg(marginals_figure(synthetic, real, real.schema.columns))


@matplotlib.rc_context({"text.parse_math": False})  # a "$" in a column's name is a dollar
def marginals_figure(synthetic: Table, real: Table, columns: Sequence[Column]) -> Figure:
    """The histograms of some columns."""
    rows = -(-len(columns) // COLUMNS_PER_ROW)
    figure = Figure(figsize=(11, 2.0 * rows), layout="constrained")
    axes = np.atleast_2d(figure.subplots(rows, COLUMNS_PER_ROW)).ravel()
    for axis, column in zip(axes, columns, strict=False):
        _draw_marginal(axis, column, synthetic[column.name], real[column.name])
    for axis in axes[len(columns) :]:
        axis.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
    return figure


def certificates(rounds: Sequence[dict[str, Any]], bound: float | None) -> str:
    """The decoder's Lipschitz certificate after every round, under the study's bound."""
    figure = Figure(figsize=(11, 2.2), layout="constrained")
    axis = figure.subplots()
    axis.plot(
        [r["round"] for r in rounds], [r["certificate"] for r in rounds], color=REAL, marker=".", label="measured"
    )
    if bound is not None:
        axis.axhline(bound, color=SYNTHETIC, linestyle="--", label="bound of the study")
    axis.set(xlabel="round", ylabel="Lipschitz certificate", ylim=(0, None))
    axis.legend(frameon=False, loc="lower right")
    _quiet(axis)
    return _svg(figure)


def utility_against_epsilon(data: FigureData) -> str:
    """dpsgd runs as points over ε with their range over seeds; runs without an ε as labelled levels beside the axis."""
    figure = Figure(figsize=(11, 3.2 * len(data.panels)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(data.panels), sharex=True))
    for axis, panel in zip(axes, data.panels, strict=True):
        _draw_panel(axis, panel)
    axes[-1].set_xlabel(data.axis)
    return _svg(figure)


def _draw_panel(axis: Axes, panel: Panel) -> None:
    values = [point.value for point in panel.points]
    epsilons = [point.epsilon for point in panel.points]
    axis.set_xscale("log")
    axis.set_xlim(min(epsilons, default=1) / 2, max(epsilons, default=1) * 2)
    axis.set_xticks(epsilons, [f"{epsilon:.3g}" for epsilon in epsilons])
    axis.minorticks_off()
    if values:
        means = [value.mean for value in values]
        ranges = [[v.mean - v.low for v in values], [v.high - v.mean for v in values]]
        axis.errorbar(epsilons, means, yerr=ranges, color=DPSGD, marker="o", capsize=4)
        axis.annotate("dpsgd", (epsilons[0], means[0]), (0, 8), textcoords="offset points", color=DPSGD)
    for level in panel.levels:
        colour, style = LEVELS[level.kind]
        axis.axhline(level.value.mean, color=colour, linestyle=style)
        axis.axhspan(level.value.low, level.value.high, color=colour, alpha=0.15, linewidth=0)
    axis.margins(y=0.15)
    # The levels are labelled outside the frame, apart from each other: their values can be almost the same.
    axis.autoscale_view(scalex=False)
    bottom, top = axis.get_ylim()
    heights = label_positions([level.value.mean for level in panel.levels], 0.11 * (top - bottom), (bottom, top))
    for level, height in zip(panel.levels, heights, strict=True):
        axis.annotate(
            f"{level.label} ({level.value.mean:.3f})",
            xy=(1, level.value.mean),
            xytext=(1.03, height),
            xycoords=axis.get_yaxis_transform(),
            textcoords=axis.get_yaxis_transform(),
            va="center",
            fontsize=9,
            color=LEVELS[level.kind][0],
            arrowprops={"arrowstyle": "-", "color": LEVELS[level.kind][0], "linewidth": 0.6},
            annotation_clip=False,
        )
    axis.set_ylabel(panel.heading)
    _quiet(axis)


def _draw_marginal(axis: Axes, column: Column, synthetic: np.ndarray, real: np.ndarray) -> None:
    labels: list[str]
    if column.is_numeric:
        edges = from_unit(np.linspace(-1, 1, BINS + 1), column)
        positions = np.linspace(-1, 1, BINS + 1)[:-1] + 1 / BINS
        shares = [
            np.histogram(to_unit(v[~np.isnan(v)], column), bins=BINS, range=(-1, 1))[0] for v in (real, synthetic)
        ]
        ticks = [0, BINS // 2, BINS - 1]
        labels = [f"{edges[0]:.4g}", f"{edges[BINS // 2]:.4g}", f"{edges[-1]:.4g}"]
    else:
        shares = [np.bincount(v[~np.isnan(v)].astype(int), minlength=len(column.levels)) for v in (real, synthetic)]
        positions = np.arange(len(column.levels), dtype=float)
        ticks = list(range(len(column.levels)))
        labels = [level if len(level) <= 10 else level[:9] + "…" for level in column.levels]
    step = float(positions[1] - positions[0]) if len(positions) > 1 else 1.0
    tick_positions = [float(positions[t]) for t in ticks]
    if column.nullable:
        gone = [int(np.isnan(v).sum()) for v in (real, synthetic)]
        shares = [np.append(s, g) for s, g in zip(shares, gone, strict=True)]
        positions = np.append(positions, positions[-1] + (4 if column.is_numeric else 2) * step)
        tick_positions.append(float(positions[-1]))
        labels.append("missing")
    for share, size, offset, colour, label in (
        (shares[0], len(real), -0.2, REAL, "real"),
        (shares[1], len(synthetic), 0.2, SYNTHETIC, "synthetic"),
    ):
        axis.bar(positions + offset * step, share / size, width=0.4 * step, color=colour, label=label)
    crowded = len(labels) > 4
    axis.set_xticks(
        tick_positions, labels, fontsize=6, rotation=45 if crowded else 0, ha="right" if crowded else "center"
    )
    axis.set_title(column.name + (" (log scale)" if column.scale == "log" else ""), fontsize=8)
    _quiet(axis)
    axis.tick_params(axis="y", labelsize=6)


def _quiet(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)


def _svg(figure: Figure) -> str:
    """The figure as an <svg> element; no date and fixed ids, so that equal inputs give equal reports."""
    with matplotlib.rc_context({"svg.hashsalt": "cohortium", "svg.fonttype": "none", "font.family": "sans-serif"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
