"""The picture of a comparison: utility against ε."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from server.compare_figure import FigureData, Panel, label_positions
from server.report.svg import drawing, figure, quiet, to_svg

# Okabe-Ito colours, told apart by colour-blind readers and in grey.
DPSGD = "#0072B2"
LEVELS = {"constrained": ("#D55E00", "-"), "non-private": ("#009E73", "--"), "real": ("#595959", ":")}


def utility_against_epsilon(data: FigureData) -> str:
    """dpsgd runs as points over ε with their range over seeds; runs without an ε as labelled levels beside the axis."""
    with drawing():
        drawn = figure(8.5, 2.5 * len(data.panels))
        axes = np.atleast_1d(drawn.subplots(len(data.panels), sharex=True))
        for axis, panel in zip(axes, data.panels, strict=True):
            _draw_panel(axis, panel)
        axes[-1].set_xlabel(data.axis)
    return to_svg(drawn, "frontier", data.in_words)


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
    quiet(axis)
