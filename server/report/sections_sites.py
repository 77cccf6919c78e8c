"""What the sites' own evaluation found: evaluation.json, by site and for all together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common.evaluation.results import ALL
from server.report import figures_fidelity, figures_outcome
from server.report.blocks import Block, Gallery, Heading, Note, Paragraph, Picture, Section, table
from server.report.documents import Documents
from server.report.sections_site_attacks import is_counted, site_attack_blocks
from server.report.words import MODELS, TRAINED, interval, number, percent

DRAWN = 32  # columns that are drawn
NOT_FOUND = "not known: too few counts were shown"


def federated(documents: Documents) -> Section:
    """The evaluation between hospitals; each key of a site's results has a function of its own in `PARTS`."""
    title = "Evaluation by the sites"
    found = documents.evaluation
    if found is None:
        why = "The study asked for none (evaluation.method), so no site compared the cohort with its patients."
        return Section("sites-evaluation", title, (Paragraph(why),))
    results, people = found["results"], found["patients"]
    blocks: list[Block] = [
        Note(found["caution"]),
        Paragraph(
            f"{len(people)} sites compared {found['rows']} rows of the cohort with their patients, in"
            f" {found['tables']} tables"
            + (
                f" of noised counts: ε = {found['epsilon']:g} at δ = {found['delta']:g} for one patient of a site,"
                " replace-one,"
                " against everybody, part of the ε of that site."
                if found["method"] == "accounted"
                else " of exact counts, none under the floor."
            )
            + " Every number has the interval that chance and noise leave; a distance below “chance” says nothing."
        ),
    ]
    dropped = found.get("dropped") or {}
    if dropped:
        why = "; ".join(f"{site}: {reason}" for site, reason in dropped.items())
        blocks.append(Paragraph(f"No answer that could be used: {why}."))
    blocks.append(
        table(
            "Patients behind the numbers",
            ["site", "#patients", "#in training", "#held out"],
            [(site, str(n["everyone"]), str(n["fit"]), str(n["holdout"])) for site, n in people.items()],
        )
    )
    for part in PARTS.values():
        blocks += part(results, documents)
    left_out = found.get("not_measured") or {}
    if left_out:
        why = "; ".join(f"{name.replace('_', ' ')}: {reason}" for name, reason in sorted(left_out.items()))
        blocks.append(Paragraph(f"Not measured: {why}."))
    known = {"marginal_mean", "sites_counted", "marginal_shares", *PARTS}
    further = sorted({key for one in results.values() for key in one} - known)
    if further:
        blocks.append(Paragraph(f"evaluation.json holds more than this page shows: {', '.join(further)}."))
    return Section("sites-evaluation", title, tuple(blocks))


Results = Mapping[str, Mapping[str, Any]]


def _in_order(results: Results) -> list[tuple[str, Mapping[str, Any]]]:
    """All sites together first, then every site."""
    return sorted(results.items(), key=lambda pair: (pair[0] != ALL, pair[0]))


def _marginals(results: Results, documents: Documents) -> list[Block]:
    lines = _in_order(results)
    blocks: list[Block] = [Heading("Distance of columns")]
    means = [(site, one["marginal_mean"], _mean(v["chance"] for v in one["marginals"].values())) for site, one in lines]
    caption = (
        "Mean total variation over columns, by site, and the mean of what chance and noise alone would give (95 %)"
    )
    blocks.append(
        Picture(
            figures_outcome.distances(
                means, "mean total variation over columns", "chance and noise alone", "sitedistance", f"{caption}."
            ),
            caption,
            table(
                caption,
                ["site", "#distance", "#chance and noise"],
                [(site, number(value), number(chance)) for site, value, chance in means],
                folded="Numbers",
            ),
        )
    )
    everywhere = dict(lines).get(ALL)
    if everywhere is None:
        return blocks
    columns = sorted(
        everywhere["marginals"].items(),
        key=lambda pair: (pair[1]["value"] is None, (pair[1]["chance"] or 0.0) - (pair[1]["value"] or 0.0)),
    )
    blocks += _drawn(everywhere, [name for name, _ in columns])
    blocks.append(
        table(
            "Total variation of every column, all sites together, those farthest above chance first",
            ["column", "#distance", "#chance and noise (95 %)", "#patients counted"],
            [
                (
                    name,
                    number(v["value"]) if v["value"] is not None else NOT_FOUND,
                    number(v["chance"]),
                    str(v["patients"]),
                )
                for name, v in columns
            ],
            folded=f"All {len(columns)} columns in numbers",
        )
    )
    return blocks


def _drawn(everywhere: Mapping[str, Any], ordered: Sequence[str]) -> list[Block]:
    """Histograms of the sites' pooled counts, where the document has them."""
    shares: Mapping[str, Any] = everywhere.get("marginal_shares") or {}
    pictures = []
    for index, name in enumerate([name for name in ordered if name in shares][:DRAWN]):
        column = shares[name]
        distance = everywhere["marginals"][name]
        words = f"distance {number(distance['value'])}, chance and noise {number(distance['chance'])}"
        svg = figures_fidelity.marginal(column, f"sitemarginal{index}", f"Histogram of {name}: {words}.")
        pictures.append(Picture(svg, f"{name}: {words}"))
    if not pictures:
        return []
    return [
        Paragraph(
            "Patients (filled areas, plain bars) as the sites counted them, with the noise of the counts where they are"
            " noised, beside the synthetic rows (lines, hatched bars)."
        ),
        Gallery(tuple(pictures)),
    ]


def _pairs(results: Results, documents: Documents) -> list[Block]:
    blocks: list[Block] = []
    for site, one in _in_order(results):
        known = [pair for pair in one["pairs"] if pair["value"] is not None]
        if site == ALL and known:
            known.sort(key=lambda pair: pair["chance"] - pair["value"])
            blocks.append(
                table(
                    f"Two-way tables, all sites together: the pairs farthest above chance of {len(known)}",
                    ["columns", "#distance", "#chance and noise (95 %)"],
                    [(" and ".join(p["columns"]), number(p["value"]), number(p["chance"])) for p in known[:10]],
                    folded="Pairs of columns",
                )
            )
    return [Heading("Pairs of columns"), *(blocks or [Paragraph("No pair was counted, or none was shown.")])]


def _missing(results: Results, documents: Documents) -> list[Block]:
    lines = [(site, one["missing"]) for site, one in _in_order(results) if one["missing"] is not None]
    if not lines:
        return []
    return [
        table(
            "How many values a row lacks: total variation between rows and patients",
            ["site", "#distance", "#chance and noise (95 %)"],
            [(site, number(v["value"]), number(v["chance"])) for site, v in lines],
            folded="Number of missing values",
        )
    ]


def _utility(results: Results, documents: Documents) -> list[Block]:
    blocks: list[Block] = [Heading("Utility on patients who took no part")]
    rows, pictures = [], []
    for site, one in _in_order(results):
        for name, value in one["utility"].items():
            model, _, level = name.partition("/")
            label = _level(documents, level)
            auroc = interval(value) if value["value"] is not None else NOT_FOUND
            gap = interval(value["observed_minus_predicted"])
            rows.append((f"{site}: {MODELS.get(model, model)}, {label}", auroc, gap, str(value["patients"])))
            if site == ALL:
                pictures += _calibrated(value, f"{MODELS.get(model, model)}: {label}", len(pictures))
    if not rows:
        return [*blocks, Paragraph(_why_no_utility(documents))]
    caption = "AUROC of models trained on the cohort, 95 % intervals over chance and noise; 0.5 is chance"
    header = ["site and model", "#AUROC", "#observed minus predicted risk (0 is right)", "#patients"]
    blocks.append(table(caption, header, rows))
    if pictures:
        blocks += [
            Paragraph("Observed share in bins of the predicted risk, all sites together."),
            Gallery(tuple(pictures)),
        ]
    return blocks


def _calibrated(value: Mapping[str, Any], title: str, index: int) -> list[Picture]:
    bins = [(k + 1, line["observed"]) for k, line in enumerate(value["calibration"]) if line["observed"] is not None]
    if not bins:
        return []
    description = f"Observed share of patients with the outcome by bin of the predicted risk, {title}."
    svg = figures_outcome.observed(bins, f"sitecalibration{index}", description)
    numbers = table(
        f"Observed shares, {title}",
        ["bin of the predicted risk, from the lowest", "#patients", "#observed share", "#predicted risk"],
        [
            (f"{k + 1}", number(line["patients"], 1), percent(line["observed"]), percent(line["predicted"]))
            for k, line in enumerate(value["calibration"])
        ],
        folded="Numbers",
    )
    return [Picture(svg, title, numbers)]


def _level(documents: Documents, level: str) -> str:
    target = documents.protocol.target
    levels = documents.protocol.schema[target].levels if target else ()
    return levels[int(level)] if level.isdigit() and int(level) < len(levels) else level


def _why_no_utility(documents: Documents) -> str:
    evaluation = documents.protocol.study.evaluation
    if documents.protocol.target is None:
        return "Not counted, because the schema names no target (cohortium:target)."
    if evaluation.holdout == 0:
        return "Not counted, because no patients were held out (evaluation.holdout is 0)."
    return "Un-noised counts of held-out patients would be hidden under any floor: the sites sent the scores below."


def _groups(results: Results, documents: Documents) -> list[Block]:
    everywhere = dict(_in_order(results)).get(ALL)
    lines = [] if everywhere is None else everywhere["groups"]
    if not lines:
        return []
    caption = "AUROC by group, all sites together, 95 % intervals over chance and noise"
    named = [(f"{g['column']}: {g['group']}, {_level(documents, g['level'])}", g) for g in lines]
    drawn = [(name, None, g) for name, g in named if g["value"] is not None]
    numbers = table(
        caption,
        ["group", "#AUROC", "#patients, as counted"],
        [(name, interval(g) if g["value"] is not None else NOT_FOUND, str(g["patients"])) for name, g in named],
        folded="Numbers",
    )
    if not drawn:
        return [Heading("By group"), numbers]
    return [Heading("By group"), Picture(figures_outcome.groups(drawn, "sitegroups", f"{caption}."), caption, numbers)]


def _scores(results: Results, documents: Documents) -> list[Block]:
    rows = []
    for site, one in _in_order(results):
        for name, value in one.get("scores", {}).items():
            trained, _, rest = name.partition("/")
            if trained not in TRAINED:
                continue  # detection and attacks are read with their intervals above and below
            model, level, score = rest.split("/")
            words = f"{site}: {MODELS.get(model, model)}, {_level(documents, level)}, {TRAINED[trained]}"
            rows.append((words, score, number(value) if value is not None else "not possible there"))
    if not rows:
        return []
    return [table("Scores that the sites sent", ["site, model and training", "score", "#value"], rows)]


def _detection(results: Results, documents: Documents) -> list[Block]:
    rows = [
        (f"{site}, values {'as they are' if seen == 'exact' else 'in bins'}", interval(value), str(value["patients"]))
        for site, one in _in_order(results)
        for seen, value in (one.get("detection") or {}).items()
        if value is not None
    ]
    if not rows:
        return []
    caption = "AUROC of a classifier that tells rows from patients, un-noised; 0.5 is chance"
    return [table(caption, ["site", "#AUROC", "#patients"], rows, folded="Detection")]


def _attacks(results: Results, documents: Documents) -> list[Block]:
    found = [(site, one["attacks"]) for site, one in _in_order(results) if is_counted(one.get("attacks"))]
    return site_attack_blocks(found) if found else []


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


PARTS: Mapping[str, Callable[[Results, Documents], list[Block]]] = {
    "marginals": _marginals,
    "pairs": _pairs,
    "missing": _missing,
    "utility": _utility,
    "groups": _groups,
    "scores": _scores,
    "detection": _detection,
    "attacks": _attacks,
}
