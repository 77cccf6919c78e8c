"""Gates on what the sites counted: planted copies close them, fresh rows with little noise open them."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import pytest

from common.evaluation.results import ALL
from server.gate_sites import sites_evidence
from server.gates import GateResult, attack_gate, copies_gate
from tests.common.evaluation.evaluated import evaluated_protocol
from tests.common.evaluation.test_attack_results import METHODS, SECRETS, evaluated, leaking

GATES = ("copies", "linkability", "inference", "membership")


@cache
def evaluation(share: float, method: str = "accounted") -> dict[str, Any]:
    protocol = evaluated_protocol(groups=[], secrets=SECRETS, **METHODS[method])
    return evaluated(protocol, leaking(protocol, share))


def gate(name: str, document: dict[str, Any] | None, limit: float) -> GateResult:
    evidence = sites_evidence(name, document, SECRETS)
    return copies_gate(evidence, limit) if name == "copies" else attack_gate(name, evidence, limit)


@pytest.mark.parametrize("method", METHODS)
def test_planted_copies_close_every_gate_that_can_see_them(method: str) -> None:
    document = evaluation(0.3, method)
    found = gate("copies", document, 0.99)  # whatever the limit
    assert not found.passed and "not by chance" in str(found.found)
    assert not gate("membership", document, 0.09).passed
    exact = document["results"][ALL]["attacks"]["copies"]["exact"]["difference"]
    assert gate("copies", document, 0.01).found != gate("copies", evaluation(0.0, method), 0.01).found
    assert exact["low"] > exact["chance"]


@pytest.mark.parametrize("name", GATES)
def test_fresh_rows_open_a_gate_that_the_interval_allows(name: str) -> None:
    document = evaluation(0.0, "unnoised")
    closed = gate(name, document, -1.0)
    assert not closed.passed and isinstance(closed.found, float)
    found = gate(name, document, 0.9)
    assert found.passed and found.found == closed.found


def test_the_numbers_are_those_of_the_document() -> None:
    document = evaluation(0.0, "unnoised")
    attacks = document["results"][ALL]["attacks"]
    measured = {each.what: each for each in sites_evidence("membership", document).measured}
    area = attacks["membership"]["density"]["auroc"]
    assert measured["membership (density), 2 AUROC - 1"].high == pytest.approx(2 * area["high"] - 1)
    (linked,) = sites_evidence("linkability", document).measured
    difference = attacks["linkability"]["difference"]
    assert linked.high >= difference["high"] > linked.value


def test_missing_evidence_closes_the_gate() -> None:
    assert "no evaluation" in str(gate("copies", None, 1.0).found)
    document = deepcopy(evaluation(0.0))
    assert not gate("singling_out", document, 1.0).passed
    document["results"][ALL]["attacks"]["membership"]["density"] = {"reason": "fewer than 20 controls", "auroc": None}
    assert "fewer than 20 controls" in str(gate("membership", document, 1.0).found)
    del document["results"][ALL]["attacks"]["inference"]["stage"]
    assert "'stage' was not attacked" in str(gate("inference", document, 1.0).found)
    document["results"][ALL]["attacks"] = None
    assert not gate("copies", document, 1.0).passed
