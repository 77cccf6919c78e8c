import numpy as np
import pytest

from common.evaluation.attacks.counts import AttackCounts, NotPossible
from common.evaluation.attacks.inference import infer
from common.evaluation.attacks.risk import risk
from common.table import Table
from tests.common.evaluation.attacks.patients import (
    SCHEMA,
    columns_of,
    head,
    jittered,
    levels,
    number,
    population,
    resampled,
)
from tests.common.evaluation.attacks.test_gower import matrix, share


def inferred(synthetic: Table, train: Table, control: Table, **options) -> dict[str, AttackCounts]:
    found = infer(synthetic, train, control, np.random.default_rng(0), **options)
    counts = {each.secret or "": each for each in found if isinstance(each, AttackCounts)}
    assert len(counts) == len(found)
    return counts


def right_by_hand(synthetic: Table, patients: Table, secret: str) -> tuple[int, int]:
    """Patients with a known secret, and those for whom the nearest row with one guesses right."""
    j = SCHEMA.index(secret)
    column = SCHEMA.columns[j]
    offers = Table(SCHEMA, synthetic.values[~np.isnan(synthetic.values[:, j])])
    others = [i for i in range(len(SCHEMA.columns)) if i != j]
    guesses = offers.values[matrix(patients, offers, others).argmin(axis=1), j]
    known = right = 0
    for guess, truth in zip(guesses, patients.values[:, j], strict=True):
        if not np.isnan(truth):
            known += 1
            right += abs(share(guess, column) - share(truth, column)) <= 0.05 if column.is_numeric else guess == truth
    return known, right


def test_guesses_are_those_found_one_by_one() -> None:
    synthetic, train, control = population(60, 1), population(50, 2), population(40, 3)
    found = inferred(synthetic, train, control)
    assert list(found) == list(SCHEMA.names)
    for secret, counts in found.items():
        assert (counts.guesses, counts.successes) == right_by_hand(synthetic, train, secret)
        assert (counts.control_guesses, counts.control_successes) == right_by_hand(synthetic, control, secret)
        assert counts.baseline_guesses == counts.guesses


def test_a_patient_without_the_secret_is_in_no_cell() -> None:
    train = population(200, 1)
    counts = inferred(train, train, train)["height"]
    assert counts.guesses == counts.successes == int((~np.isnan(train["height"])).sum()) < 200


def test_a_cohort_that_is_the_patients_gives_every_secret_away() -> None:
    train = population(600, 1)
    for counts in inferred(train, train, population(600, 2)).values():
        assert counts.successes == counts.guesses
        found = risk(counts, 0.999)
        assert found.excess is not None and found.excess.low > 0.5
        assert not found.weaker_than_baseline


def test_an_overfitted_cohort_gives_more_away_about_its_patients() -> None:
    train = population(800, 1)
    counts = inferred(jittered(resampled(train, 1500, 4), 5, 0.02), train, population(800, 2))
    assert all(risk(each, 0.999).difference.low > 0 for each in counts.values())


def test_an_independent_cohort_guesses_both_sides_alike() -> None:
    counts = inferred(population(1500, 1), population(1200, 2), population(1000, 3))
    for each in counts.values():
        found = risk(each, 0.999)
        assert found.difference.low < 0 < found.difference.high
    # Columns are correlated, so the attack beats guessing: population knowledge, which the control shows as such.
    assert not risk(counts["died"]).weaker_than_baseline


def test_numbers_within_the_tolerance_are_right() -> None:
    schema = columns_of(number("x"), levels("c", "p", "q"))
    synthetic = Table(schema, np.array([[0.5, 0.0], [0.9, 1.0]]))
    x = np.array([0.5, 0.45, 0.55, 0.449, 0.56] * 10)
    patients = Table(schema, np.column_stack([x, np.zeros(50)]))
    assert inferred(synthetic, patients, patients, secrets=["x"])["x"].successes == 30
    assert inferred(synthetic, patients, patients, secrets=["x"], tolerance=0.0)["x"].successes == 10


def test_the_baseline_knows_the_schema_only() -> None:
    schema = columns_of(number("x"), levels("c", "p", "q", "r", "s"))
    table = Table(schema, np.column_stack([np.full(4000, 0.5), np.zeros(4000)]))
    found = inferred(head(table, 30), table, head(table, 30))
    assert found["c"].baseline_successes / 4000 == pytest.approx(1 / 4, abs=0.03)
    assert found["x"].baseline_successes / 4000 == pytest.approx(0.1, abs=0.02)


def test_what_cannot_be_guessed_is_said() -> None:
    table = population(60, 1)
    gone = Table(SCHEMA, table.values.copy())
    gone.values[:, SCHEMA.index("crea")] = np.nan
    rng = np.random.default_rng(0)
    for synthetic, patients, reason in ((gone, table, "every synthetic row"), (table, gone, "with a value: 0")):
        found = {each.secret: each for each in infer(synthetic, patients, table, rng)}
        crea = found.pop("crea")
        assert isinstance(crea, NotPossible) and reason in crea.reason
        assert all(isinstance(each, AttackCounts) for each in found.values())
    one = Table(columns_of(number("x")), np.linspace(0, 1, 50)[:, None])
    (only,) = infer(one, one, one, rng)
    assert isinstance(only, NotPossible) and "another column" in only.reason
