"""Pictures of privacy: attack risks, membership, rounds by site, the certificate, ε by site, the audit's bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from server.report.svg import GREEN, GREY, HATCH, REAL, SYNTHETIC, drawing, figure, quiet, shortened, to_svg

LINE = 0.09  # see `sections_attacks.LINE_EXPLAINED`


def attack_rates(lines: Sequence[tuple[str, Mapping[str, Any]]], name: str, description: str) -> str:
    """Success rates with intervals: training patients, control patients, guesses without the cohort."""
    with drawing():
        drawn = figure(4.6, 0.32 * len(lines) + 0.9)
        axis = drawn.subplots()
        marks = (
            ("main", "training patients", SYNTHETIC, "D", -0.2),
            ("control", "control patients", REAL, "o", 0.0),
            ("baseline", "without the cohort", GREY, "|", 0.2),
        )
        for key, label, colour, marker, shift in marks:
            values = [line[1][key] for line in lines]
            axis.errorbar(
                [v["value"] for v in values],
                np.arange(len(lines)) + shift,
                xerr=[[v["value"] - v["low"] for v in values], [v["high"] - v["value"] for v in values]],
                fmt=marker,
                color=colour,
                markersize=4,
                linewidth=0.8,
                label=label,
            )
        axis.set_yticks(range(len(lines)), [shortened(line[0], 40) for line in lines], fontsize=6.5)
        axis.set_ylim(len(lines) - 0.5, -0.5)
        axis.set_xlim(-0.02, 1.02)
        axis.set_xlabel("success rate, 95 % interval", fontsize=7)
        drawn.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=6.5)
        quiet(axis)
    return to_svg(drawn, name, description)


def excess_risks(lines: Sequence[tuple[str, Mapping[str, Any] | None]], name: str, description: str) -> str:
    """What training patients lose beyond the control, with intervals, beside 0 and the 0.09 line."""
    known = [(k, e) for k, (_, e) in enumerate(lines) if e is not None]
    with drawing():
        drawn = figure(4.6, 0.26 * len(lines) + 1.0)
        axis = drawn.subplots()
        axis.axvline(0, color=GREY, linewidth=0.8)
        axis.axvline(LINE, color=GREEN, linewidth=1.0, linestyle="--", label=f"the {LINE} line")
        axis.errorbar(
            [e["value"] for _, e in known],
            [k for k, _ in known],
            xerr=[[e["value"] - e["low"] for _, e in known], [e["high"] - e["value"] for _, e in known]],
            fmt="D",
            color=SYNTHETIC,
            markersize=4,
            linewidth=0.9,
            label="excess risk",
        )
        axis.set_yticks(range(len(lines)), [shortened(line[0], 40) for line in lines], fontsize=6.5)
        axis.set_ylim(len(lines) - 0.5, -0.5)
        low = min([-0.05, *(e["low"] for _, e in known)])
        high = max([0.15, *(e["high"] for _, e in known)])
        axis.set_xlim(max(low, -1) * 1.05, high * 1.05)
        axis.set_xlabel("excess risk (main − control)/(1 − control), 95 % interval", fontsize=7)
        drawn.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=7)
        quiet(axis)
    return to_svg(drawn, name, description)


def membership(one: Mapping[str, Any], name: str, description: str) -> str:
    """Share of training patients found over the share of control patients called so, with the calibrated thresholds."""
    train, control = (np.array(one["histogram"][side], dtype=float) for side in ("train", "control"))
    found, wrong = (np.append(0.0, np.cumsum(side[::-1]) / max(side.sum(), 1.0)) for side in (train, control))
    with drawing():
        drawn = figure(3.1, 2.9)
        axis = drawn.subplots()
        axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.7, linestyle=":", label="guessing")
        axis.plot(wrong, found, color=SYNTHETIC, linewidth=1.3, label="attack")
        known = [level for level in one["true_positives"] if level["possible"]]
        rates = [level["true_positive_rate"] for level in known]
        axis.errorbar(
            [level["false_positive_rate"]["value"] for level in known],
            [rate["value"] for rate in rates],
            yerr=[[r["value"] - r["low"] for r in rates], [r["high"] - r["value"] for r in rates]],
            fmt="o",
            color=REAL,
            markersize=3.5,
            linewidth=0.9,
            label="at most 1, 5, 10 %",
        )
        axis.set(xlabel="control patients called members", ylabel="training patients found", aspect="equal")
        axis.set(xlim=(-0.01, 1), ylim=(-0.01, 1.01))
        axis.legend(frameon=False, fontsize=7, loc="lower right")
        quiet(axis)
    return to_svg(drawn, name, description)


def rounds_by_site(rounds: Sequence[Mapping[str, Any]], sites: Sequence[str], name: str, description: str) -> str:
    """Which update left which site in which round: a bar where one did, a hatched one where it was missing."""
    with drawing():
        drawn = figure(4.8, 0.2 * len(sites) + 0.9)
        axis = drawn.subplots()
        for height, site in enumerate(sites):
            states = [(line["round"], _state(line, site)) for line in rounds]
            for state, run in groupby(states, key=lambda pair: pair[1]):
                numbers = [number for number, _ in run]
                span = [(numbers[0] - 0.5, numbers[-1] - numbers[0] + 1)]
                if state == "answered":
                    axis.broken_barh(span, (height - 0.3, 0.6), facecolor=REAL, alpha=0.6, linewidth=0)
                elif state == "missing":
                    axis.broken_barh(
                        span, (height - 0.3, 0.6), facecolor="none", edgecolor=SYNTHETIC, hatch=HATCH, linewidth=0.6
                    )
        axis.set_yticks(range(len(sites)), [shortened(site, 28) for site in sites], fontsize=6.5)
        axis.set_ylim(len(sites) - 0.5, -0.5)
        axis.set_xlim(rounds[0]["round"] - 0.6, rounds[-1]["round"] + 0.6)
        axis.set_xlabel("round (filled: an update left; hatched: none was used)", fontsize=7)
        quiet(axis)
    return to_svg(drawn, name, description)


def _state(line: Mapping[str, Any], site: str) -> str:
    if site in line["answered"]:
        return "answered"
    return "missing" if site in line["dropped"] else ""


def certificates(rounds: Sequence[Mapping[str, Any]], bound: float | None, name: str, description: str) -> str:
    """The decoder's Lipschitz certificate after every round, under the study's bound."""
    with drawing():
        drawn = figure(4.8, 2.0)
        axis = drawn.subplots()
        numbers, values = [r["round"] for r in rounds], [r["certificate"] for r in rounds]
        axis.plot(numbers, values, color=REAL, marker="o", markersize=2.5, linewidth=1.0, label="computed")
        if bound is not None:
            axis.axhline(bound, color=SYNTHETIC, linestyle="--", linewidth=1.0, label="bound of the study")
        axis.set(xlabel="round", ylabel="Lipschitz certificate", ylim=(0, None))
        axis.legend(frameon=False, loc="lower right", fontsize=7)
        quiet(axis)
    return to_svg(drawn, name, description)


def epsilons(lines: Sequence[tuple[str, float]], label: str, name: str, description: str) -> str:
    """Finite, unconditional ε by site, of a mode whose every update is covered by it."""
    with drawing():
        drawn = figure(4.6, 0.24 * len(lines) + 0.8)
        axis = drawn.subplots()
        axis.barh(range(len(lines)), [value for _, value in lines], 0.55, color=REAL, alpha=0.6)
        axis.set_yticks(range(len(lines)), [shortened(site, 32) for site, _ in lines], fontsize=6.5)
        axis.set_ylim(len(lines) - 0.5, -0.5)
        axis.set_xlabel(label, fontsize=6.5)
        quiet(axis)
    return to_svg(drawn, name, description)


def audit_bounds(lines: Sequence[tuple[str, float, float, float]], name: str, description: str) -> str:
    """Label, lower bound, the largest it could have been, claim: of a study whose claims are finite."""
    with drawing():
        drawn = figure(4.8, 0.3 * len(lines) + 1.0)
        axis = drawn.subplots()
        places = np.arange(len(lines))
        axis.barh(places, [line[1] for line in lines], 0.5, color=REAL, alpha=0.6, label="lower bound found")
        for values, marker, colour, label in (
            ([line[2] for line in lines], "|", "#1A1A1A", "largest it could have been"),
            ([line[3] for line in lines], "D", SYNTHETIC, "claim"),
        ):
            axis.plot(values, places, marker, color=colour, markersize=9 if marker == "|" else 5, label=label)
        axis.set_yticks(places, [shortened(line[0], 36) for line in lines], fontsize=6.5)
        axis.set_ylim(len(lines) - 0.5, -0.5)
        axis.set_xlim(0, None)
        axis.set_xlabel("ε, one patient, replace-one", fontsize=7)
        drawn.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=6.5)
        quiet(axis)
    return to_svg(drawn, name, description)
