import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss

from common.evaluation.calibration import calibrate, calibration_of, predicted_levels
from common.evaluation.outcome_models import fit_outcome_models
from common.table import Table
from tests.common.evaluation.evaluated import SCHEMA, patients


def predictions(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and outcomes that follow them."""
    rng = np.random.default_rng(seed)
    true = expit(rng.normal(-0.5, 1.2, rows))
    return true, rng.random(rows) < true


def test_true_probabilities_are_calibrated() -> None:
    hits = {"intercept": 0, "slope": 0}
    for seed in range(200):
        found = calibration_of("m", "yes", *predictions(400, seed))
        for name, right in (("intercept", 0.0), ("slope", 1.0)):
            estimate = getattr(found, name)
            hits[name] += estimate.low <= right <= estimate.high
    assert all(0.9 < count / 200 <= 0.99 for count in hits.values())


def test_intercept_and_slope_undo_a_distortion_of_the_logit() -> None:
    true, outcome = predictions(20_000, 1)
    # Too extreme by a factor of 2, so that the slope is 1/2; and all too high by 0.7.
    extreme = calibration_of("m", "yes", expit(2 * logit(true)), outcome).slope
    high = calibration_of("m", "yes", expit(logit(true) + 0.7), outcome)
    assert extreme is not None and extreme.value == pytest.approx(0.5, abs=0.03)
    assert high.intercept is not None and high.intercept.value == pytest.approx(-0.7, abs=0.06)
    assert high.slope is not None and high.slope.value == pytest.approx(1.0, abs=0.06)


def test_slope_and_brier_score_agree_with_scikit_learn() -> None:
    true, outcome = predictions(500, 2)
    found = calibration_of("m", "yes", true, outcome)
    model = LogisticRegression(C=np.inf, tol=1e-10).fit(logit(true)[:, None], outcome)
    assert found.slope is not None and found.slope.value == pytest.approx(model.coef_[0, 0], abs=1e-4)
    assert found.brier == pytest.approx(brier_score_loss(outcome, true))
    assert found.brier_prevalence == pytest.approx(brier_score_loss(outcome, np.full(500, outcome.mean())))


def test_the_curve_has_every_patient_once_and_its_intervals_hold() -> None:
    true, outcome = predictions(2000, 3)
    curve = calibration_of("m", "yes", true, outcome).curve
    assert [each.patients for each in curve] == [200] * 10
    assert [each.predicted for each in curve] == sorted(each.predicted for each in curve)
    assert sum(each.patients * each.observed.value for each in curve) == pytest.approx(outcome.sum())
    order = np.argsort(true)[:200]
    assert curve[0].predicted == pytest.approx(true[order].mean())
    assert curve[0].observed.value == pytest.approx(outcome[order].mean())
    assert sum(each.observed.low <= each.predicted <= each.observed.high for each in curve) >= 8


@pytest.mark.parametrize(("rows", "bins"), [(60, 5), (40, 3)])
def test_no_bin_holds_fewer_than_eleven_patients(rows: int, bins: int) -> None:
    true = np.linspace(0.2, 0.8, rows)
    curve = calibration_of("m", "yes", true, np.arange(rows) % 2 == 0).curve
    assert len(curve) == bins and min(each.patients for each in curve) >= 11


def test_ties_stay_in_one_bin_and_leave_none_small() -> None:
    predicted = np.repeat([0.1, 0.4, 0.41, 0.9], [80, 5, 5, 30])
    outcome = np.arange(120) % 3 == 0
    curve = calibration_of("m", "yes", predicted, outcome).curve
    assert sum(each.patients for each in curve) == 120
    assert min(each.patients for each in curve) >= 11


def test_models_are_judged_on_patients_with_a_known_outcome() -> None:
    train, test = patients(1500, 4), patients(1000, 5)
    models = fit_outcome_models(train, "died", 0)
    found = calibrate(models, test, "died")
    known = ~np.isnan(test["died"])
    assert [each.model for each in found] == ["gradient_boosting", "logistic_regression"]
    assert {each.patients for each in found} == {int(known.sum())} and {each.level for each in found} == {"true"}
    predicted = models[1].probabilities(Table(SCHEMA, test.values[known]))[:, 1]
    assert found[1].brier == pytest.approx(brier_score_loss(test["died"][known] == 1, predicted))
    slope = found[1].slope
    assert slope is not None and slope.low < 1 < slope.high


def test_every_level_of_more_than_two_is_judged() -> None:
    assert predicted_levels(SCHEMA, "stage") == (0, 1, 2) and predicted_levels(SCHEMA, "died") == (1,)
    found = calibrate(fit_outcome_models(patients(500, 6), "stage", 0), patients(400, 7), "stage")
    assert [each.level for each in found] == ["I", "II", "III"] * 2


def test_what_cannot_be_judged_says_why() -> None:
    true, outcome = predictions(100, 8)
    one = calibration_of("m", "yes", true, np.ones(100, dtype=bool))
    assert one.brier is None and "fewer than 11 patients" in one.reason
    flat = calibration_of("m", "yes", np.full(100, 0.3), outcome)
    assert flat.slope is None and "the same for everybody" in flat.reason and flat.brier is not None
    # Every prediction right: the slope would be infinite.
    certain = calibration_of("m", "yes", outcome.astype(float), outcome)
    assert certain.slope is None and "separation" in certain.reason and certain.brier == 0
    empty = calibrate(fit_outcome_models(patients(200, 9), "died", 0), Table(SCHEMA, np.empty((0, 5))), "died")
    assert all(each.reason and each.patients == 0 for each in empty)
