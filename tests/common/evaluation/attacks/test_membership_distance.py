import numpy as np
import pytest

from common.evaluation.attacks.counts import AttackCounts, NotPossible
from common.evaluation.attacks.membership_distance import distance_attack, product_of_marginals
from common.evaluation.attacks.risk import risk
from common.evaluation.attacks.scores import ScoreCounts, auroc, true_positives
from common.table import Table
from tests.common.evaluation.attacks.patients import head, jittered, population, resampled, with_rows


def attacked(synthetic: Table, train: Table, control: Table, seed: int = 0) -> tuple[list[AttackCounts], ScoreCounts]:
    results, scores = distance_attack(synthetic, train, control, np.random.default_rng(seed))
    counts = [each for each in results if isinstance(each, AttackCounts)]
    assert len(counts) == len(results) == 3 and isinstance(scores, ScoreCounts)
    return counts, scores


def test_a_cohort_that_is_the_patients_shows_every_member() -> None:
    train = population(600, 1)
    counts, scores = attacked(train, train, population(600, 2))
    for each in counts:
        assert each.successes == each.guesses == 600
        assert risk(each, 0.999).difference.low > 0.7
    assert auroc(scores, 0.999).low > 0.98
    found = true_positives(scores, 0.01)
    assert found.true_positive_rate is not None and found.true_positive_rate.value == 1


def test_an_overfitted_cohort_shows_members() -> None:
    train = population(800, 1)
    counts, scores = attacked(jittered(resampled(train, 1500, 4), 5, 0.02), train, population(800, 2))
    assert all(risk(each, 0.999).difference.low > 0.3 for each in counts)
    assert auroc(scores, 0.999).low > 0.75


def test_a_few_copies_show_at_low_false_positive_rates() -> None:
    train = population(2000, 1)
    copies = jittered(head(train, 100), 6, 0.005)
    counts, scores = attacked(with_rows(population(2000, 3), copies), train, population(2000, 2))
    assert risk(counts[0], 0.999).difference.low > 0
    p = true_positives(scores, 0.01).p_value
    assert p is not None and p < 1e-3


def test_an_independent_cohort_shows_nobody() -> None:
    counts, scores = attacked(population(1500, 1), population(1500, 2), population(1500, 3))
    for each in counts:
        found = risk(each, 0.999)
        assert found.difference.low < 0 < found.difference.high
    found = auroc(scores, 0.999)
    assert found.low < 0.5 < found.high


def test_false_positive_rates_are_what_they_are_said_to_be() -> None:
    # Over many splits of the control, members and non-members being alike here.
    synthetic, train, control = population(300, 1), population(300, 2), population(400, 3)
    rates = np.zeros(3)
    for seed in range(60):
        results, _ = distance_attack(synthetic, train, control, np.random.default_rng(seed))
        counts = [each for each in results if isinstance(each, AttackCounts)]
        rates += [each.control_successes / each.control_guesses for each in counts]
    # A fixed control is shared by all splits, so the mean deviates by no more than one patient's share a level.
    assert np.all(rates / 60 <= np.array([0.01, 0.05, 0.10]) + 0.005), rates / 60
    assert rates[2] / 60 > 0.05


def test_half_of_the_control_calibrates_and_the_other_half_tests() -> None:
    counts, scores = attacked(population(300, 1), population(300, 2), population(301, 3))
    assert {each.control_guesses for each in counts} == {151}
    assert sum(scores.control) == 301
    assert {each.baseline_guesses for each in counts} == {300}


def test_too_small_a_control_cannot_show_a_small_rate() -> None:
    table = population(100, 1)
    results, scores = distance_attack(table, table, population(60, 2), np.random.default_rng(0))
    assert [type(each) for each in results] == [NotPossible, AttackCounts, AttackCounts]
    assert isinstance(results[0], NotPossible) and "30 calibration patients" in results[0].reason
    assert isinstance(scores, ScoreCounts)
    results, scores = distance_attack(table, table, population(39, 2), np.random.default_rng(0))
    assert all(isinstance(each, NotPossible) for each in [*results, scores])
    results, scores = distance_attack(head(table, 1), table, table, np.random.default_rng(0))
    assert all(isinstance(each, NotPossible) for each in [*results, scores])


def test_bins_come_from_the_cohort_alone() -> None:
    cohort = population(300, 1)
    _, a = attacked(cohort, population(200, 2), population(200, 3))
    _, b = attacked(cohort, population(250, 4), population(200, 5))
    assert a.edges == b.edges
    assert sum((a + b).train) == 450


def test_the_product_of_marginals_keeps_columns_and_forgets_their_relation() -> None:
    table = population(3000, 1)
    drawn = product_of_marginals(table, 3000, np.random.default_rng(0))
    known = ~np.isnan(table.values[:, :2]).any(axis=1)
    assert abs(np.corrcoef(table.values[known, :2].T)[0, 1]) > 0.3
    known = ~np.isnan(drawn.values[:, :2]).any(axis=1)
    assert abs(np.corrcoef(drawn.values[known, :2].T)[0, 1]) < 0.08
    for name in table.schema.names:
        assert np.isin(drawn[name][~np.isnan(drawn[name])], table[name]).all()
        assert np.nanmean(drawn[name]) == pytest.approx(np.nanmean(table[name]), rel=0.1)
