"""Pictures of utility and inference: ROC, calibration, effects, groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from server.report.svg import GREY, REAL, SYNTHETIC, drawing, figure, quiet, shortened, to_svg
from server.report.words import TRAINED

KINDS: dict[str, dict[str, Any]] = {
    "tstr": {"color": SYNTHETIC, "linestyle": "--", "marker": "D"},
    "trtr": {"color": REAL, "linestyle": "-", "marker": "o"},
}


def roc(curves: Mapping[str, Sequence[float]], title: str, name: str, description: str) -> str:
    """Sensitivity over the false-positive rate, by what the model was trained on."""
    with drawing():
        drawn = figure(3.1, 2.9)
        axis = drawn.subplots()
        axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.7, linestyle=":")
        for kind, values in curves.items():
            style = {key: KINDS[kind][key] for key in ("color", "linestyle")}
            axis.plot(np.linspace(0, 1, len(values)), values, label=TRAINED[kind], linewidth=1.3, **style)
        axis.set(xlabel="false-positive rate", ylabel="sensitivity", xlim=(0, 1), ylim=(0, 1.01), aspect="equal")
        axis.set_title(title)
        axis.legend(frameon=False, fontsize=7, loc="lower right")
        quiet(axis)
    return to_svg(drawn, name, description)


def calibration(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], title: str, name: str, description: str, most: float
) -> str:
    """Observed share with its interval over the mean prediction, by training; axes up to `most`."""
    with drawing():
        drawn = figure(3.1, 2.9)
        axis = drawn.subplots()
        axis.plot([0, most], [0, most], color=GREY, linewidth=0.7, linestyle=":")
        for kind, bins in curves.items():
            style = KINDS[kind]
            seen = [one["observed"] for one in bins]
            axis.errorbar(
                [one["predicted"] for one in bins],
                [one["value"] for one in seen],
                yerr=[[o["value"] - o["low"] for o in seen], [o["high"] - o["value"] for o in seen]],
                label=TRAINED[kind],
                markersize=3.5,
                linewidth=0.9,
                elinewidth=0.6,
                **style,
            )
        axis.set(xlabel="predicted risk", ylabel="observed share", xlim=(0, most * 1.04), ylim=(0, most * 1.04))
        axis.set_title(title)
        axis.legend(frameon=False, fontsize=7, loc="upper left")
        quiet(axis)
    return to_svg(drawn, name, description)


def forest(lines: Sequence[tuple[str, Mapping[str, Any], Mapping[str, Any]]], name: str, description: str) -> str:
    """Log odds ratios of terms with intervals: label, in patients, in synthetic rows."""
    with drawing():
        drawn = figure(4.8, 0.27 * len(lines) + 0.9)
        axis = drawn.subplots()
        axis.axvline(0, color=GREY, linewidth=0.7, linestyle=":")
        _intervals(axis, [line[1] for line in lines], -0.15, REAL, "o", "patients")
        _intervals(axis, [line[2] for line in lines], 0.15, SYNTHETIC, "D", "synthetic rows (nominal interval)")
        axis.set_yticks(range(len(lines)), [shortened(line[0], 42) for line in lines], fontsize=6.5)
        axis.set_ylim(len(lines) - 0.5, -0.5)
        axis.set_xlabel("log odds ratio, 95 % interval", fontsize=7)
        drawn.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=7)
        quiet(axis)
    return to_svg(drawn, name, description)


def groups(
    lines: Sequence[tuple[str, Mapping[str, Any] | None, Mapping[str, Any] | None]], name: str, description: str
) -> str:
    """AUROC in groups with intervals: label, trained on patients, trained on synthetic rows."""
    with drawing():
        drawn = figure(4.6, 0.3 * len(lines) + 0.9)
        axis = drawn.subplots()
        axis.axvline(0.5, color=GREY, linewidth=0.7, linestyle=":")
        _intervals(axis, [line[1] for line in lines], -0.15, REAL, "o", TRAINED["trtr"])
        _intervals(axis, [line[2] for line in lines], 0.15, SYNTHETIC, "D", TRAINED["tstr"])
        axis.set_yticks(range(len(lines)), [shortened(line[0], 36) for line in lines], fontsize=6.5)
        axis.set_ylim(len(lines) - 0.5, -0.5)
        axis.set_xlabel("AUROC on held-out patients, 95 % interval", fontsize=7)
        drawn.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=7)
        quiet(axis)
    return to_svg(drawn, name, description)


def distances(
    lines: Sequence[tuple[str, float | None, float | None]], label: str, reference: str, name: str, description: str
) -> str:
    """One distance a line as a dot, and as a bar what `reference` names."""
    with drawing():
        drawn = figure(4.6, 0.24 * len(lines) + 0.9)
        axis = drawn.subplots()
        places = np.arange(len(lines))
        axis.barh(places, [line[2] or 0.0 for line in lines], 0.55, color="#D0D0D0", label=reference)
        known = [(line[1], k) for k, line in enumerate(lines) if line[1] is not None]
        if known:
            axis.plot(*zip(*known, strict=True), "D", color=SYNTHETIC, markersize=4, label="distance")
        axis.set_yticks(places, [shortened(line[0], 32) for line in lines], fontsize=6.5)
        axis.set_ylim(len(lines) - 0.5, -0.5)
        axis.set_xlim(0, None)
        axis.set_xlabel(label, fontsize=7)
        drawn.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=7)
        quiet(axis)
    return to_svg(drawn, name, description)


def observed(shares: Sequence[tuple[int, float]], name: str, description: str) -> str:
    """The observed share in every numbered bin of the predicted risk."""
    with drawing():
        drawn = figure(3.4, 2.2)
        axis = drawn.subplots()
        axis.plot(*zip(*shares, strict=True), color=REAL, marker="o", markersize=3.5, linewidth=0.9)
        axis.set(xlabel="bin of the predicted risk", ylabel="observed share", ylim=(0, 1.02))
        axis.set_xticks([number for number, _ in shares])
        quiet(axis)
    return to_svg(drawn, name, description)


def _intervals(
    axis: Axes, estimates: Sequence[Mapping[str, Any] | None], shift: float, colour: str, marker: str, label: str
) -> None:
    known = [(k, e) for k, e in enumerate(estimates) if e is not None and e["value"] is not None]
    if not known:
        return
    axis.errorbar(
        [e["value"] for _, e in known],
        [k + shift for k, _ in known],
        xerr=[[e["value"] - e["low"] for _, e in known], [e["high"] - e["value"] for _, e in known]],
        fmt=marker,
        color=colour,
        markersize=3.5,
        linewidth=0.9,
        label=label,
    )
