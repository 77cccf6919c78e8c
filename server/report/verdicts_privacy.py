"""The first page for the data protection officer, the data steward and the coordinator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.evaluation.results import ALL
from common.privacy.statement import epsilon_in_words, largest_epsilon
from server.report.blocks import Reader, State, Verdict
from server.report.documents import NO_PATIENTS, Documents
from server.report.sections_attacks import LINE, name_of
from server.report.sections_site_attacks import findings, is_counted
from server.report.words import interval, mode_in_words, number, p_value, plural, released_rows, sentence

SITES_NAMED = 6  # that have a line of their own on the first page


def data_protection_officer(documents: Documents) -> Reader:
    """What is claimed, and what was attacked and how it held."""
    statement = documents.statement
    largest = largest_epsilon(statement)
    infinite = isinstance(largest, str)
    sees = dict.fromkeys(f"{entry['adversary']} ({entry['adversary_sees']})" for entry in statement["entries"])
    delta = documents.protocol.study.privacy.delta
    as_if = " as if" if "seed" in statement["randomness"].split() else ""
    claim = Verdict(
        "What is promised",
        "ε is infinite" if infinite else f"ε = {largest:.3g}{as_if}",
        f"{epsilon_in_words(statement)}",
        "no claim" if infinite else "proven",
        "privacy",
        "bad" if infinite else "",
    )
    terms = Verdict(
        "For whom, against whom",
        f"δ = {delta:g}",
        f"Unit: {statement['unit']}. Neighbouring relation: {statement['neighbouring_relation']}. Adversaries:"
        f" {'; '.join(sees)}.",
        "recorded",
        "privacy",
    )
    assumed = Verdict(
        "Under which assumptions",
        plural(len(statement["assumptions"]), "assumption"),
        f"{sentence('; '.join(statement['assumptions']))} Randomness: {statement['randomness']}.",
        "assumed",
        "privacy",
    )
    verdicts = [claim, terms, assumed]
    if statement.get("excludes"):
        verdicts.append(
            Verdict("Not in any ε", "the evaluation", sentence(statement["excludes"]), "recorded", "privacy", "part")
        )
    return Reader(
        "dpo",
        "Data protection officer: what is claimed, what was attacked and how it held",
        (*verdicts, *_attacks(documents), _audit(documents)),
    )


def _attacks(documents: Documents) -> list[Verdict]:
    found, reason = documents.part("attacks")
    if found is None and documents.evaluation is not None:
        # Between hospitals the sites attack their own patients, where the study asks for it.
        counted = documents.evaluation["results"].get(ALL, {}).get("attacks")
        if is_counted(counted):
            return [_counted(counted)]
    if found is None:
        why = f"{sentence(reason)} An attack that was not tried is no result."
        if reason == NO_PATIENTS and documents.evaluation is not None:
            why += " What the sites measured is in their evaluation."
        return [Verdict("What was attacked", "not measured", why, "measured", "attacks", "none")]
    report = found["report"]
    overall = report["overall"]
    if not overall["comparisons"]:
        return [Verdict("What was attacked", "not measured", overall["reading"], "measured", "attacks", "none")]
    leaks = overall["p_value_bonferroni"] < 1 - report["confidence"]
    verdicts = [
        Verdict(
            "All attacks together",
            "a leak was found" if leaks else "no difference found",
            f"{overall['reading']} {overall['comparisons']} comparisons of {report['rows']['train']} training with"
            f" {report['rows']['control']} control patients, p = {p_value(overall['p_value_bonferroni'])}"
            " (Bonferroni).",
            "measured",
            "attacks",
            "bad" if leaks else "",
        )
    ]
    risks = [attack for attack in report["attacks"] if attack["excess"] is not None]
    if risks:
        # By the test of all guesses; singling out has none, since its guesses are not independent of each other.
        worst = min(risks, key=lambda a: (1.0 if a["p_value"] is None else a["p_value"], -a["excess"]["low"]))
        above = sum(attack["excess"]["high"] > LINE for attack in risks)
        clear = worst["excess"]["low"] > 0
        verdicts.append(
            Verdict(
                "Strongest attack",
                f"excess {interval(worst['excess'])}",
                f"{sentence(name_of(worst))[:-1]}: {worst['counts']['successes']} of {worst['counts']['guesses']}"
                " guesses right, on"
                " the"
                f" control {worst['counts']['control_successes']} of {worst['counts']['control_guesses']}. An interval"
                " above 0"
                f" speaks for a leak. {above} of {len(risks)} intervals reach above {LINE}, a convention that proves"
                " nothing.",
                "measured",
                "attacks",
                "bad" if clear else "",
            )
        )
    verdicts += [_membership(report["membership"])] if report["membership"] else []
    copies = [a for a in report["attacks"] if a["counts"]["attack"] == "copies_exact"]
    for attack in copies:
        counts = attack["counts"]
        more = attack["difference"]["low"] > 0
        verdicts.append(
            Verdict(
                "Exact copies",
                f"{counts['successes']} of {counts['guesses']}",
                f"Patients whose record is in the cohort; of the control {counts['control_successes']} of"
                f" {counts['control_guesses']}. A check for copies, no measure of privacy.",
                "measured",
                "attacks",
                "bad" if more else "",
            )
        )
    return verdicts


def _counted(found: Mapping[str, Any]) -> Verdict:
    """The sites' own attacks, all sites together."""
    tried = [each for each in findings(found) if not each.reason]
    if not tried:
        why = "no attack was possible: too few patients or held-out patients"
        return Verdict("What was attacked", "not measured", why, "measured", "sites-evaluation", "none")
    leaks = [each for each in tried if each.leaks]
    listed = "; ".join(f"{each.name}: {each.reached}" for each in (leaks or tried)[:3])
    return Verdict(
        "Attacks at the sites, all together",
        f"{len(leaks)} of {len(tried)} above chance" if leaks else "no difference found",
        f"{sentence(listed)} One interval in forty lies above chance by chance. A failed attack is no evidence of"
        " privacy.",
        "measured",
        "sites-evaluation",
        "bad" if leaks else "",
    )


def _membership(scores: list[Mapping[str, Any]]) -> Verdict:
    best = min(scores, key=lambda one: (one["p_value"], -one["auroc"]["low"]))
    few = next((level for level in best["true_positives"] if level["possible"]), None)
    found = f" Found at {100 * few['level']:g} % false positives: {interval(few['true_positive_rate'])}." if few else ""
    return Verdict(
        "Membership",
        f"AUROC {interval(best['auroc'])}",
        f"The stronger of {len(scores)} attacks that have the cohort only; 0.5 is guessing.{found}",
        "measured",
        "attacks",
        "bad" if best["auroc"]["low"] > 0.5 else "",
    )


def _audit(documents: Documents) -> Verdict:
    found = documents.audit
    if found is None:
        why = "No canary audit was given; no lower bound is known, which is no evidence of privacy."
        return Verdict("Canary audit", "not done", why, "measured", "audit", "none")
    best = max(found.lines, key=lambda line: line.strongest.epsilon)
    refuted = bool(found.refuted)
    claim = "none (ε is infinite)" if isinstance(best.claim, str) else f"ε = {best.claim:.3g}"
    return Verdict(
        "Canary audit",
        f"ε ≥ {number(best.strongest.epsilon, 2)}" + (", claim refuted" if refuted else ""),
        f"The largest lower bound ({best.score}, {best.adversary}) of {found.canaries.number} canaries in a twin of"
        " the study,"
        f" at δ = {found.delta:g}, {found.unit}; the most it could have shown: {number(best.strongest.reachable, 2)};"
        " claim:"
        f" {claim}. No lower bound is evidence of privacy.",
        "measured",
        "audit",
        "bad" if refuted else "",
    )


def data_steward(documents: Documents) -> Reader:
    """What left each site, and what never did."""
    study, exposures, sites = documents.protocol.study, documents.exposures, documents.sites["joined"]
    released = released_rows(documents.statement)
    bounded = documents.bound is not None
    each = f"of Euclidean norm at most {study.training.update_norm:g} each" if bounded else "without any bound"
    rounds = study.training.rounds
    total = f"{rounds} decoder updates"
    if study.anchor.epsilon is not None:
        total = f"two messages of noised statistics{f' and {total}' if rounds else ''}"
    if released:
        total += f" and {sum(released.values())} rows through the stochastic channel"
    by_site = f" Rows by site: {', '.join(f'{name}: {count}' for name, count in released.items())}." if released else ""
    verdicts = [
        Verdict(
            "What left a site",
            f"at most {total}" if documents.consortium is not None else total,
            (f"Updates {each}. " if rounds else "")
            + f"No patient row, no encoder, no loss.{by_site} Mode {mode_in_words(study)}.",
            "recorded",
            "exposure",
        )
    ]
    if len(sites) <= SITES_NAMED:
        verdicts += [
            Verdict(
                name,
                plural(exposures[name]["rounds"], "update") if name in exposures else "none stated",
                f"{site['patients']} patients, weight {number(site['weight'])}."
                + (f" {_evaluated(exposures[name], study.evaluation.method)}" if name in exposures else ""),
                "recorded",
                "exposure",
            )
            for name, site in sites.items()
        ]
    else:
        counts = [exposures[name]["rounds"] for name in sites if name in exposures]
        verdicts.append(
            Verdict(
                f"{len(sites)} sites",
                f"{min(counts, default=0)} to {max(counts, default=0)} updates",
                "One line a site is in the data ledger below.",
                "recorded",
                "exposure",
            )
        )
    if bounded:
        verdicts.append(
            Verdict(
                "Lipschitz certificate",
                f"at most {number(documents.certificate)}",
                f"After every round; the study's bound is {documents.bound:g} (T1). It bounds how fast the decoder's"
                " outputs"
                " change. T2 bounds the influence of a site on the next decoder. Neither is differential privacy.",
                "proven",
                "exposure",
            )
        )
    return Reader("steward", "Data steward: what left each site", tuple(verdicts))


def _evaluated(exposure: Mapping[str, Any], method: str) -> str:
    if "evaluated_in_words" not in exposure:
        return "No answer about patients."
    return "Noised counts of patients." if method == "accounted" else "Un-noised counts of patients, no ε covers them."


def coordinator(documents: Documents) -> Reader:
    """Gates, sites and rounds."""
    sites, study = documents.sites, documents.protocol.study
    missing = sites["not_joined"]
    incomplete = sum(bool(line["dropped"]) for line in documents.rounds)
    left_out = (
        f" Did not take part: {', '.join(f'{name} ({why})' for name, why in missing.items())}." if missing else ""
    )
    joined = Verdict(
        "Sites",
        f"{len(sites['joined'])} of {len(sites['joined']) + len(missing)} took part",
        f"{sum(site['patients'] for site in sites['joined'].values())} patients; at least {study.training.min_sites}"
        " sites"
        f" were needed.{left_out}",
        "recorded",
        "exposure",
        "part" if missing else "",
    )
    rounds = Verdict(
        "Rounds",
        f"{len(documents.rounds)} of {study.training.rounds}",
        "Every site answered every round." if not incomplete else f"In {incomplete} of them a site was missing.",
        "recorded",
        "exposure",
        "part" if incomplete or len(documents.rounds) < study.training.rounds else "",
    )
    return Reader("coordinator", "Coordinator: gates", (*_gates(documents.gates), joined, rounds))


def _gates(document: Mapping[str, Any] | None) -> list[Verdict]:
    if document is None:
        why = "No result of gates was given to this page."
        return [Verdict("Gates", "not run", why, "recorded", "gates", "none")]
    gates = document["gates"]
    failed = [gate for gate in gates if not gate["passed"]]
    state: State = "bad" if failed or not document["passed"] else "good"
    summary = Verdict(
        "Gates",
        f"{len(gates) - len(failed)} of {len(gates)} passed",
        "Every gate must pass; none can make up for another."
        + (" The release was overridden: see the top of this page." if document.get("override") else ""),
        "recorded",
        "gates",
        state,
    )
    return [
        summary,
        *(
            Verdict(
                f"Failed gate: {gate['name']}",
                f"{shown(gate['found'])}; limit {shown(gate['limit'])}",
                shown(gate.get("fix")) or "No fix is named.",
                "recorded",
                "gates",
                "bad",
            )
            for gate in failed
        ),
    ]


def shown(value: Any) -> str:
    """A value of gates.json in words, whatever JSON it is."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case dict():
            return "; ".join(f"{key}: {shown(each)}" for key, each in value.items())
        case list() | tuple():
            return ", ".join(shown(each) for each in value)
        case _:
            return str(value)
