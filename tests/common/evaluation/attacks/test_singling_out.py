import numpy as np
import pytest

from common.evaluation.attacks.counts import AttackCounts, NotPossible
from common.evaluation.attacks.risk import risk
from common.evaluation.attacks.singling_out import (
    MULTIVARIATE,
    UNIVARIATE,
    Condition,
    matches,
    multivariate,
    single_out,
    univariate,
)
from common.table import Table
from tests.common.evaluation.attacks.patients import SCHEMA, columns_of, levels, number, population

TWO = columns_of(number("x", required=False), levels("c", "p", "q", required=False))
SMALL = Table(TWO, np.array([[0.1, 0], [0.2, 1], [0.2, np.nan], [np.nan, 1]]))


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        (Condition(0, "equal", 0.2), [False, True, True, False]),
        (Condition(0, "different", 0.2), [True, False, False, False]),
        (Condition(0, "at most", 0.1), [True, False, False, False]),
        (Condition(0, "at least", 0.2), [False, True, True, False]),
        (Condition(0, "missing"), [False, False, False, True]),
        (Condition(0, "known"), [True, True, True, False]),
        (Condition(1, "different", 1.0), [True, False, False, False]),
    ],
)
def test_conditions_mean_what_they_say(condition: Condition, rows: list[bool]) -> None:
    assert matches((condition,), SMALL).tolist() == rows


def test_all_conditions_must_hold() -> None:
    assert matches((Condition(0, "at least", 0.2), Condition(1, "equal", 1.0)), SMALL).tolist() == [
        False,
        True,
        False,
        False,
    ]


def test_every_univariate_predicate_is_found() -> None:
    found = univariate(SMALL, 100, np.random.default_rng(0))
    assert set(found) == {
        (Condition(0, "missing"),),
        (Condition(0, "equal", 0.1),),
        (Condition(0, "at most", 0.1),),
        (Condition(1, "missing"),),
        (Condition(1, "equal", 0.0),),
    }
    assert len(univariate(SMALL, 2, np.random.default_rng(0))) == 2


def test_predicates_match_exactly_one_row_of_the_cohort() -> None:
    cohort = population(400, 1)
    rng = np.random.default_rng(0)
    for found in (univariate(cohort, 200, rng), multivariate(cohort, 200, 3, rng)):
        assert len(found) == len(set(found)) == 200
        assert all(matches(predicate, cohort).sum() == 1 for predicate in found)
    assert all(len(predicate) == 3 for predicate in multivariate(cohort, 20, 3, rng))


def both(synthetic: Table, train: Table, control: Table) -> dict[str, AttackCounts]:
    found = single_out(synthetic, train, control, np.random.default_rng(0))
    counts = {each.attack: each for each in found if isinstance(each, AttackCounts)}
    assert set(counts) == {UNIVARIATE, MULTIVARIATE}
    return counts


def test_a_cohort_that_is_the_patients_singles_all_of_them_out() -> None:
    train = population(500, 1)
    for counts in both(train, train, population(500, 2)).values():
        assert counts.successes == counts.guesses
        found = risk(counts, 0.999)
        assert not found.weaker_than_baseline
        assert found.excess is not None and found.excess.low > 0.5


def test_duplicates_in_the_cohort_do_not_hide_the_row() -> None:
    train = population(300, 1)
    twice = Table(SCHEMA, np.vstack([train.values, train.values]))
    for counts in both(twice, train, population(300, 2)).values():
        assert counts.successes == counts.guesses


def test_an_independent_cohort_singles_out_both_sides_alike() -> None:
    counts = both(population(1500, 1), population(1000, 2), population(1000, 3))[MULTIVARIATE]
    found = risk(counts, 0.999)
    assert found.difference.low < 0 < found.difference.high
    assert not found.weaker_than_baseline


def test_both_sides_are_of_equal_number() -> None:
    # The more patients, the more a predicate matches: unequal sides would differ without any leak.
    synthetic, train, control = population(4000, 1), population(4000, 2), population(500, 3)
    found = risk(both(synthetic, train, control)[MULTIVARIATE])
    assert abs(found.difference.value) < 0.06
    predicates = multivariate(synthetic, 500, 3, np.random.default_rng(0))
    unequal = [np.mean([matches(each, side).sum() == 1 for each in predicates]) for side in (train, control)]
    assert unequal[0] - unequal[1] > 0.1


def test_the_cohort_alone_decides_what_is_guessed() -> None:
    cohort, train = population(300, 1), population(300, 2)
    a, b = (multivariate(cohort, 50, 3, np.random.default_rng(5)) for _ in range(2))
    assert a == b
    # Wherever all 300 members are the one side, the same predicates find the same patients.
    first, second = (both(cohort, train, control) for control in (population(300, 8), population(400, 9)))
    assert all(first[attack].successes == second[attack].successes for attack in (UNIVARIATE, MULTIVARIATE))


def test_too_few_predicates_are_no_result() -> None:
    schema = columns_of(levels("c", "p", "q"), levels("d", "p", "q"))
    table = Table(schema, np.random.default_rng(0).integers(0, 2, (200, 2)).astype(float))
    found = single_out(table, table, table, np.random.default_rng(0))
    assert [each.attack for each in found] == [UNIVARIATE, MULTIVARIATE]
    assert all(isinstance(each, NotPossible) and "predicates found" in each.reason for each in found)


def test_one_column_has_no_combinations() -> None:
    table = Table(columns_of(number("x")), np.linspace(0, 1, 100)[:, None])
    first, second = single_out(table, table, table, np.random.default_rng(0))
    assert isinstance(first, AttackCounts) and first.successes == first.guesses
    assert isinstance(second, NotPossible) and "two columns" in second.reason
