"""The report: one self-contained HTML file that a hospital's browser opens without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from common.privacy.statement import ADVERSARIES, epsilon_in_words
from common.study import Protocol, Study
from common.table import Table
from server.figures import certificates, marginals

MODES = {
    "constrained": "constrained: Lipschitz-bounded networks, updates projected to a fixed norm, {noise}",
    "dpsgd": "dpsgd: gradients clipped per patient and noised (DP-SGD) on Lipschitz-bounded networks",
    "none": "none: the non-private reference, no constraint of any kind",
}


def render_report(
    protocol: Protocol,
    sites: Mapping[str, Any],
    rounds: Sequence[dict[str, Any]],
    statement: Mapping[str, Any],
    metrics: Mapping[str, Any],
    cohort: Table,
    real: Table,
) -> str:
    """The page as HTML. Comparisons with real patients exist only where the caller may look at them (a simulation)."""
    # Column and site names come from files that people write: everything is escaped, except our own SVG.
    environment = Environment(
        loader=PackageLoader("server", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["fixed"] = _fixed
    bound = protocol.study.model.decoder_lipschitz if protocol.study.training.mode != "none" else None
    return environment.get_template("report.html.j2").render(
        study=protocol.study,
        digest=protocol.digest,
        target=protocol.target,
        mode=mode_in_words(protocol.study),
        sites=sites,
        rounds=rounds,
        largest_certificate=max(line["certificate"] for line in rounds),
        bound=bound,
        statement=statement,
        epsilon=epsilon_in_words(statement),
        exposures={entry["site"]: entry for entry in statement["entries"]},
        lines=alike_lines(statement),
        released=released_rows(statement),
        adversaries=ADVERSARIES,
        metrics=metrics,
        columns=protocol.schema.columns,
        rows=len(cohort),
        marginals=marginals(cohort, real),
        certificates=certificates(rounds, bound),
        version=version("cohortium"),
    )


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


def _fixed(value: float | str | None) -> str:
    """Three decimals; words such as "infinity" as they are."""
    if value is None:
        return "not defined"
    return value if isinstance(value, str) else f"{value:.3f}"
