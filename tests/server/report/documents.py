"""Small runs with everything a report can hold, made by the product's own code, for the tests of the report."""

from __future__ import annotations

import functools
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np

from common.evaluation.metrics import evaluate
from common.evaluation.plan import count_plan, score_names
from common.evaluation.results import evaluation_results
from common.evaluation.tabulate import tabulate
from common.privacy.evaluation_release import evaluation_spend
from common.privacy.events import BoundedInfluence, Event
from common.privacy.statement import privacy_statement
from common.schema import parse_schema
from common.study import Protocol, Study
from common.table import Table
from server.report.documents import Documents
from tests.common.evaluation.evaluated import SCHEMA, evaluated_protocol, patients

SITES = {"anna": 220, "berta": 180}
ROUNDS = 3


@functools.cache
def simulation(method: str = "accounted") -> Documents:
    """A constrained run of two sites with all of metrics.json and, unless `method` is "none", evaluation.json."""
    if method == "none":
        protocol = Protocol(Study.model_validate({"study": {"name": "s", "schema": "s.json"}}), SCHEMA)
    else:
        protocol = evaluated_protocol(method=method, groups=["sex"] if method == "accounted" else [])
    cohort, real, test = patients(300, 1), patients(sum(SITES.values()), 2), patients(250, 3)
    sites = [site for site, rows in SITES.items() for _ in range(rows)]
    metrics = evaluate(cohort, real, test, 0, target="died", groups=["sex"], sites=sites)
    return of_parts(protocol, metrics, None if method == "none" else evaluation(protocol, cohort, real))


def deployment(method: str = "accounted") -> Documents:
    """The same study between hospitals: no patient is at hand."""
    found = simulation(method)
    return replace(found, metrics=None, consortium="Consortium of B", rows=300)


def of_parts(protocol: Protocol, metrics: Any, evaluated: Any = None, sites: dict[str, int] | None = None) -> Documents:
    """Documents of a run of which one site missed a round."""
    declared = SITES if sites is None else sites
    total = sum(declared.values())
    last = list(declared)[-1]
    rounds = [
        {
            "round": number,
            "answered": [site for site in declared if number != 2 or site != last],
            "dropped": {last: "time-out"} if number == 2 else {},
            "certificate": 11.0 + number / 10,
            "step_norm": 0.1,
            "seconds": 1.0,
            "server_seconds": 0.1,
        }
        for number in range(1, ROUNDS + 1)
    ]
    events: dict[str, list[Event]] = {
        site: [BoundedInfluence(number, 1.0, n / total) for number in range(1, ROUNDS + 1)]
        for site, n in declared.items()
    }
    if protocol.study.evaluation.method != "none":
        event = evaluation_spend(protocol)
        events = {site: [*found, event] for site, found in events.items()}
    return Documents(
        protocol=protocol,
        sites={
            "joined": {site: {"patients": n, "weight": n / total} for site, n in declared.items()},
            "not_joined": {"dora": "denied"},
        },
        rounds=rounds,
        statement=privacy_statement(protocol, events, declared),
        rows=metrics["rows"]["synthetic"],
        metrics=metrics,
        evaluation=evaluated,
    )


def evaluation(protocol: Protocol, cohort: Table, real: Table) -> dict[str, Any]:
    """evaluation.json of sites that answered exactly: no noise, so that shares can be checked."""
    answers, start = {}, 0
    for site, rows in SITES.items():
        table = Table(SCHEMA, real.values[start : start + rows])
        parts: Any = {"everyone": table, "fit": Table(SCHEMA, table.values[rows // 4 :])}
        parts["holdout"] = Table(SCHEMA, table.values[: rows // 4])
        plan, counts = tabulate(protocol, cohort, parts)
        scores = np.full(len(score_names(protocol)), 0.6)
        answers[site] = np.concatenate([plan.join(counts), scores])[None, :]
        start += rows
    assert count_plan(protocol).size
    return evaluation_results(protocol, cohort, answers, SITES)


@functools.cache
def wide(columns: int = 200) -> Documents:
    """A run of a table with many columns, evaluated for fidelity and correlations."""
    names = [f"marker_{number:03d}" for number in range(columns - 1)]
    fields: list[dict[str, Any]] = [
        {"name": name, "type": "number", "constraints": {"minimum": 0, "maximum": 1}} for name in names
    ]
    schema = parse_schema({"fields": [*fields, {"name": "dead", "type": "boolean", "constraints": {"required": True}}]})
    study = Study.model_validate({"study": {"name": "wide", "schema": "schema.json"}})
    random = np.random.default_rng(0)
    tables = []
    for rows, shift in ((300, 0.0), (250, 0.1)):
        values = random.random((rows, columns))
        values[:, 7] = np.clip(values[:, 7] + 3 * shift, 0, 1)  # the most wrong column
        values[:, -1] = random.integers(0, 2, rows)
        tables.append(Table(schema, values))
    metrics = evaluate(tables[0], tables[1], None, 0, thorough=False)
    return of_parts(Protocol(study, schema), metrics)


class Tree(HTMLParser):
    """A page as nested elements; every end tag must fit, as HTML that is well formed has it."""

    VOID = frozenset({"meta", "br", "hr", "col", "link", "img", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str], tuple[str, ...]]] = []
        self.text = ""
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
        self.elements.append((tag, {name: value or "" for name, value in attrs}, tuple(self.open)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        words = " ".join(data.split())
        self.text += words + " "
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(words)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes, _ in self.elements if name == tag]
