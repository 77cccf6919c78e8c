"""What the attack gates read out of the suite's own report, for cohorts with planted leaks and without."""

import json
from typing import Any

import numpy as np
import pytest

from common.errors import DataError
from common.evaluation.attacks.suite import run_attacks
from common.schema import parse_schema
from common.table import Table
from server.gate_evidence import ATTACKS, attack_evidence, simulated_attacks
from server.gates import GateResult, attack_gate, copies_gate

SCHEMA = parse_schema(
    {
        "fields": [
            *({"name": f"x{n}", "type": "number", "constraints": {"minimum": 0, "maximum": 1}} for n in range(6)),
            {"name": "dead", "type": "boolean", "constraints": {"required": True}},
        ]
    }
)


def people(rows: int, seed: int) -> Table:
    random = np.random.default_rng(seed)
    return Table(SCHEMA, np.column_stack([random.random((rows, 6)), random.integers(0, 2, rows)]))


def report_of(synthetic: Table, train: Table, control: Table) -> dict[str, Any]:
    found = run_attacks(synthetic, train, control, np.random.default_rng(0), secrets=["dead"])
    return json.loads(json.dumps(found.to_json()))


TRAIN, CONTROL = people(400, 1), people(400, 2)


@pytest.fixture(scope="module")
def fresh() -> dict[str, Any]:
    return report_of(people(500, 3), TRAIN, CONTROL)


@pytest.fixture(scope="module")
def copied() -> dict[str, Any]:
    return report_of(Table(SCHEMA, np.vstack([TRAIN.values, people(100, 3).values])), TRAIN, CONTROL)


def gate(name: str, report: dict[str, Any] | None, limit: float, **options: Any) -> GateResult:
    found = attack_evidence(
        name, report, why_missing="no held-out patients", source="here", get="give --test", **options
    )
    return copies_gate(found, limit) if name == "copies" else attack_gate(name, found, limit)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_cohort_that_knows_no_patient_passes_and_one_made_of_patients_fails(
    name: str, fresh: dict[str, Any], copied: dict[str, Any]
) -> None:
    passed, failed = gate(name, fresh, 0.3), gate(name, copied, 0.3)
    assert passed.passed, passed
    assert not failed.passed, failed
    assert not gate(name, fresh, 0.0).passed or name == "copies"


@pytest.mark.parametrize("name", ATTACKS)
def test_without_a_report_or_its_attack_the_gate_fails(name: str, fresh: dict[str, Any]) -> None:
    assert not gate(name, None, 1.0).passed and "no held-out patients" in str(gate(name, None, 1.0).found)
    without = fresh | {
        "attacks": [a for a in fresh["attacks"] if not a["counts"]["attack"].startswith(ATTACKS[name])],
        "membership": [],
    }
    assert not gate(name, without, 1.0).passed
    impossible = {"attack": f"{ATTACKS[name]}x", "secret": None, "setting": "", "reason": "not possible because few"}
    found = gate(name, fresh | {"not_possible": [impossible]}, 1.0)
    assert not found.passed and "not possible because few" in str(found.found) and found.fix == "give --test"


def test_a_control_that_was_trained_on_is_no_control(fresh: dict[str, Any]) -> None:
    same = report_of(people(500, 3), TRAIN, TRAIN)
    for name in ATTACKS:
        found = gate(name, same, 1.0)
        assert not found.passed and "no control" in str(found.found)
    assert gate("linkability", fresh, 1.0).passed


def test_a_secret_that_was_not_attacked_is_missing(fresh: dict[str, Any]) -> None:
    assert gate("inference", fresh, 1.0, secrets=("dead",)).passed
    found = gate("inference", fresh, 1.0, secrets=("dead", "x1"))
    assert not found.passed and "'x1' was not attacked" in str(found.found)


def test_a_part_of_the_cohort_is_not_enough_for_copies(fresh: dict[str, Any]) -> None:
    found = gate("copies", fresh, 1.0, sampled={"synthetic": 300})
    assert not found.passed and "300 rows of the cohort only" in str(found.found)
    assert gate("copies", fresh, 1.0, sampled={"real": 300}).passed
    linked = gate("linkability", fresh, 1.0, sampled={"synthetic": 300})
    assert linked.passed and "300 synthetic rows only" in linked.evidence


def test_a_control_too_small_for_a_rate_is_missing_evidence() -> None:
    small = report_of(people(500, 3), TRAIN, people(90, 2))
    found = gate("membership", small, 1.0)
    assert not found.passed and "too few control patients for 1%" in str(found.found)


def test_counts_are_not_taken_on_trust(fresh: dict[str, Any]) -> None:
    edited = json.loads(json.dumps(fresh))
    for each in edited["attacks"]:
        each["excess"] = {"value": -1.0, "low": -1.0, "high": -1.0}
    assert gate("linkability", edited, 0.0).found == gate("linkability", fresh, 0.0).found
    edited["attacks"][0]["counts"]["successes"] = edited["attacks"][0]["counts"]["guesses"] + 1
    with pytest.raises(DataError, match="successes"):
        gate("singling_out", edited, 1.0)


def test_where_reports_are_found(fresh: dict[str, Any]) -> None:
    assert simulated_attacks({"attacks": {"reason": "", "report": fresh}}) == (fresh, "")
    assert simulated_attacks({"attacks": {"reason": "no control"}}) == (None, "no control")
    assert simulated_attacks(None)[0] is None and simulated_attacks({})[0] is None
