"""What was attacked and how it held: the attack suite, and the canary audit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.audit_records import Audit
from server.report import figures_privacy
from server.report.blocks import Block, Bullets, Gallery, Heading, Note, Paragraph, Picture, Section, table
from server.report.documents import Documents
from server.report.words import epsilon, interval, number, p_value, sentence

LINE = figures_privacy.LINE
LINE_EXPLAINED = (
    f"The {LINE} line is 1/11: one patient in a group of eleven. The European Medicines Agency (policy 0070) and Health"
    " Canada name it as the largest acceptable probability of re-identifying a participant in published clinical"
    " documents,"
    " and El Emam, Mosquera and Bass (2020, J Med Internet Res 22:e23139) compare synthetic data with it. It is drawn"
    " because readers ask for it. It is a convention, no law, and it follows from nothing that is measured here: an"
    " excess"
    " below it is no evidence of privacy, and an interval above 0 speaks for a leak wherever it lies."
)
NO_DISTANCE = (
    "Why there is no average distance to the closest record: one copied patient does not move it, and a small one may"
    " be the"
    " truth about a population in which patients resemble each other. Nearness is used here for two things only: to"
    " look for"
    " exact and near copies beside the number that a control gives by chance, and as a score for guessing membership."
)
NAMES = {
    "singling_out_univariate": "singling out, one column",
    "singling_out_multivariate": "singling out, three columns",
    "linkability": "linkability",
    "inference": "inference",
    "membership_distance": "membership by distance",
    "membership_density": "membership by density",
    "copies_exact": "exact copies",
    "copies_in_all_but_one_column": "copies but for one column",
    "copies_near": "near copies",
}


def attacks(documents: Documents) -> Section:
    """The suite on the patients of a simulation, with intervals and the 0.09 line."""
    title = "Attacks: what was attacked and how it held"
    found, reason = documents.part("attacks")
    if found is None:
        where = " The sites' own attacks, where the study asked for them, are in the evaluation by the sites."
        more = where if documents.metrics is None else ""
        return Section("attacks", title, (Paragraph(sentence(reason) + more), Paragraph(NO_DISTANCE)))
    sampled = documents.sampled("attacks")
    blocks: list[Block] = [Note(found["report"]["caution"])]
    if sampled:
        blocks.append(
            Paragraph(f"{sampled} Attacks on a part are weaker: copies among the rows left out are not seen.")
        )
    return Section("attacks", title, (*blocks, *attack_blocks(found["report"], "attack")))


def name_of(attack: Mapping[str, Any]) -> str:
    """An attack with its secret and setting in words."""
    counts = attack["counts"]
    name = NAMES.get(counts["attack"], counts["attack"])
    secret = f" of {counts['secret']}" if counts.get("secret") else ""
    setting = counts.get("setting") or ""
    plain = counts["attack"].startswith(("copies", "singling_out"))
    setting = setting.replace("<=", " ≤ ").replace("tolerance=", "within ").replace("=", " = ")
    return f"{name}{secret}" + (f" ({setting})" if setting and not plain else "")


def attack_blocks(report: Mapping[str, Any], name: str) -> list[Block]:
    """The pictures and tables of one report of the suite; `name` keeps the ids of its pictures apart from others'."""
    overall = report["overall"]
    rows = report["rows"]
    blocks: list[Block] = [
        Note(
            f"{overall['reading']} {overall['comparisons']} comparisons, p ="
            f" {p_value(overall['p_value_bonferroni'])} after Bonferroni's correction.",
            alarm=overall["p_value_bonferroni"] is not None
            and overall["p_value_bonferroni"] < 1 - report["confidence"],
        ),
        Paragraph(
            f"Each attack is run on {rows['train']} patients the cohort was learned from and on {rows['control']}"
            " control"
            " patients who were held out. What it achieves on the control is knowledge about the population; only what"
            " it"
            " achieves beyond that speaks of the patients."
            + (
                f" {report['control_rows_in_train']} control rows also occur in training."
                if report["control_rows_in_train"]
                else ""
            )
        ),
    ]
    lines = [(name_of(attack), attack) for attack in report["attacks"]]
    if lines:
        blocks += _rates(lines, name)
    blocks += _membership(report["membership"], name)
    if report["not_possible"]:
        blocks.append(Heading("What could not be tried"))
        blocks.append(
            Bullets(
                tuple(
                    f"{NAMES.get(each['attack'], each['attack'])}"
                    f"{' of ' + each['secret'] if each.get('secret') else ''}: {each['reason']}"
                    for each in report["not_possible"]
                )
            )
        )
    return [*blocks, Paragraph(NO_DISTANCE)]


def _rates(lines: list[tuple[str, Mapping[str, Any]]], name: str) -> list[Block]:
    return [
        Heading("Attack risks"),
        Gallery(
            (
                Picture(
                    figures_privacy.attack_rates(
                        lines, f"{name}rates", f"Success rates of {len(lines)} attacks with intervals; see the table."
                    ),
                    "Success rates: training patients, control patients, and guesses without the cohort",
                ),
                Picture(
                    figures_privacy.excess_risks(
                        [(label, attack["excess"]) for label, attack in lines],
                        f"{name}excess",
                        f"Excess risks of {len(lines)} attacks with intervals beside 0 and {LINE}; see the table.",
                    ),
                    "Excess risk: of what the control leaves to be gained, the share gained on training patients",
                ),
            )
        ),
        Paragraph(LINE_EXPLAINED),
        table(
            "Attacks, 95 % intervals; p of “training patients are attacked more successfully” (Fisher), none for"
            " singling out",
            ["attack", "#training", "#control", "#without cohort", "#excess", "#difference", "#p"],
            [
                (
                    label,
                    f"{a['counts']['successes']} of {a['counts']['guesses']}",
                    f"{a['counts']['control_successes']} of {a['counts']['control_guesses']}",
                    f"{a['counts']['baseline_successes']} of {a['counts']['baseline_guesses']}",
                    interval(a["excess"]),
                    interval(a["difference"]),
                    p_value(a["p_value"]),
                )
                for label, a in lines
            ],
        ),
        table(
            "How to read each attack",
            ["attack", "reading"],
            [(label, a["reading"]) for label, a in lines],
            folded="How to read each attack",
        ),
    ]


def _membership(scores: list[Mapping[str, Any]], name: str) -> list[Block]:
    if not scores:
        return []
    pictures, rows = [], []
    for index, one in enumerate(scores):
        title = NAMES.get(one["histogram"]["attack"], one["histogram"]["attack"])
        words = f"{title}: AUROC {interval(one['auroc'])}"
        svg = figures_privacy.membership(one, f"{name}member{index}", f"Scores of {words}.")
        pictures.append(Picture(svg, words))
        rows.append(
            (f"{title} ({one['histogram']['setting']})", "AUROC", interval(one["auroc"]), p_value(one["p_value"]))
        )
        for level in one["true_positives"]:
            share = (
                interval(level["true_positive_rate"])
                if level["possible"]
                else "not possible because there are too few control patients"
            )
            rows.append(
                (title, f"found at {100 * level['level']:g} % false positives", share, p_value(level["p_value"]))
            )
    return [
        Heading("Was this patient in the study?"),
        Paragraph(
            "AUROC 0.5 is chance. A leak that concerns few patients hardly moves it: look at the share found at few"
            " false"
            " positives as well."
        ),
        Gallery(tuple(pictures)),
        table("Membership inference", ["attack", "measure", "#value (95 %)", "#p"], rows),
    ]


def audit(documents: Documents) -> Section:
    """Lower bounds of a canary audit beside the claim and the largest value each could have reached."""
    title = "Canary audit: lower bounds beside the claim"
    found = documents.audit
    if found is None:
        why = (
            "No audit was given. The command “cohortium audit” plants canaries in a twin of the study; “cohortium"
            " report"
            " RUN --audit audit.json” prints what it found here."
        )
        return Section("audit", title, (Paragraph(why),))
    refuted = [line for line in found.lines if line.refuted]
    blocks: list[Block] = []
    if refuted:
        which = ", ".join(f"{line.score} ({line.adversary})" for line in refuted)
        blocks.append(
            Note(f"A claim is refuted: the lower bound of {which} exceeds it. Do not use this cohort.", alarm=True)
        )
    blocks.append(
        Paragraph(
            f"{found.canaries.number} canaries were planted at {found.canaries.site} ({found.canaries.patients}"
            " patients,"
            " canaries included) in a twin of the study. A bound says that the mechanism is not (ε,"
            f" {found.delta:g})-DP for"
            f" any smaller ε, for {found.unit}, by {found.neighbouring_relation}; all lines hold together with"
            f" {100 * found.confidence:g} % confidence. “Most” is what the line would say with every guess right: a"
            " bound"
            " near it was stopped by the number of canaries alone. No lower bound is evidence of privacy."
        )
    )
    finite = [
        (f"{line.score} ({line.adversary})", line.strongest.epsilon, line.strongest.reachable, line.claim)
        for line in found.lines
        if not isinstance(line.claim, str)
    ]
    # Without a finite claim there is nothing to draw the bounds beside: such a study has no place on an axis of ε.
    if len(finite) == len(found.lines):
        caption = "Lower bounds, the largest they could have been, and the claim"
        blocks.append(Picture(figures_privacy.audit_bounds(finite, "audit", f"{caption}; see the table."), caption))
    else:
        blocks.append(Paragraph("There is no finite claim to draw the bounds beside; the table has them."))
    blocks += [_audit_table(found), Bullets(tuple(found.cautions))]
    return Section("audit", title, tuple(blocks))


def _audit_table(found: Audit) -> Block:
    return table(
        "What attackers found of the canaries",
        ["attack", "#guesses right", "#ε at least", "#most it could have shown", "#claim", "refuted"],
        [
            (
                f"{line.score} ({line.adversary})",
                f"{line.strongest.correct} of {line.strongest.guesses}",
                number(line.strongest.epsilon, 2),
                number(line.strongest.reachable, 2),
                "none (∞)" if isinstance(line.claim, str) else epsilon(line.claim),
                "yes" if line.refuted else "no",
            )
            for line in found.lines
        ],
    )
