import numpy as np
import pytest

from common.evaluation.attacks.copies import EXACT, NEAR, ONE_OFF, find_copies
from common.evaluation.attacks.counts import AttackCounts, NotPossible
from common.evaluation.attacks.risk import risk
from common.evaluation.attacks.rows import distinct, occurs_in
from common.table import Table
from tests.common.evaluation.attacks.patients import (
    SCHEMA,
    columns_of,
    head,
    jittered,
    levels,
    number,
    population,
    with_rows,
)


def copies(synthetic: Table, train: Table, control: Table) -> dict[str, AttackCounts]:
    found = find_copies(synthetic, train, control, np.random.default_rng(0))
    counts = {each.attack: each for each in found if isinstance(each, AttackCounts)}
    assert set(counts) == {EXACT, ONE_OFF, NEAR}
    return counts


def test_one_copied_patient_in_a_hundred_is_found() -> None:
    train, control = population(2000, 1), population(2000, 2)
    for counts in copies(with_rows(population(2000, 3), head(train, 20)), train, control).values():
        assert counts.successes >= 20
        assert risk(counts, 0.999).difference.low > 0
        assert risk(counts).p_value == pytest.approx(0, abs=1e-4)


def test_jittered_copies_are_near_copies() -> None:
    train, control = population(2000, 1), population(2000, 2)
    found = copies(with_rows(population(2000, 3), jittered(head(train, 40), 6, 0.005)), train, control)
    assert found[EXACT].successes <= 2
    assert risk(found[NEAR], 0.999).difference.low > 0


@pytest.mark.parametrize("column", SCHEMA.names)
def test_a_copy_with_one_other_value_is_found_whatever_the_column(column: str) -> None:
    train = population(40, 1)
    values, j = train.values.copy(), SCHEMA.index(column)
    values[:, j] = np.where(values[:, j] == 1, 0, 1)
    found = copies(with_rows(population(60, 3), Table(SCHEMA, values)), train, population(40, 2))
    assert (found[ONE_OFF].successes, found[EXACT].successes) == (40, 0)


def test_an_independent_cohort_has_no_more_copies_of_train_than_of_control() -> None:
    for counts in copies(population(1500, 1), population(1500, 2), population(1500, 3)).values():
        assert risk(counts, 0.999).difference.low <= 0


def test_narrow_tables_copy_by_chance_and_the_control_shows_it() -> None:
    schema = columns_of(levels("c", "p", "q"), levels("d", "p", "q", "r"))
    tables = [population(500, seed, schema) for seed in (1, 2, 3)]
    found = risk(copies(*tables)[EXACT])
    assert found.main.value > 0.9 and found.control.value > 0.9
    assert found.p_value is not None and found.p_value > 0.01


def test_missing_equals_missing_and_nothing_else() -> None:
    schema = columns_of(number("x", required=False), number("y", required=False))
    negative_nan = -np.float64("nan")
    table = Table(schema, np.array([[np.nan, 0.5], [0.0, np.nan], [0.0, 0.5]]))
    other = Table(schema, np.array([[negative_nan, 0.5], [-0.0, negative_nan], [0.25, 0.5]]))
    assert occurs_in(table, other).tolist() == [True, True, False]
    assert len(distinct(Table(schema, np.vstack([table.values, other.values])))) == 4


def test_few_patients_are_no_result() -> None:
    table = population(50, 1)
    found = find_copies(table, table, head(table, 10), np.random.default_rng(0))
    assert all(isinstance(each, NotPossible) and "control patients: 10" in each.reason for each in found)
    one = Table(columns_of(number("x")), np.linspace(0, 1, 50)[:, None])
    found = {each.attack: each for each in find_copies(one, one, one, np.random.default_rng(0))}
    assert isinstance(found[ONE_OFF], NotPossible)
    assert isinstance(found[EXACT], AttackCounts)
