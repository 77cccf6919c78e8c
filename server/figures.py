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

# Okabe-Ito colours, told apart by colour-blind readers and in grey.
REAL, SYNTHETIC = "#0072B2", "#D55E00"
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
