"""The first page for the biostatistician: what survived and what did not, by rules printed beside each line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.evaluation.results import ALL
from server.report.blocks import Reader, State, Verdict
from server.report.documents import Documents
from server.report.sections_fidelity import worst_first
from server.report.words import MODELS, interval, number, percent, plural, sentence

# Conventions of this page, printed with every line that uses them; no theorem stands behind them.
CLOSE = 0.05  # a distance so far above chance is small
KEPT, LOST = 0.02, 0.05  # loss of AUROC
WORDS: Mapping[State, str] = {"good": "survived", "part": "in part", "bad": "did not survive", "none": "not measured"}


def biostatistician(documents: Documents) -> Reader:
    """The lines of a simulation from metrics.json, of a deployment from evaluation.json."""
    verdicts = _of_patients(documents) if documents.metrics is not None else _of_sites(documents)
    return Reader("biostatistician", "Biostatistician: what survived and what did not", tuple(verdicts))


def _of_patients(documents: Documents) -> list[Verdict]:
    metrics = documents.metrics or {}
    return [
        *_marginals(metrics),
        _above_chance(documents, "Pairs of columns", "pairs", "mean", "chance_mean", "two-way tables"),
        _correlations(metrics),
        _above_chance(
            documents,
            "Missing together",
            "missingness",
            "patterns",
            "patterns_chance",
            "the patterns of missing values",
        ),
        _detection(documents),
        _utility(metrics),
        _calibration(documents),
        _effects(documents),
        _p_values(documents),
        _groups(documents),
    ]


def _line(question: str, state: State, found: str, why: str, anchor: str) -> Verdict:
    finding = f"{WORDS[state]}: {found}" if state and found else WORDS.get(state, found)
    return Verdict(question, finding, why, "measured", anchor, state)


def _none(question: str, reason: str, anchor: str) -> Verdict:
    return Verdict(question, WORDS["none"], f"{sentence(reason)}", "measured", anchor, "none")


def _by_gap(value: float, good: float, bad: float) -> State:
    return "good" if value <= good else "part" if value <= bad else "bad"


def _marginals(metrics: Mapping[str, Any]) -> list[Verdict]:
    fidelity = metrics["fidelity"]
    means = (
        f"Mean Kolmogorov-Smirnov distance {number(fidelity['ks_mean'])} (numbers), total variation"
        f" {number(fidelity['tv_mean'])} (categories)"
    )
    columns = worst_first(metrics.get("marginals") or [])
    if not columns:
        return [Verdict("Single columns", means, "0 is equal, 1 is apart.", "measured", "fidelity")]
    far = [column for column in columns if column["distance"] - column["chance"] > CLOSE]
    worst = columns[0]
    state: State = "good" if not far else "part" if len(far) <= len(columns) / 2 else "bad"
    why = (
        f"{means}. A column counts as kept within {CLOSE} of what chance alone gives; worst: {worst['column']},"
        f" {number(worst['distance'])} against {number(worst['chance'])}."
    )
    return [_line("Single columns", state, f"{len(columns) - len(far)} of {len(columns)}", why, "fidelity")]


def _above_chance(documents: Documents, question: str, part: str, value: str, chance: str, what: str) -> Verdict:
    found, reason = documents.part(part)
    if found is None or found[value] is None:
        return _none(question, reason, "fidelity")
    state = _by_gap(found[value] - found[chance], CLOSE, 3 * CLOSE)
    why = (
        f"Total variation of {what}; chance alone gives {number(found[chance])}. Kept within {CLOSE} of it, in part"
        " within"
        f" {3 * CLOSE:g}."
    )
    return _line(question, state, number(found[value]), why, "fidelity")


def _correlations(metrics: Mapping[str, Any]) -> Verdict:
    value = metrics["fidelity"]["correlation_difference"]
    if value is None:
        return _none("Correlations", "not possible because no pair of features varies", "fidelity")
    pairs = metrics["fidelity"]["correlation_pairs"]
    why = f"Mean absolute difference over {pairs} pairs of features. Kept up to {CLOSE}, in part up to {2 * CLOSE:g}."
    return _line("Correlations", _by_gap(value, CLOSE, 2 * CLOSE), number(value), why, "fidelity")


def _detection(documents: Documents) -> Verdict:
    found, reason = documents.part("detection")
    question = "Told from patients?"
    if found is None or found["binned"]["auroc"] is None:
        return _none(question, reason, "fidelity")
    binned, exact = found["binned"]["auroc"], found["exact"]["auroc"]
    state = _by_gap(binned["value"] - 0.5, 0.1, 0.3)
    why = (
        f"AUROC of a classifier that sees values in bins; with all digits {interval(exact)}. 0.5 cannot tell, and is"
        " no sign"
        " of privacy. Kept up to 0.6, in part up to 0.8."
    )
    return _line(question, state, interval(binned), why, "fidelity")


def _utility(metrics: Mapping[str, Any]) -> Verdict:
    utility = metrics["utility"]
    question = f"Prediction of {metrics['target']}" if metrics["target"] else "Prediction"
    if utility is None:
        return _none(question, metrics["utility_reason"], "utility")
    gaps = {name: utility["gap"][name] for name in MODELS if utility["gap"][name] is not None}
    if not gaps:
        reasons = utility["tstr"]["reason"] or utility["trtr"]["reason"]
        return _none(question, reasons, "utility")
    # Both decide: the worse of the two.
    state = _by_gap(max(gaps.values()), KEPT, LOST)
    ours, theirs = (" / ".join(number(utility[kind][name]) for name in gaps) for kind in ("tstr", "trtr"))
    names = " / ".join(MODELS[name] for name in gaps)
    why = (
        f"AUROC ({names}) on {utility['tstr']['test_rows']} held-out patients; trained on patients: {theirs}. Kept if"
        " at"
        f" most {KEPT} is lost, in part up to {LOST}; small tables decide little."
    )
    return _line(question, state, f"AUROC {ours}", why, "utility")


def _calibration(documents: Documents) -> Verdict:
    found, reason = documents.part("calibration")
    question = "Calibration of risks"
    known = [one for one in (found or {}).get("tstr", []) if one["slope"] is not None]
    if not known:
        return _none(question, reason or "no slope could be estimated", "utility")
    right = [one for one in known if one["slope"]["low"] <= 1 <= one["slope"]["high"]]
    state: State = "good" if len(right) == len(known) else "part" if right else "bad"
    found_slopes = " / ".join(number(one["slope"]["value"], 2) for one in known[:2])
    slopes = "; ".join(f"{MODELS[one['model']]} {interval(one['slope'], 2)}" for one in known[:2])
    why = f"Trained on synthetic rows: {slopes}. Kept if the interval holds 1; compare with patients below."
    return _line(question, state, f"slope {found_slopes}", why, "utility")


def _effects(documents: Documents) -> Verdict:
    found, reason = documents.part("effects")
    question = "Effects"
    levels = [one for one in (found or {}).get("levels", []) if not one["reason"]]
    if not levels:
        why = reason or next((one["reason"] for one in (found or {}).get("levels", [])), "no target")
        return _none(question, why, "inference")
    clear = sum(one["clear"] for one in levels)
    again = sum(round((one["found_again"] or 0.0) * one["clear"]) for one in levels)
    if not clear:
        return _none(question, "no effect is clear among the patients", "inference")
    state: State = "good" if again == clear else "part" if again >= clear / 2 else "bad"
    only = [one["found_only_synthetic"] for one in levels if one["found_only_synthetic"] is not None]
    why = "Effects whose interval excludes 0 among patients, found on the same side in the cohort; kept if all are." + (
        f" Of the others {percent(max(only))} are clear in the cohort only: see p-values." if only else ""
    )
    return _line(question, state, f"{again} of {clear} found again", why, "inference")


def _p_values(documents: Documents) -> Verdict:
    found, reason = documents.part("inflation")
    question = "P-values and intervals"
    known = [one for one in (found or {}).get("levels", []) if one["at_least"] is not None]
    if not known:
        return _none(question, reason or "no regression was possible", "inference")
    worst = max(one["at_least"] for one in known)
    why = (
        "√(1 + M/n): standard errors of M synthetic rows from n patients are too small by this factor at least, with"
        " the best"
        " of generators. Do not report a p-value of the cohort."
    )
    return Verdict(
        question, f"did not survive: {number(worst, 2)} times too small, at least", why, "proven", "inference", "bad"
    )


def _groups(documents: Documents) -> Verdict:
    found, reason = documents.part("groups")
    known = [g for g in (found or {}).get("groups", []) if g["distance"] is not None]
    if not known:
        return _none("Groups and sites", reason or "every group is suppressed", "groups")
    worst = max(known, key=lambda g: g["distance"] - g["chance"])
    far = [g for g in known if g["distance"] - g["chance"] > CLOSE]
    state: State = "good" if not far else "part" if len(far) <= len(known) / 2 else "bad"
    why = (
        f"Groups within {CLOSE} of what chance alone gives; worst: {worst['column']} {worst['group']},"
        f" {number(worst['distance'])} against {number(worst['chance'])}."
    )
    return _line("Groups and sites", state, f"{len(known) - len(far)} of {len(known)}", why, "groups")


def _of_sites(documents: Documents) -> list[Verdict]:
    evaluation = documents.evaluation
    if evaluation is None:
        why = "No patient was at hand, and the study asked no site to compare; confirm every finding on real patients."
        return [Verdict("Everything", WORDS["none"], why, "measured", "sites-evaluation", "none")]
    found = evaluation["results"].get(ALL, {})
    anchor = "sites-evaluation"
    verdicts = []
    columns = [v for v in found.get("marginals", {}).values() if v["value"] is not None]
    if columns:
        far = [v for v in columns if v["value"] - v["chance"] > CLOSE]
        state: State = "good" if not far else "part" if len(far) <= len(columns) / 2 else "bad"
        why = (
            f"Mean total variation {number(found['marginal_mean'])} over columns of the sites' counts. A column counts"
            " as kept"
            f" within {CLOSE} of what chance and noise alone give."
        )
        verdicts.append(_line("Single columns", state, f"{len(columns) - len(far)} of {len(columns)}", why, anchor))
    else:
        verdicts.append(_none("Single columns", "no count of the sites was shown", anchor))
    aurocs = [(name, v) for name, v in found.get("utility", {}).items() if v["value"] is not None]
    for name, value in aurocs[:2]:
        model = MODELS.get(name.partition("/")[0], name)
        why = (
            f"AUROC on held-out patients of the sites, {model} trained on the cohort, with the interval of chance and"
            " noise;"
            " 0.5 is chance, and there is no model trained on all patients to compare with."
        )
        verdicts.append(Verdict(f"Prediction of {evaluation['target']}", interval(value), why, "measured", anchor))
    if not aurocs:
        why = "no held-out patients were counted; scores that sites sent, if any, are in the evaluation by the sites"
        verdicts.append(_none("Prediction", why, anchor))
    shown = f"{plural(len(evaluation['patients']), 'site')}"
    why = f"{evaluation['caution']} Effects, inflation and detection need patients and rows in one place."
    verdicts.append(Verdict("Who compared", shown, why, "recorded", anchor))
    return verdicts
