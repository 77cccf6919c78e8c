import numpy as np
import pytest
from scipy import stats

from common.errors import DataError
from common.evaluation.effects import Effects, fit_effects
from common.evaluation.inflation import dispersion, measure_inflation, permuted_rejections, spread_over_cohorts
from common.schema import parse_schema
from common.table import Table
from tests.common.evaluation.evaluated import SCHEMA, patients

NUMBERS = ("a", "b", "c", "d")
PLAIN = parse_schema(
    {
        "fields": [{"name": n, "type": "number", "constraints": {"minimum": -6, "maximum": 6}} for n in NUMBERS]
        + [{"name": "y", "type": "boolean"}],
        "cohortium:target": "y",
    }
)
TRUTH = np.array([0.8, -0.4, 0.0, 0.2])


def draw(rows: int, rng: np.random.Generator, slopes: np.ndarray = TRUTH) -> Table:
    x = rng.normal(size=(rows, 4)).clip(-6, 6)
    return Table(PLAIN, np.column_stack([x, rng.random(rows) < 1 / (1 + np.exp(-(x @ slopes)))]).astype(float))


def best_generator(real: Table, rows: int, rng: np.random.Generator) -> Table:
    """Rows of a generator whose effects are exactly those of its patients."""
    found = fit_effects({"real": real}, "real", "y", 1).effects["real"]
    unit = real.values[:, :4].std(axis=0)  # effects are per standard deviation
    return draw(rows, rng, found.values / unit)


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_permuted_outcome_is_rejected_five_times_in_a_hundred() -> None:
    models = fit_effects({"synthetic": patients(1500, 0)}, "synthetic", "died", 1)
    found = permuted_rejections(models, "synthetic", rng_of(0), permutations=200)
    assert found is not None and found.low < 0.05 < found.high and found.high - found.low < 0.05


def test_new_patients_have_dispersion_one_and_its_p_value_is_uniform() -> None:
    p_values, values = [], []
    for seed in range(60):
        rng = rng_of(seed)
        models = fit_effects({"one": draw(500, rng), "two": draw(400, rng)}, "one", "y", 1)
        found = dispersion(models.effects["one"], models.effects["two"])
        p_values.append(found.p_value)
        values.append(found.value)
    assert np.mean(values) == pytest.approx(1.0, abs=4 * np.sqrt(2 / 4 / 60))
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3


def test_the_dispersion_of_one_effect_by_hand() -> None:
    found = dispersion(Effects(9, np.array([1.0]), np.array([[0.09]])), Effects(9, np.array([0.0]), np.array([[0.16]])))
    assert found.value == pytest.approx(1 / 0.25)
    assert found.p_value == pytest.approx(2 * stats.norm.sf(2.0)) and found.within == 0


def test_the_best_generator_of_many_rows_has_the_dispersion_that_is_said_of_it() -> None:
    """Cohorts of twice as many rows as patients: what `best` expects is found, and is more than 1."""
    measured, best, controls = [], [], []
    for seed in range(40):
        rng = rng_of(seed)
        real, held_out = draw(300, rng), draw(400, rng)
        found = measure_inflation(best_generator(real, 600, rng), real, held_out, "y", 1, rng)
        assert found.synthetic is not None and found.real is not None and found.best is not None
        assert found.at_least == pytest.approx(3**0.5)
        measured.append(found.synthetic.value)
        controls.append(found.real.value)
        best.append(found.best)
    assert np.mean(best) > 1.6
    assert np.mean(measured) == pytest.approx(np.mean(best), rel=0.3)
    assert np.mean(controls) == pytest.approx(1.0, abs=0.35)


def test_nominal_standard_errors_of_the_best_generator_are_too_small_by_at_least() -> None:
    """√(1 + M/n): the spread of a cohort's estimates around the truth, over studies with patients of their own."""
    errors, nominal = [], []
    for seed in range(120):
        rng = rng_of(seed)
        cohort = best_generator(draw(300, rng), 900, rng)
        fit = fit_effects({"c": cohort}, "c", "y", 1).effects["c"]
        unit = cohort.values[:, :4].std(axis=0)
        errors.append(fit.values / unit - TRUTH)
        nominal.append(fit.errors / unit)
    ratio = np.sqrt(np.mean(np.square(errors)) / np.mean(np.square(nominal)))
    assert ratio == pytest.approx(2.0, rel=0.15)


def test_cohorts_of_one_generator_never_show_it_and_cohorts_of_several_do() -> None:
    rng = rng_of(3)
    slopes = TRUTH + rng.normal(0, 0.3, 4)  # what one generator learned, wrong as it is
    same = spread_over_cohorts([draw(500, rng, slopes) for _ in range(30)], "y", 1)
    own = spread_over_cohorts([best_generator(draw(250, rng), 500, rng) for _ in range(30)], "y", 1)
    assert same == pytest.approx(1.0, abs=0.15)
    assert own == pytest.approx(np.sqrt(1 + 500 / 250), rel=0.2)
    with pytest.raises(DataError, match="at least two"):
        spread_over_cohorts([draw(50, rng)], "y", 1)


def test_a_generator_with_wrong_effects_is_worse_than_the_best() -> None:
    rng = rng_of(4)
    found = measure_inflation(draw(2000, rng, -TRUTH), draw(1000, rng), draw(1000, rng), "y", 1, rng)
    assert found.synthetic is not None and found.best is not None and found.real is not None
    assert found.synthetic.value > 10 * found.best and found.synthetic.p_value < 1e-6
    assert found.real.p_value > 1e-4


def test_what_cannot_be_measured_says_why() -> None:
    one_class = patients(100, 6)
    one_class.values[:, 4] = 1
    found = measure_inflation(patients(200, 5), patients(200, 7), one_class, "died", 1, rng_of(0))
    assert found.synthetic is None and "the test table has one outcome class" in found.reason
    with pytest.raises(DataError, match="no rows"):
        measure_inflation(patients(20, 5), patients(20, 7), Table(SCHEMA, np.empty((0, 5))), "died", 1, rng_of(0))
    assert spread_over_cohorts([one_class, one_class], "died", 1) is None
