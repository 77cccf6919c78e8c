import numpy as np
import pytest

from common.evaluation.attacks.counts import AttackCounts, NotPossible
from common.evaluation.attacks.linkability import halves, link
from common.evaluation.attacks.risk import risk
from common.table import Table
from tests.common.evaluation.attacks.patients import SCHEMA, columns_of, head, number, population, with_rows
from tests.common.evaluation.attacks.test_gower import matrix


def linked(synthetic: Table, train: Table, control: Table, **options) -> list[AttackCounts]:
    found = link(synthetic, train, control, np.random.default_rng(0), **options)
    counts = [each for each in found if isinstance(each, AttackCounts)]
    assert len(counts) == len(found)
    return counts


def test_the_halves_are_all_columns_once() -> None:
    left, right = halves(SCHEMA)
    assert sorted(left + right) == sorted(SCHEMA.names)
    assert abs(len(left) - len(right)) <= 1


def test_links_are_those_found_one_by_one() -> None:
    synthetic, train, control = population(60, 1), population(40, 2), population(30, 3)
    left, right = ["age", "height", "crea"], ["glucose", "heart rate"]  # numbers: no ties
    for counts, k in zip(linked(synthetic, train, control, columns=(left, right), k=(1, 5)), (1, 5), strict=True):
        hits = []
        for patients in (train, control):
            near = [
                np.argsort(matrix(patients, synthetic, [SCHEMA.index(n) for n in half]), axis=1, kind="stable")[:, :k]
                for half in (left, right)
            ]
            hits.append(sum(bool(set(a) & set(b)) for a, b in zip(*(n.tolist() for n in near), strict=True)))
        # Rows missing throughout a half may tie.
        assert abs(counts.successes - hits[0]) <= 1 and abs(counts.control_successes - hits[1]) <= 1
        assert (counts.guesses, counts.control_guesses) == (40, 30)


def test_a_cohort_that_is_the_patients_links_them() -> None:
    train = population(600, 1)
    for counts in linked(train, train, population(600, 2)):
        found = risk(counts, 0.999)
        assert found.main.value > 0.9
        assert found.excess is not None and found.excess.low > 0.3


def test_copies_of_a_few_patients_are_linked() -> None:
    train, control = population(2000, 1), population(2000, 2)
    counts = linked(with_rows(population(2000, 3), head(train, 60)), train, control)[0]
    assert risk(counts, 0.999).difference.low > 0


def test_an_independent_cohort_links_both_sides_alike() -> None:
    for counts in linked(population(1500, 1), population(1500, 2), population(1000, 3)):
        found = risk(counts, 0.999)
        assert found.difference.low < 0 < found.difference.high


def test_the_baseline_is_the_chance_of_a_common_row() -> None:
    counts = linked(population(100, 1), population(4000, 2), population(50, 3), k=(10,))[0]
    chance = 1 - np.prod([(90 - i) / (100 - i) for i in range(10)])
    assert counts.baseline_successes / counts.baseline_guesses == pytest.approx(chance, abs=0.04)


def test_what_cannot_be_linked_is_said() -> None:
    table = population(30, 1)
    rng = np.random.default_rng(0)
    assert [type(each) for each in link(head(table, 5), table, table, rng)] == [NotPossible, AttackCounts]
    assert all(isinstance(each, NotPossible) for each in link(table, table, head(table, 19), rng))
    one = Table(columns_of(number("x")), np.linspace(0, 1, 50)[:, None])
    assert all(isinstance(each, NotPossible) and "two columns" in each.reason for each in link(one, one, one, rng))
    with pytest.raises(ValueError, match="disjoint"):
        link(table, table, table, rng, columns=(["age"], ["age", "died"]))
