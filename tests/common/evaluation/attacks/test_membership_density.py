import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from common.evaluation.attacks.counts import NotPossible
from common.evaluation.attacks.membership_density import (
    OWN_MARGINALS,
    PATIENTS,
    Encoder,
    density_attack,
    kth_distance,
)
from common.evaluation.attacks.scores import ScoreCounts, auroc, mann_whitney, true_positives
from common.table import Table
from tests.common.evaluation.attacks.patients import SCHEMA, head, jittered, population, resampled, with_rows

REFERENCES = [None, population(700, 99)]


def attacked(synthetic: Table, train: Table, control: Table, reference: Table | None = None) -> ScoreCounts:
    found = density_attack(synthetic, train, control, np.random.default_rng(0), reference=reference)
    assert isinstance(found, ScoreCounts)
    return found


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_cohort_that_is_the_patients_shows_every_member(reference: Table | None) -> None:
    train = population(600, 1)
    counts = attacked(train, train, population(600, 2), reference)
    assert auroc(counts, 0.999).low > 0.98
    found = true_positives(counts, 0.01)
    assert found.true_positive_rate is not None and found.true_positive_rate.value > 0.99


@pytest.mark.parametrize("reference", REFERENCES)
def test_an_overfitted_cohort_shows_members(reference: Table | None) -> None:
    train = population(800, 1)
    counts = attacked(jittered(resampled(train, 1500, 4), 5, 0.02), train, population(800, 2), reference)
    assert auroc(counts, 0.999).low > 0.75
    assert mann_whitney(counts) < 1e-6


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_few_copies_show_at_low_false_positive_rates(reference: Table | None) -> None:
    train = population(2000, 1)
    synthetic = with_rows(population(2000, 3), jittered(head(train, 100), 6, 0.005))
    p = true_positives(attacked(synthetic, train, population(2000, 2), reference), 0.01).p_value
    assert p is not None and p < 1e-3


@pytest.mark.parametrize("reference", REFERENCES)
def test_an_independent_cohort_shows_nobody(reference: Table | None) -> None:
    counts = attacked(population(1500, 1), population(1500, 2), population(1500, 3), reference)
    found = auroc(counts, 0.999)
    assert found.low < 0.5 < found.high
    assert mann_whitney(counts) > 1e-3


def test_the_result_says_what_the_reference_is_and_bins_are_not_from_patients() -> None:
    cohort, train, control = population(300, 1), population(200, 2), population(200, 3)
    own, patients = (attacked(cohort, train, control, reference) for reference in REFERENCES)
    assert OWN_MARGINALS in own.setting and PATIENTS in patients.setting
    assert own.edges == patients.edges == attacked(cohort, population(50, 7), population(40, 8)).edges


@pytest.mark.parametrize("k", [1, 3])
def test_distances_are_sklearn_s(k: int) -> None:
    rng = np.random.default_rng(0)
    among = rng.normal(size=(400, 6))
    points = np.vstack([rng.normal(size=(100, 6)), among[:50], among[:50] + 1e-9])
    expected = NearestNeighbors(algorithm="brute").fit(among).kneighbors(points, k)[0][:, -1]
    assert kth_distance(points, among, k) == pytest.approx(expected, abs=1e-6)
    assert kth_distance(among[:50], among, 1).max() == 0
    itself = np.array([7, 3, 399])
    expected = NearestNeighbors(algorithm="brute").fit(among).kneighbors(among[itself], k + 1)[0][:, -1]
    assert kth_distance(among[itself], among, k, itself=itself) == pytest.approx(expected)


def test_every_column_weighs_the_same_in_the_cohort() -> None:
    cohort = population(4000, 1)
    features = Encoder(cohort)(cohort)
    assert np.isfinite(features).all()
    # Each column has variance 1, and so has the missing flag of each nullable number.
    flags = sum(c.is_numeric and c.nullable for c in SCHEMA.columns)
    known = np.nanmean([np.isnan(cohort[c.name]).mean() for c in SCHEMA.columns if c.is_numeric and c.nullable])
    assert features.var(axis=0).sum() == pytest.approx(len(SCHEMA.columns) + flags - flags * known, abs=0.02)


def test_few_rows_are_no_result() -> None:
    table = population(100, 1)
    rng = np.random.default_rng(0)
    for arguments, reference, reason in (
        ((table, head(table, 19), table), None, "training patients: 19"),
        ((table, table, head(table, 19)), None, "control patients: 19"),
        ((table, table, table), head(table, 19), "reference patients: 19"),
        ((head(table, 10), table, table), None, "10 row(s)"),
    ):
        found = density_attack(*arguments, rng, reference=reference)
        assert isinstance(found, NotPossible) and reason in found.reason
