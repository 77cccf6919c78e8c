"""Where the attack gates of a simulation take their numbers from: its attack report (between sites: `gate_sites`).

Rates and intervals are computed anew from the counts, never taken from the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from math import sqrt
from typing import Any

from common.evaluation.attacks.counts import AttackCounts
from common.evaluation.attacks.risk import difference, excess, fisher
from common.evaluation.attacks.scores import LEVELS, ScoreCounts, auroc, true_positives
from server.gates import AttackEvidence, Measured

# The attacks that each gate asks for, by the beginning of their names.
ATTACKS: Mapping[str, str] = {
    "copies": "copies_",
    "singling_out": "singling_out_",
    "linkability": "linkability",
    "inference": "inference",
    "membership": "membership_",
}
HELD_OUT = "run it again with held-out patients, `--test FILE`, or `cohortium release RUN --test FILE`"


def simulated_attacks(metrics: Mapping[str, Any] | None) -> tuple[Mapping[str, Any] | None, str]:
    """The attack report in metrics.json, or None and why there is none."""
    if metrics is None:
        return None, "there is no metrics.json"
    found = metrics.get("attacks")
    if found is None:
        return None, "metrics.json holds no attacks"
    return (found["report"], "") if found.get("report") is not None else (None, str(found.get("reason")))


def attack_evidence(
    gate: str,
    report: Mapping[str, Any] | None,
    *,
    why_missing: str,
    source: str,
    get: str,
    secrets: Sequence[str] = (),
    sampled: Mapping[str, int] | None = None,
) -> AttackEvidence:
    """What the report holds for one gate. `secrets` are those that inference must have tried.

    `sampled` are the tables of which the attacks saw a part only, with the rows they saw.
    """
    if report is None:
        return AttackEvidence((), (why_missing,), source, get)
    prefix, missing = ATTACKS[gate], list[str]()
    seen, control = report["control_rows_in_train"], report["rows"]["control"]
    if 2 * seen >= control:
        missing.append(f"{seen} of {control} control patients are equal to patients who were trained on: no control")
    part = sampled or {}
    if gate == "copies" and "synthetic" in part:
        missing.append(f"copies were looked for in {part['synthetic']} rows of the cohort only")
        get = "release no more rows than the attacks can look at (see `sampled` in metrics.json)"
    elif part:
        source += f"; attacks saw {', '.join(f'{rows} {name} rows' for name, rows in part.items())} only"
    for each in report["not_possible"]:
        if each["attack"].startswith(prefix):
            missing.append(f"{_label(each)}: {each['reason']}")
    counts = [_counts(each["counts"]) for each in report["attacks"] if each["counts"]["attack"].startswith(prefix)]
    measured = [_measured(gate, each) for each in counts]
    if gate == "inference":
        tried = {each.secret for each in counts}
        missing += [f"the secret {name!r} was not attacked" for name in secrets if name not in tried]
    if gate == "membership":
        histograms = [_scores(each["histogram"]) for each in report["membership"]]
        for histogram in histograms:
            rates, unknown = _membership(histogram)
            measured += rates
            missing += unknown
        missing += [] if histograms else ["no membership scores"]
    if gate == "singling_out":
        source += "; intervals treat descriptions as independent and are too narrow"
    return AttackEvidence(tuple(measured), tuple(dict.fromkeys(missing)), source, get)


def _measured(gate: str, counts: AttackCounts) -> Measured:
    """The excess risk of an attack on what can be guessed; the plain difference for copies and membership.

    The excess is undefined where the control always succeeds. Nothing is left to be gained there, and the difference
    says what the numbers leave open.
    """
    plain = difference(counts)
    risk = None if gate in ("copies", "membership") else excess(counts)
    found = plain if risk is None else risk
    return Measured(_label(vars(counts)), found.value, found.high, fisher(counts) if gate == "copies" else None)


def _membership(scores: ScoreCounts) -> tuple[list[Measured], list[str]]:
    """Advantages: 2 AUROC − 1, and the share of members found beyond that of others at each false-positive rate.

    Then the rates that are too small to be seen with this control.
    """
    name = f"{scores.attack} ({scores.setting})"
    area = auroc(scores)
    found, unknown = [Measured(f"{name}, 2 AUROC - 1", 2 * area.value - 1, 2 * area.high - 1)], list[str]()
    for level in LEVELS:
        at = true_positives(scores, level)
        if at.true_positive_rate is None or at.false_positive_rate is None:
            unknown.append(f"{scores.attack}: too few control patients for {level:.0%} false positives")
            continue
        right, wrong = at.true_positive_rate, at.false_positive_rate
        value = right.value - wrong.value
        above = sqrt((right.high - right.value) ** 2 + (wrong.value - wrong.low) ** 2)
        found.append(Measured(f"{name}, at {level:.0%} false positives", value, value + above))
    return found, unknown


def _counts(document: Mapping[str, Any]) -> AttackCounts:
    return AttackCounts(**{f.name: document[f.name] for f in fields(AttackCounts)})


def _scores(document: Mapping[str, Any]) -> ScoreCounts:
    return ScoreCounts(
        document["attack"],
        document["setting"],
        tuple(document["edges"]),
        tuple(document["train"]),
        tuple(document["control"]),
    )


def _label(each: Mapping[str, Any]) -> str:
    about = [text for text in (each.get("secret"), each.get("setting")) if text]
    return each["attack"] + (f" ({', '.join(about)})" if about else "")
