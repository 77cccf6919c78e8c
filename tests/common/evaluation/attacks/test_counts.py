from dataclasses import replace
from typing import Any

import pytest

from common.errors import DataError
from common.evaluation.attacks.counts import AttackCounts, NotPossible, add_counts, too_few

A = AttackCounts("inference", "age", 100, 30, 50, 10, 100, 5, "tolerance=0.05")
B = AttackCounts("inference", "age", 7, 7, 3, 0, 7, 1, "tolerance=0.05")


def test_counts_of_one_attack_add_up() -> None:
    expected = AttackCounts("inference", "age", 107, 37, 53, 10, 107, 6, "tolerance=0.05")
    for found in (A + B, sum([A, B]), sum([B, A])):
        assert found == expected


@pytest.mark.parametrize(
    "other",
    [replace(B, attack="linkability"), replace(B, secret="sex"), replace(B, setting="tolerance=0.1")],
)
def test_counts_of_different_attacks_are_not_added(other: AttackCounts) -> None:
    with pytest.raises(DataError, match="different attacks cannot be added"):
        _ = A + other
    assert add_counts([A, other, B]) == (A + B, other)


def test_a_count_is_not_added_to_a_number() -> None:
    right: Any = 1
    with pytest.raises(TypeError):
        _ = A + right
    with pytest.raises(TypeError):
        _ = right + A


@pytest.mark.parametrize(
    "numbers",
    [
        {"guesses": 0, "successes": 0},
        {"successes": 101},
        {"successes": -1},
        {"control_guesses": 0, "control_successes": 0},
        {"control_successes": 51},
        {"baseline_guesses": 0, "baseline_successes": 0},
        {"successes": 3.0},
        {"successes": True},
    ],
)
def test_impossible_counts_are_refused(numbers: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="inference"):
        replace(A, **numbers)


def test_singling_out_counts_predicates_and_the_others_patients() -> None:
    assert A.unit == A.to_json()["unit"] == "patient"
    assert replace(A, attack="singling_out_univariate").unit == "predicate"


def test_too_few_names_what_is_too_few() -> None:
    assert too_few("linkability", None, training_patients=20, control_patients=20) is None
    found = too_few("linkability", None, "k=1", training_patients=20, control_patients=19)
    assert isinstance(found, NotPossible)
    assert "control patients: 19" in found.reason and "training" not in found.reason
    assert found.setting == "k=1"
