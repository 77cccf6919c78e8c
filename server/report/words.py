"""Numbers and recurring words of the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.study import Study

MODES = {
    "constrained": "constrained: Lipschitz-bounded networks, updates projected to a fixed norm, {noise}",
    "dpsgd": "dpsgd: gradients clipped per patient and noised (DP-SGD) on Lipschitz-bounded networks",
    "anchored": "anchored: noised statistics of every site once, and a generator made of them alone",
    "none": "none: the non-private reference, no constraint of any kind",
}
MODELS = {"gradient_boosting": "gradient boosting", "logistic_regression": "logistic regression"}
TRAINED = {"tstr": "trained on synthetic rows", "trtr": "trained on patients"}


def number(value: float | str | None, digits: int = 3) -> str:
    """A number with `digits` decimals; words such as "infinity" as they are."""
    if value is None:
        return "not defined"
    return value if isinstance(value, str) else f"{value:.{digits}f}".replace("-", "−")


def interval(estimate: Mapping[str, Any] | None, digits: int = 3) -> str:
    """A value with its interval."""
    if estimate is None or estimate["value"] is None:
        return "not defined"
    value = number(estimate["value"], digits)
    if estimate.get("low") is None or estimate.get("high") is None:
        return value
    return f"{value} ({number(estimate['low'], digits)} to {number(estimate['high'], digits)})"


def percent(share: float | None) -> str:
    """A share in per cent."""
    return "not defined" if share is None else f"{100 * share:.1f} %"


def p_value(value: float | None) -> str:
    """A p-value; a very small one as a bound."""
    if value is None:
        return "none"
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def epsilon(value: float | str) -> str:
    """An ε in a cell; what it is an ε of stands beside the table."""
    return "∞" if isinstance(value, str) else f"{value:.3f}"


def plural(count: int, one: str, many: str = "") -> str:
    """A count with its noun."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def term(effect: Mapping[str, Any]) -> str:
    """The name of a coefficient."""
    named = effect["term"]
    if named["level"] is None:
        return f"{named['column']} (per SD)"
    return f"{named['column']}: {named['level']} against {named['reference']}"


def mode_in_words(study: Study) -> str:
    """The study's mode, and the noise of its updates where the mode allows any."""
    multiplier = study.privacy.update_noise
    noise = f"with Gaussian noise of {multiplier:g} times that norm" if multiplier > 0 else "no noise"
    return MODES[study.training.mode].format(noise=noise)


def alike_lines(statement: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every line with its site and the adversaries against whom it holds alike; none where each site has only one."""
    if all(len(entry["lines"]) == 1 for entry in statement["entries"]):
        return []
    found: list[dict[str, Any]] = []
    for entry in statement["entries"]:
        for line in entry["lines"]:
            alike = next((row for row in found if (row["site"], row["line"]) == (entry["site"], line)), None)
            if alike is None:
                found.append({"site": entry["site"], "line": line, "adversaries": [entry["adversary"]]})
            else:
                alike["adversaries"].append(entry["adversary"])
    return sorted(found, key=lambda row: row["site"])


def released_rows(statement: Mapping[str, Any]) -> dict[str, int]:
    """Rows that left through the stochastic channel, by site."""
    rows = {entry["site"]: entry["exposure"].get("released_rows", 0) for entry in statement["entries"]}
    return {site: count for site, count in rows.items() if count}


def sentence(reason: str) -> str:
    """A reason as a sentence."""
    return f"{reason[0].upper()}{reason[1:]}." if reason else "Not measured."
