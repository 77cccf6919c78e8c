"""Utility, inference and groups: does a conclusion drawn from the cohort hold on patients?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from server.report import figures_outcome
from server.report.blocks import Block, Gallery, Heading, Paragraph, Picture, Section, table
from server.report.documents import Documents
from server.report.words import MODELS, TRAINED, interval, number, p_value, percent, sentence, term

TERMS = 30  # that are drawn
GROUPS = 40  # that are drawn


def utility(documents: Documents) -> Section:
    """AUROC, ROC and calibration of models learned on the cohort, on held-out patients."""
    metrics = documents.metrics
    title = "Utility: does a model learned on the cohort hold on patients?"
    if metrics is None:
        return Section("utility", title, (Paragraph(sentence(documents.part("utility")[1])),))
    if metrics["utility"] is None:
        return Section("utility", title, (Paragraph(f"Utility was not measured: {metrics['utility_reason']}."),))
    tstr, trtr, gap = (metrics["utility"][key] for key in ("tstr", "trtr", "gap"))
    blocks: list[Block] = [
        table(
            f"AUROC for {metrics['target']} on held-out patients",
            ["model", "#trained on synthetic rows", "#trained on patients", "#what the cohort costs"],
            [(words, number(tstr[m]), number(trtr[m]), number(gap[m])) for m, words in MODELS.items()],
        ),
        Paragraph(
            f"Trained on {tstr['train_rows']} synthetic rows or {trtr['train_rows']} patients with a known outcome,"
            " tested"
            f" on {tstr['test_rows']} held-out patients; rows without a known outcome left out:"
            f" {tstr['train_left_out']},"
            f" {trtr['train_left_out']} and {tstr['test_left_out']}."
        ),
    ]
    blocks += [
        Paragraph(f"{TRAINED[k]}: {part['reason']}.") for k, part in (("tstr", tstr), ("trtr", trtr)) if part["reason"]
    ]
    return Section("utility", title, (*blocks, *_curves(documents), *_calibration(documents)))


def _by_model(found: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Mapping[str, Any]]]:
    """Results by (model, level) and then by what the model was trained on."""
    ordered: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for kind in ("trtr", "tstr"):
        for one in found.get(kind, []):
            ordered.setdefault((one["model"], one["level"]), {})[kind] = one
    return ordered


def _curves(documents: Documents) -> list[Block]:
    blocks: list[Block] = [Heading("Sensitivity and false positives")]
    found, reason = documents.part("roc")
    if found is None:
        return [*blocks, Paragraph(sentence(reason))]
    pictures, lines = [], []
    for index, ((model, level), sides) in enumerate(_by_model(found).items()):
        lines += [
            (f"{MODELS[model]}, {level}", TRAINED[kind], interval(one["auroc"]) if one["auroc"] else one["reason"])
            for kind, one in sides.items()
        ]
        drawn = {kind: one["sensitivity"] for kind, one in sides.items() if one["sensitivity"]}
        if drawn:
            title = f"{MODELS[model]}: {level}"
            words = "; ".join(f"{TRAINED[k]}: AUROC {interval(sides[k]['auroc'])}" for k in drawn)
            pictures.append(Picture(figures_outcome.roc(drawn, title, f"roc{index}", f"ROC, {title}. {words}."), title))
    blocks.append(Gallery(tuple(pictures)))
    caption = "AUROC with 95 % intervals (DeLong)"
    return [*blocks, table(caption, ["outcome", "trained on", "#AUROC"], lines)]


def _calibration(documents: Documents) -> list[Block]:
    blocks: list[Block] = [Heading("Calibration: does 20 % mean 20 %?")]
    found, reason = documents.part("calibration")
    if found is None:
        return [*blocks, Paragraph(sentence(reason))]
    pictures, rows, bins = [], [], []
    for index, ((model, level), sides) in enumerate(_by_model(found).items()):
        for kind, one in sides.items():
            rows.append(
                (
                    f"{MODELS[model]}: {level}, {TRAINED[kind]}",
                    interval(one["intercept"], 2) if one["intercept"] else one["reason"],
                    interval(one["slope"], 2),
                    number(one["brier"]),
                    number(one["brier_prevalence"]),
                )
            )
            bins += [
                (
                    f"{MODELS[model]}: {level}, {TRAINED[kind]}",
                    str(b["patients"]),
                    number(b["predicted"]),
                    interval(b["observed"]),
                )
                for b in one["curve"]
            ]
        drawn = {kind: one["curve"] for kind, one in sides.items() if one["curve"]}
        if drawn:
            title = f"{MODELS[model]}: {level}"
            ends = [max(b["predicted"], b["observed"]["high"]) for curve in drawn.values() for b in curve]
            words = "; ".join(f"{TRAINED[k]}: slope {interval(sides[k]['slope'], 2)}" for k in drawn)
            svg = figures_outcome.calibration(
                drawn, title, f"calibration{index}", f"Calibration, {title}. {words}.", min(1.0, max(ends))
            )
            pictures.append(Picture(svg, title))
    blocks.append(
        Paragraph(
            "Right is an intercept of 0 (below: risks too high) and a slope of 1 (below: too extreme). The Brier score"
            " is to"
            " be compared with that of telling everybody the average. Read both trainings side by side: gradient"
            " boosting is"
            " too extreme on patients as well." + (f" {sentence(reason)}" if reason else "")
        )
    )
    return [
        *blocks,
        Gallery(tuple(pictures)),
        table(
            "Calibration on held-out patients, 95 % intervals",
            ["model and training", "#intercept", "#slope", "#Brier", "#Brier of the average"],
            rows,
        ),
        table(
            "Points of the calibration curves",
            ["model and training", "#patients", "#predicted", "#observed"],
            bins,
            folded="Points of the curves in numbers",
        ),
    ]


def inference(documents: Documents) -> Section:
    """Agreement of effects, and how far p-values of the cohort are inflated."""
    title = "Inference: would an analyst conclude the same?"
    if documents.metrics is None:
        return Section("inference", title, (Paragraph(sentence(documents.part("effects")[1])),))
    blocks: list[Block] = []
    found, reason = documents.part("effects")
    if found is None:
        blocks.append(Paragraph(sentence(reason)))
    else:
        for index, level in enumerate(found["levels"]):
            blocks += _effects(level, index, documents)
    blocks.append(Heading("Why p-values of a cohort mislead"))
    found, reason = documents.part("inflation")
    if found is None:
        blocks.append(Paragraph(sentence(reason)))
    else:
        blocks += _inflation(found["levels"])
    return Section("inference", title, tuple(blocks))


def _effects(found: Mapping[str, Any], index: int, documents: Documents) -> list[Block]:
    blocks: list[Block] = [Heading(f"Effects on {documents.protocol.target}: {found['level']}")]
    if found["reason"]:
        return [*blocks, Paragraph(sentence(found["reason"]))]
    effects = found["effects"]

    def strength(effect: Mapping[str, Any]) -> float:
        half = (effect["real"]["high"] - effect["real"]["low"]) / 2
        return -abs(effect["real"]["value"]) / half if half else 0.0

    ordered = sorted(effects, key=strength)
    lines = [(term(e), e["real"], e["synthetic"]) for e in ordered[:TERMS]]
    blocks.append(
        table(
            f"Agreement of {len(effects)} effects",
            ["question", "#answer"],
            [
                (f"clear among patients (the interval excludes 0): of {len(effects)}", str(found["clear"])),
                ("of those, same sign in the cohort", _share(found["same_sign_where_clear"])),
                ("of those, found again: clear on the same side", _share(found["found_again"])),
                ("of the others, clear in the cohort only", _share(found["found_only_synthetic"])),
                (
                    "mean overlap of intervals (1 is equal; two samples of one population: about 0.7)",
                    number(found["overlap"]),
                ),
                ("median difference, in the patients' standard errors", number(found["median_difference"])),
            ],
        )
    )
    blocks.append(
        Picture(
            figures_outcome.forest(lines, f"forest{index}", f"Forest plot of {len(lines)} effects; the table has all."),
            f"Log odds ratios, {found['real_rows']} patients beside {found['synthetic_rows']} synthetic rows"
            + (f"; the {TERMS} strongest of {len(effects)}" if len(effects) > TERMS else ""),
            table(
                "Log odds ratios with nominal 95 % intervals",
                ["effect", "#patients", "#synthetic", "#overlap", "#difference (SE)"],
                [
                    (
                        term(e),
                        interval(e["real"], 2),
                        interval(e["synthetic"], 2),
                        number(e["overlap"], 2),
                        number(e["standardised_difference"], 2),
                    )
                    for e in ordered
                ],
                folded=f"All {len(effects)} effects in numbers",
            ),
        )
    )
    notes = []
    if found["ridge"]:
        notes.append("A small ridge penalty was needed, so that estimates are drawn to 0 and intervals are rough.")
    if found["left_out"]:
        notes.append(_left_out(found["left_out"]))
    notes.append(documents.sampled("effects"))
    return [*blocks, *(Paragraph(note) for note in notes if note)]


def _left_out(terms: Sequence[str]) -> str:
    """Terms that no regression has, by why."""
    by_reason: dict[str, list[str]] = {}
    for text in terms:
        name, _, why = text.rpartition(": ")
        by_reason.setdefault(why, []).append(name)
    return " ".join(f"Left out, {why}: {', '.join(names)}." for why, names in by_reason.items())


def _share(value: float | None) -> str:
    return "no such effect" if value is None else percent(value)


def _count(patients: int | None) -> str:
    return "suppressed" if patients is None else str(patients)


def _inflation(levels: Sequence[Mapping[str, Any]]) -> list[Block]:
    blocks: list[Block] = [
        Paragraph(
            "A cohort may have any number M of rows, but knows only what n patients told: standard errors from M rows"
            " are too"
            " small, at least by √(1 + M/n). Multiply them by it before believing them; it is a lower bound. The other"
            " lines compare effects with those in held-out patients: 1 is what sampling explains, “best” what the best"
            " of"
            " generators would show."
        )
    ]
    rows = []
    for found in levels:
        if found["reason"]:
            blocks.append(Paragraph(f"{found['level']}: {found['reason']}."))
            continue
        for name, key in (("the cohort", "synthetic"), ("the patients it was learned from (control)", "real")):
            one = found[key]
            rows.append(
                (
                    f"{found['level']}: {name}",
                    number(found["at_least"], 2) if key == "synthetic" else "",
                    number(one["value"], 2),
                    number(found["best"], 2) if key == "synthetic" else "1",
                    p_value(one["p_value"]),
                    percent(one["within"]),
                    interval(found["permuted"]) if key == "synthetic" else "",
                )
            )
    if rows:
        blocks.append(
            table(
                "Inflation and null check",
                [
                    "effects of",
                    "#standard errors too small, at least",
                    "#dispersion",
                    "#best",
                    "#p",
                    "#within 1.96 SE",
                    "#rejected after permuting (5 % is right)",
                ],
                rows,
            )
        )
        blocks.append(
            Paragraph(
                "The null check permutes the outcome among synthetic rows: that 5 % of tests then reject shows that"
                " the test"
                " works in these rows, and nothing about the generator."
            )
        )
    return blocks


def groups(documents: Documents) -> Section:
    """The same scores by group, and distances by site."""
    found, reason = documents.part("groups")
    title = "Groups and sites: is the cohort as good for everybody?"
    if found is None:
        return Section("groups", title, (Paragraph(sentence(reason)),))
    lines = found["groups"]
    blocks: list[Block] = [
        Paragraph(
            "Groups with fewer than 11 patients are suppressed, with the next larger one if the number would follow;"
            " that is"
            " disclosure control, not privacy. Where both trainings are worse for a group, the patients' data are. A"
            " synthetic"
            " row has no site: every site is compared with all rows."
        )
    ]
    for index, column in enumerate(dict.fromkeys(line["column"] for line in lines)):
        blocks += _group(column, [line for line in lines if line["column"] == column], index)
    return Section("groups", title, tuple(blocks))


def _group(column: str, lines: Sequence[Mapping[str, Any]], index: int) -> list[Block]:
    caption = f"Distance by {column}: mean total variation over columns, and what chance alone would give"
    blocks: list[Block] = [
        Heading(f"By {column}"),
        Picture(
            figures_outcome.distances(
                [(g["group"], g["distance"], g["chance"]) for g in lines[:GROUPS]],
                "mean total variation over columns",
                "chance alone",
                f"groups{index}",
                f"{caption}; the table has the numbers.",
            ),
            caption,
            table(
                caption,
                [column, "#patients", "#held out", "#synthetic rows", "#distance", "#chance"],
                [
                    (
                        g["group"],
                        _count(g["patients"]),
                        "none" if g["column"] == "site" else _count(g["held_out"]),
                        str(g["synthetic"]),
                        number(g["distance"]) if g["distance"] is not None else g["reason"],
                        number(g["chance"]),
                    )
                    for g in lines
                ],
                folded="Numbers",
            ),
        ),
    ]
    drawn, rows = [], []
    for g in lines:
        by_level: dict[str, dict[str, Mapping[str, Any]]] = {}
        for one in g["utility"]:
            by_level.setdefault(one["level"], {})[one["trained_on"]] = one
            rows.append(
                (
                    f"{g['group']}, {one['level']}, {TRAINED[one['trained_on']]}",
                    interval(one["auroc"]) if one["auroc"] else one["reason"],
                    interval(one["intercept"], 2) if one["intercept"] else "",
                )
            )
        drawn += [
            (f"{g['group']}, {level}", s.get("trtr", {}).get("auroc"), s.get("tstr", {}).get("auroc"))
            for level, s in by_level.items()
        ]
    if rows:
        caption = f"AUROC and calibration in the large of gradient boosting by {column}"
        numbers = table(caption, ["group", "#AUROC", "#intercept"], rows, folded="Numbers")
        if any(a or b for _, a, b in drawn):
            svg = figures_outcome.groups(drawn[:GROUPS], f"fair{index}", f"{caption}; the table has the numbers.")
            blocks.append(Picture(svg, caption, numbers))
        else:
            blocks.append(numbers)
    return blocks
