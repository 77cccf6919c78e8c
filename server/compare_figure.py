"""What the figure of a comparison shows, as plain data: dpsgd as points over ε, all else as levels without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from server.compare_records import Comparison, Line, Spread

Kind = Literal["constrained", "non-private", "real"]
UTILITY = {
    "tstr_gradient_boosting": "AUROC, gradient boosting",
    "tstr_logistic_regression": "AUROC, logistic regression",
}
FIDELITY = {"ks": "Kolmogorov-Smirnov (lower is better)", "tv": "total variation (lower is better)"}
NO_FINITE = {
    "constrained": "constrained: no finite ε for the weights",
    "non-private": "non-private reference: no finite ε",
}
NOISED = "constrained with update noise: its ε is in the table"
NO_AXIS = (
    "A run without a finite ε is drawn as a level: it has no place on the ε axis, and its distance to a dpsgd run is"
    " not an exchange rate between privacy and utility. A dpsgd run whose ε is infinite is not drawn."
)


@dataclass(frozen=True)
class Point:
    """A dpsgd line at the ε its accountant states."""

    run: str
    epsilon: float
    value: Spread


@dataclass(frozen=True)
class Level:
    """A run that has no place on the ε axis, or the real rows: a value over the whole width."""

    kind: Kind
    label: str
    value: Spread


@dataclass(frozen=True)
class Panel:
    """One measurement."""

    heading: str
    points: tuple[Point, ...]
    levels: tuple[Level, ...]


@dataclass(frozen=True)
class FigureData:
    """The whole figure. `axis` says what its ε is an ε of, `subject` what is measured."""

    subject: str
    axis: str
    panels: tuple[Panel, ...]

    @property
    def in_words(self) -> str:
        """The same for readers who do not see it."""
        return " ".join(
            (f"{self.subject}.", *map(_panel_in_words, self.panels), f"Axis: {' '.join(self.axis.split())}.")
        )


def figure_data(comparison: Comparison) -> FigureData | None:
    """Utility against ε, or fidelity where no run has a utility; None if no run finished."""
    if not any(line.finished for line in comparison.table):
        return None
    headings = UTILITY if comparison.has_utility else FIDELITY
    return FigureData(
        "Utility of the cohort against ε" if comparison.has_utility else "Fidelity of the cohort against ε",
        _axis(comparison),
        tuple(_panel(comparison, name, heading) for name, heading in headings.items()),
    )


def epsilon_terms(comparison: Comparison) -> str:
    """What every ε here is an ε of: unit, neighbouring relation, δ, adversaries, and "as if" where a seed is used."""
    results = [record.result for record in comparison.runs if record.result is not None]
    # Runs may differ in δ and adversary only where a later version lets them; then each is named.
    as_if = " (as if, because the random numbers come from a seed)" if comparison.seeded else ""
    described = dict.fromkeys(
        f"at δ = {result.privacy.delta:g}{as_if}, against {result.privacy.adversary}, for {result.privacy.unit}, by"
        f" {result.privacy.neighbouring_relation}"
        for result in results
    )
    return "; or ".join(described)


def _axis(comparison: Comparison) -> str:
    results = [record.result for record in comparison.runs if record.result is not None]
    # The adversaries of the points; where there is none, the axis is empty and any run will do.
    privacy = next((r.privacy for r in results if isinstance(r.privacy.epsilon, float)), results[0].privacy)
    as_if = ", as if, because the random numbers come from a seed" if comparison.seeded else ""
    return (
        f"ε of the dpsgd runs (log scale) at δ = {privacy.delta:g}{as_if}:\none patient of any one site, replace-one,"
        f" against {privacy.adversary}"
    )


def _panel(comparison: Comparison, name: str, heading: str) -> Panel:
    points, levels = [], []
    for line in comparison.table:
        value = line.metrics[name]
        if value is None:
            continue
        if line.mode == "dpsgd":
            if isinstance(line.epsilon, float):
                points.append(Point(line.run, line.epsilon, value))
        else:
            levels.append(_level(line, value))
    real = comparison.real.get(name.removeprefix("tstr_"))
    if name in UTILITY and real is not None:
        levels.append(Level("real", "trained on real rows, for scale", real))
    return Panel(heading, tuple(points), tuple(levels))


def _level(line: Line, value: Spread) -> Level:
    kind: Kind = "constrained" if line.mode == "constrained" else "non-private"
    return Level(kind, NOISED if isinstance(line.epsilon, float) else NO_FINITE[kind], value)


def _panel_in_words(panel: Panel) -> str:
    points = [f"{point.run}, value {_value(point.value)}" for point in panel.points]
    levels = [f"{level.label}, value {_value(level.value)}" for level in panel.levels]
    return (
        f"{panel.heading}: points over ε: {'; '.join(points) or 'none'}."
        f" Levels without a place on the ε axis: {'; '.join(levels) or 'none'}."
    )


def _value(value: Spread) -> str:
    return f"{value.mean:.3f}" + (f" ({value.low:.3f} to {value.high:.3f})" if value.count > 1 else "")


def label_positions(values: Sequence[float], gap: float, limits: tuple[float, float]) -> list[float]:
    """Heights for the labels of levels at `values`, at least `gap` apart, inside `limits`, in the order given."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    placed: list[float] = []
    for i in order:
        placed.append(max(values[i], placed[-1] + gap) if placed else values[i])
    ceiling = limits[1]
    for k in reversed(range(len(placed))):  # what stands above the frame moves down, and pushes its neighbours
        placed[k] = min(placed[k], ceiling)
        ceiling = placed[k] - gap
    heights = dict(zip(order, placed, strict=True))
    return [heights[i] for i in range(len(values))]


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
