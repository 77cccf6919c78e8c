"""Every gate: it passes, it fails, and what it does where its evidence is missing or is no number."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from common.gates import read_gates
from server.gates import (
    COPIES_LEVEL,
    AttackEvidence,
    GateResult,
    Measured,
    attack_gate,
    budget_gate,
    certificate_gate,
    copies_gate,
    guarded,
    ledgers_gate,
    minimum_gate,
    schema_gate,
)

NUMBERS = st.floats(0, 1e6)


def evidence(*measured: Measured, missing: tuple[str, ...] = ()) -> AttackEvidence:
    return AttackEvidence(measured, missing, "metrics.json", "give --test")


@given(st.lists(NUMBERS, min_size=1, max_size=8), st.floats(0.1, 1e6))
def test_the_certificate_gate_is_the_largest_certificate_against_the_bound(values: list[float], bound: float) -> None:
    found = certificate_gate(values, len(values), bound)
    assert found.passed == all(value <= bound for value in values)
    assert (found.found, found.limit) == (max(values), bound) and bool(found.fix) == (not found.passed)


@pytest.mark.parametrize("values", [[1.0], [], [1.0, None], [1.0, "2"], [1.0, math.nan], [1.0, -1.0], [1.0, True]])
def test_a_round_without_a_certificate_fails(values: list[Any]) -> None:
    found = certificate_gate(values, 2, 5.0)
    assert not found.passed and found.fix and isinstance(found.found, str)


def test_a_mode_without_a_bound_has_nothing_to_hold_the_certificate_against() -> None:
    found = certificate_gate([7.0, 9.0], 2, None)
    assert found.passed and found.limit is None and "no bound is declared" in found.evidence
    assert not certificate_gate([7.0, math.inf], 2, None).passed


def test_the_ledger_gate_names_every_problem() -> None:
    assert ledgers_gate([], 2, "here").passed
    found = ledgers_gate(["a: edited", "b: short"], 2, "here")
    assert not found.passed and found.found == "a: edited; b: short" and found.fix
    assert not ledgers_gate([], 0, "here").passed


@given(st.dictionaries(st.text("abc", min_size=1), NUMBERS | st.just("infinity"), min_size=1), NUMBERS)
def test_the_budget_gate_takes_the_largest_site(epsilons: dict[str, float | str], limit: float) -> None:
    found = budget_gate(epsilons, limit)
    worst = max(math.inf if isinstance(value, str) else value for value in epsilons.values())
    assert found.passed == (worst <= limit) and found.limit == limit
    assert found.found == ("infinity" if math.isinf(worst) else worst)


@pytest.mark.parametrize("value", [math.nan, None, "much", math.inf])
def test_what_is_no_number_is_an_infinite_epsilon(value: Any) -> None:
    found = budget_gate({"a": 1.0, "b": value}, 5.0)
    assert not found.passed and found.found == "infinity"


def test_a_budget_without_a_limit_passes_and_says_so_and_without_a_statement_fails() -> None:
    assert budget_gate({"a": "infinity"}, None).passed and "declares no limit" in budget_gate({"a": 1.0}, None).evidence
    assert not budget_gate(None, 5.0).passed and not budget_gate({}, None).passed


def test_the_schema_gate() -> None:
    assert schema_gate([], 5).passed
    found = schema_gate(["cohort.csv: 4 rows, 5 were declared"], 5)
    assert not found.passed and "4 rows" in str(found.found) and found.fix


@given(st.integers(0, 50), st.integers(1, 50))
def test_a_minimum(found: int, least: int) -> None:
    gate = minimum_gate("min_sites", found, least, "rounds.jsonl", "more sites")
    assert gate.passed == (found >= least) and (gate.found, gate.limit) == (found, least)
    assert gate.fix == ("" if gate.passed else "more sites")
    assert not minimum_gate("min_sites", None, least, "rounds.jsonl", "more sites").passed


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 1)), min_size=1, max_size=6), st.floats(0, 1))
def test_an_attack_is_judged_by_the_upper_end_of_the_worst_interval(
    results: list[tuple[float, float]], limit: float
) -> None:
    measured = [Measured(str(n), value, value + width) for n, (value, width) in enumerate(results)]
    gate = attack_gate("linkability", evidence(*measured), limit)
    highest = max(each.high for each in measured)
    assert gate.passed == (highest <= limit)
    assert isinstance(gate.found, float) and highest <= gate.found <= highest + 2e-6  # rounded up, as a bound


def test_an_attack_without_evidence_fails_and_says_how_to_get_it() -> None:
    fine = Measured("k=1", 0.0, 0.01)
    for given_ in (evidence(), evidence(fine, missing=("k=10: too few",)), evidence(Measured("x", 0.0, math.nan))):
        gate = attack_gate("linkability", given_, 0.09)
        assert not gate.passed and str(gate.found).startswith("no evidence") and gate.fix == "give --test"
    assert attack_gate("linkability", evidence(fine), 0.09).passed


def test_too_few_patients_and_a_true_leak_are_told_apart() -> None:
    few = attack_gate("inference", evidence(Measured("x", 0.01, 0.3)), 0.09)
    leak = attack_gate("inference", evidence(Measured("x", 0.2, 0.3)), 0.09)
    assert "more held-out patients" in few.fix and "above the limit" in leak.fix


def test_copies_beyond_chance_fail_whatever_the_limit() -> None:
    chance, leak = Measured("exact", 0.0, 0.004, 0.5), Measured("near", 0.01, 0.02, COPIES_LEVEL / 2)
    assert copies_gate(evidence(chance), 0.01).passed
    assert not copies_gate(evidence(chance), 0.001).passed
    gate = copies_gate(evidence(chance, leak), 1.0)
    assert not gate.passed and "not by chance" in str(gate.found)
    missing = copies_gate(evidence(leak, missing=("sampled",)), 1.0)
    assert not missing.passed and "sampled" in str(missing.found)


@pytest.mark.parametrize("error", [ZeroDivisionError("Zq7731"), KeyError("Zq7731"), DataError("the file is cut off")])
def test_an_exception_fails_the_gate_and_quotes_nothing(error: Exception) -> None:
    def broken() -> GateResult:
        raise error

    gate = guarded("schema", 7.0, broken)
    assert not gate.passed and gate.limit == 7.0 and gate.fix and "Zq7731" not in str(gate)
    assert "could not be evaluated" in str(gate.found)


@given(st.lists(st.booleans(), min_size=3, max_size=6))
def test_no_gate_makes_up_for_another(passed: list[bool]) -> None:
    names = ["certificate", "ledgers", "schema", "x", "y", "z"][: len(passed)]
    gates = [
        GateResult(name, ok, 1.0, 2.0, "" if ok else "f", "e").record() for name, ok in zip(names, passed, strict=True)
    ]
    document = {
        "schema_version": 1,
        "study_digest": "0" * 64,
        "cohort_sha256": None,
        "gates": [g.model_dump() for g in gates],
        "override": None,
    }
    found = read_gates(document | {"passed": all(passed)})
    assert [gate.name for gate in found.failed] == [n for n, ok in zip(names, passed, strict=True) if not ok]
    with pytest.raises(ValueError, match="`passed` is not what the gates say"):
        read_gates(document | {"passed": not all(passed)})
