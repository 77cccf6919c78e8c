"""Attacks that the sites counted on their own patients: `common.evaluation.attack_results`, by site and together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from server.report.blocks import Block, Heading, Note, Paragraph, table
from server.report.words import interval, number, percent

FORM = {"membership", "copies", "linkability", "inference"}
SCORES: Mapping[str, str] = {
    "density": "membership, density ratio",
    "distance": "membership, distance to the nearest row",
}
KINDS: Mapping[str, str] = {"exact": "exact copies", "near": "near copies"}


@dataclass(frozen=True)
class Found:
    """One attack: what it reached, what chance gives, and whether its interval lies above chance."""

    name: str
    reached: str
    chance: str
    people: str
    leaks: bool
    reason: str = ""


def is_counted(found: Any) -> bool:
    """Whether it has the form of `common.evaluation.attack_results`."""
    return isinstance(found, Mapping) and set(found) >= FORM


def findings(found: Mapping[str, Any]) -> Iterator[Found]:
    """Every attack of one site, or of all together."""
    for score, entry in found["membership"].items():
        yield from _membership(SCORES.get(score, str(score)), entry)
    for kind, entry in found["copies"].items():
        yield _rate(KINDS.get(kind, str(kind)), entry)
    if found["linkability"] is not None:
        yield _rate("linking the two halves of a record", found["linkability"])
    for secret, entry in found["inference"].items():
        yield _rate(f"guessing {secret}", entry, f"; by a guess from the schema alone {percent(entry['blind'])}")


def site_attack_blocks(lines: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Block]:
    """Notes and tables for sites with their results, all sites together first."""
    rows, leaks, impossible = [], list[str](), list[str]()
    for site, found in lines:
        for each in findings(found):
            if each.reason:
                impossible.append(f"{site}, {each.name}: {each.reason}")
                continue
            rows.append((f"{site}: {each.name}", each.reached, each.chance, each.people))
            if each.leaks:
                leaks.append(f"{site}, {each.name}")
    blocks: list[Block] = [Heading("Attacks on the sites' own patients")]
    if leaks:
        blocks.append(
            Note(f"Above chance: {'; '.join(leaks)}. By chance alone one interval in forty lies above it.", alarm=True)
        )
    blocks.append(
        Paragraph(
            "Each attack has the cohort only. It is counted on patients who took part and on held-out ones, its"
            " control; what it reaches beyond the control speaks of the patients. Intervals are 95 % over chance and"
            " noise. A failed attack is no evidence of privacy."
        )
    )
    if rows:
        header = ["site and attack", "#reached, or difference to the control", "#chance", "#took part, held out"]
        blocks.append(table("Attacks by site", header, rows))
    if impossible:
        blocks.append(Paragraph(f"Not possible: {'; '.join(impossible)}."))
    return blocks


def _membership(name: str, entry: Mapping[str, Any]) -> Iterator[Found]:
    if entry["reason"]:
        yield Found(name, "", "", "", False, entry["reason"])
        return
    rate = entry["true_positive_rate"]
    at = f"{name}, found at {percent(rate['false_positive_rate'])} false positives"
    for label, value in ((f"{name}, AUROC", entry["auroc"]), (at, rate)):
        yield Found(label, interval(value), _chance(value), _people(entry), value["low"] > value["chance"])


def _rate(name: str, entry: Mapping[str, Any], more: str = "") -> Found:
    if entry["reason"]:
        return Found(name, "", "", "", False, entry["reason"])
    difference = entry["difference"]
    reached = (
        f"{interval(difference)}: {percent(entry['fit']['value'])} against {percent(entry['holdout']['value'])}{more}"
    )
    leaks = difference["low"] > difference["chance"]
    return Found(f"{name}, share of patients", reached, _chance(difference), _people(entry), leaks)


def _chance(value: Mapping[str, Any]) -> str:
    if value["chance_low"] is None or value["chance_high"] is None:
        return number(value["chance"])
    return f"{number(value['chance'])} ({number(value['chance_low'])} to {number(value['chance_high'])})"


def _people(entry: Mapping[str, Any]) -> str:
    return f"{entry['patients']}, {entry['control']}"
