"""ROC curves against scikit-learn's, and what makes one impossible."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from common.evaluation.outcome_models import fit_outcome_models
from common.evaluation.roc import POINTS, curve, roc_curves
from common.table import Table
from tests.common.evaluation.evaluated import SCHEMA, patients


@given(st.integers(0, 10_000), st.integers(20, 300), st.integers(2, 40))
@settings(deadline=None, max_examples=40)
def test_the_curve_lies_on_that_of_scikit_learn(seed: int, rows: int, steps: int) -> None:
    random = np.random.default_rng(seed)
    truth = np.append([True, False], random.random(rows) < 0.3)
    scores = random.integers(0, steps, rows + 2).astype(float)  # many ties
    wrong, found, _ = roc_curve(truth, scores, drop_intermediate=False)
    at = np.linspace(0, 1, POINTS)
    expected = np.interp(at, wrong, found)
    assert np.allclose(curve(truth, scores), expected, atol=1e-4)
    assert np.all(np.diff(curve(truth, scores)) >= 0) and curve(truth, scores)[-1] == 1.0


def test_a_perfect_score_finds_everybody_at_once() -> None:
    truth = np.array([True] * 5 + [False] * 20)
    assert set(curve(truth, truth.astype(float))) == {1.0}


def test_curves_of_models_have_the_auroc_of_their_scores() -> None:
    train, test = patients(400, 1), patients(300, 2)
    known = Table(SCHEMA, test.values[~np.isnan(test["died"])])
    models = fit_outcome_models(train, "died", 0)
    for model, found in zip(models, roc_curves(models, test, "died"), strict=True):
        scores = model.probabilities(known)[:, 1]
        assert found.auroc is not None and found.patients == len(known)
        assert found.auroc.value == pytest.approx(roc_auc_score(known["died"], scores))
        assert np.trapezoid(found.sensitivity, np.linspace(0, 1, POINTS)) == pytest.approx(found.auroc.value, abs=0.02)


def test_few_patients_with_the_outcome_give_a_reason() -> None:
    test = patients(60, 2)
    rare = Table(SCHEMA, test.values[np.flatnonzero(test["died"] == 0)])
    for found in roc_curves(fit_outcome_models(patients(400, 1), "died", 0), rare, "died"):
        assert found.auroc is None and found.sensitivity == ()
        assert found.reason == "not possible because fewer than 11 patients are known to have 'true', or not to have it"
