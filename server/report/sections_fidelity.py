"""Fidelity: is the cohort like the patients?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from server.report import figures_fidelity
from server.report.blocks import Block, Gallery, Heading, Note, Paragraph, Picture, Section, table
from server.report.documents import NO_PATIENTS, Documents
from server.report.words import interval, number, percent, sentence

DRAWN = 32  # columns that are drawn
PAIRS_NAMED = 20  # pairs of features that are listed beside the correlation maps


def fidelity(documents: Documents) -> Section:
    """Marginals, pairs, correlations, missing values, detection."""
    if documents.metrics is None:
        blocks: tuple[Block, ...] = (
            Paragraph(
                f"{sentence(NO_PATIENTS)} What the sites counted, if the study has an evaluation, has a part of its"
                " own."
            ),
        )
        return Section("fidelity", "Fidelity: is the cohort like the patients?", blocks)
    metrics = documents.metrics
    return Section(
        "fidelity",
        "Fidelity: is the cohort like the patients?",
        (
            Note(metrics["caution"]),
            *_marginals(metrics),
            *_pairs(documents),
            *_correlations(documents),
            *_missingness(documents),
            *_detection(documents),
        ),
    )


def worst_first(marginals: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Columns by how far their distance is above chance."""
    return sorted(marginals, key=lambda column: column["chance"] - column["distance"])


def _marginals(metrics: Mapping[str, Any]) -> list[Block]:
    fidelity_, columns = metrics["fidelity"], metrics.get("marginals") or []
    ordered = worst_first(columns)
    blocks: list[Block] = [Heading("Columns, patients beside synthetic rows")]
    left_out = len(ordered) - min(len(ordered), DRAWN)
    blocks.append(
        Paragraph(
            "Columns that are farthest above chance come first. Patients are the filled areas and plain bars, synthetic"
            " rows the lines and hatched bars; missing values have a bar of their own."
            + (f" {left_out} columns nearer to chance are not drawn; the table has all." if left_out else "")
        )
    )
    pictures = []
    for index, column in enumerate(ordered[:DRAWN]):
        words = f"distance {number(column['distance'])}, chance {number(column['chance'])}"
        pictures.append(
            Picture(
                figures_fidelity.marginal(column, f"marginal{index}", f"Histogram of {column['column']}: {words}."),
                f"{column['column']}: {words}",
                _bins(column),
            )
        )
    if pictures:
        blocks.append(Gallery(tuple(pictures)))
    by_name = {column["column"]: column for column in ordered}
    names = list(by_name) or list(fidelity_["missingness"])
    kinds = {name: by_name[name]["kind"] if name in by_name else "" for name in names}
    blocks.append(
        table(
            "Distances of every column. KS: largest difference of two distribution functions (numbers). TV: total"
            " variation of the shares (categories). The distance over bins is a total variation with missing as a bin;"
            " chance is what it would be on average if patients and rows were samples of one population.",
            ["column", "kind", "#KS or TV", "#over bins", "#chance", "#missing: difference of rates"],
            [
                (
                    name,
                    kinds[name],
                    number(fidelity_["ks"].get(name, fidelity_["tv"].get(name))),
                    number(by_name[name]["distance"]) if name in by_name else "not measured",
                    number(by_name[name]["chance"]) if name in by_name else "not measured",
                    number(fidelity_["missingness"][name]),
                )
                for name in names
            ],
            folded=f"All {len(names)} columns in numbers",
        )
    )
    if fidelity_["skipped"]:
        blocks.append(Paragraph(f"No known value on at least one side, so no KS: {', '.join(fidelity_['skipped'])}."))
    return blocks


def _bins(column: Mapping[str, Any]) -> Any:
    labels, shares = column["labels"], len(column["real"])
    names = labels if len(labels) == shares else [f"{a} to {b}" for a, b in pairwise(labels)]
    lines = [*zip(names, column["real"], column["synthetic"], strict=True)]
    lines.append(("missing", column["real_missing"], column["synthetic_missing"]))
    return table(
        f"Shares of {column['column']}",
        ["value", "#patients", "#synthetic"],
        [(name, percent(real), percent(synthetic)) for name, real, synthetic in lines],
        folded="Numbers",
        screen_only=True,
    )


def _pairs(documents: Documents) -> list[Block]:
    blocks: list[Block] = [Heading("Pairs of columns")]
    found, reason = documents.part("pairs")
    if found is None or found["mean"] is None:
        return [*blocks, Paragraph(sentence(reason))]
    return [
        *blocks,
        Paragraph(
            f"Over {found['pairs']} pairs of columns the total variation of the two-way tables is"
            f" {number(found['mean'])} on average; chance alone would give {number(found['chance_mean'])}."
        ),
        table(
            "The pairs farthest above chance",
            ["columns", "#distance", "#chance"],
            [(" and ".join(p["columns"]), number(p["value"]), number(p["chance"])) for p in found["worst"]],
        ),
    ]


def _correlations(documents: Documents) -> list[Block]:
    blocks: list[Block] = [Heading("Correlations")]
    found, reason = documents.part("correlations")
    if found is None or not found["features"]:
        return [*blocks, Paragraph(sentence(reason))]
    features, real, synthetic = found["features"], found["real"], found["synthetic"]
    size = range(len(features))
    gap = [[synthetic[i][j] - real[i][j] for j in size] for i in size]
    ordered = sorted(((i, j) for i in size for j in size if i < j), key=lambda pair: -abs(gap[pair[0]][pair[1]]))
    fidelity_ = documents.metrics["fidelity"] if documents.metrics else {}
    widest = max((abs(gap[i][j]) for i, j in ordered), default=1.0)
    scale = next(step for step in (0.1, 0.2, 0.5, 1.0, 2.0) if widest <= step)
    words = f"of {len(features)} features; the table lists the largest differences."
    maps = (
        (real, "patients", 1.0, f"Correlation map of the patients, {words}"),
        (synthetic, "synthetic rows", 1.0, f"Correlation map of the synthetic rows, {words}"),
        (gap, "difference (synthetic − patients)", scale, f"Map of the differences, at most {widest:.2f}, {words}"),
    )
    left = found["left_out"]
    return [
        *blocks,
        Paragraph(
            f"Mean absolute difference over {fidelity_['correlation_pairs']} pairs of features:"
            f" {number(fidelity_['correlation_difference'])}. Orange is positive, blue negative, white none; the third"
            " map"
            f" has a scale of its own. " + (f"{left} features with smaller differences are not shown." if left else "")
        ),
        Gallery(
            tuple(
                Picture(
                    figures_fidelity.correlation_map(matrix, features, title, f"map{k}", description, most),
                    title[0].upper() + title[1:],
                )
                for k, (matrix, title, most, description) in enumerate(maps)
            )
        ),
        table(
            "The largest differences of correlations",
            ["features", "#patients", "#synthetic", "#difference"],
            [
                (
                    f"{features[i]} and {features[j]}",
                    number(real[i][j], 2),
                    number(synthetic[i][j], 2),
                    number(gap[i][j], 2),
                )
                for i, j in ordered[:PAIRS_NAMED]
            ],
            folded="The largest differences in numbers",
        ),
    ]


def _missingness(documents: Documents) -> list[Block]:
    blocks: list[Block] = [Heading("Missing values")]
    found, reason = documents.part("missingness")
    if found is None or found["patterns"] is None:
        return [*blocks, Paragraph(sentence(reason))]
    blocks.append(
        Paragraph(
            f"Which values a row lacks together: total variation {number(found['patterns'])} over the"
            f" {found['cells']} most common patterns; chance alone would give {number(found['patterns_chance'])}."
            f" Two columns are missing together with a frequency that differs by {number(found['together'])} on average"
            f" over {found['pairs']} pairs."
        )
    )
    common = found.get("common") or []
    if common:
        name = {k: ", ".join(p["columns"]) or "nothing" for k, p in enumerate(common)}
        blocks.append(
            Picture(
                figures_fidelity.missing_patterns(
                    common, "patterns", "The most common patterns of missing values, with their shares in both tables."
                ),
                "The most common patterns of missing values and how often they occur",
                table(
                    "Patterns of missing values",
                    ["what the row lacks", "#patients", "#synthetic"],
                    [(name[k], percent(p["real"]), percent(p["synthetic"])) for k, p in enumerate(common)],
                    folded="The patterns in words and numbers",
                ),
            )
        )
    if found["worst"]:
        blocks.append(
            table(
                "Pairs of columns whose values are missing together most differently",
                ["columns", "#difference of shares", "#chance"],
                [(" and ".join(p["columns"]), number(p["value"]), number(p["chance"])) for p in found["worst"]],
                folded="Pairs in numbers",
            )
        )
    return blocks


def _detection(documents: Documents) -> list[Block]:
    blocks: list[Block] = [Heading("Can a classifier tell rows from patients?")]
    found, reason = documents.part("detection")
    if found is None:
        return [*blocks, Paragraph(sentence(reason))]
    blocks.append(
        Paragraph(
            "0.5 is chance, 1 always right. Values as they are show digits too: a laboratory rounds, a model does not."
            " In"
            " bins they do not. 0.5 is no sign of privacy: copies of patients cannot be told from patients either."
            f" {documents.sampled('detection')}"
        )
    )
    seen = [(words, found[key]) for key, words in (("exact", "as they are"), ("binned", "in 12 bins"))]
    blocks.append(
        table(
            "AUROC of “is this row synthetic?” on held-out rows, cross-validated",
            ["values", "#AUROC (95 %)", "#rows of each"],
            [
                (words, sentence(part["reason"]) if part["reason"] else interval(part["auroc"]), str(part["rows"]))
                for words, part in seen
            ],
        )
    )
    drawn = [(words, part["columns"]) for words, part in seen if part["columns"]]
    pictures = []
    for k, (words, columns) in enumerate(drawn):
        caption = f"What gives synthetic rows away, values {words}"
        pictures.append(
            Picture(
                figures_fidelity.give_aways(columns, f"away{k}", f"{caption}; the table has the numbers."),
                caption,
                table(
                    caption,
                    ["column", "#fall of AUROC", "#standard deviation"],
                    [(c["column"], number(c["drop"]), number(c["deviation"])) for c in columns],
                    folded="Numbers",
                ),
            )
        )
    if pictures:
        blocks.append(Gallery(tuple(pictures)))
    return blocks
