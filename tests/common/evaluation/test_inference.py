import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from common.errors import DataError
from common.evaluation.attacks.risk import Estimate
from common.evaluation.effects import Term, fit_effects
from common.evaluation.inference import compare_effects, interval_overlap
from common.schema import parse_schema
from common.table import Table
from tests.common.evaluation.evaluated import SCHEMA, patients


def changed(table: Table, column: int, values: np.ndarray) -> Table:
    copy = table.values.copy()
    copy[:, column] = values
    return Table(table.schema, copy)


def most_common(values: np.ndarray) -> int:
    return int(np.bincount(values[~np.isnan(values)].astype(int)).argmax())


def test_the_coefficients_are_those_of_a_regression_on_a_data_frame() -> None:
    real, synthetic = patients(2500, 0), patients(2000, 1)
    found = compare_effects(synthetic, real, "died", 1)
    terms = {(e.term.column, e.term.level): e for e in found.effects}
    known = ~np.isnan(real["died"])
    common = most_common(real["stage"][known])
    for table, side in ((real, "real"), (synthetic, "synthetic")):
        frame = pd.DataFrame(table.values, columns=list(SCHEMA.names)).dropna(subset=["died"])
        patients_frame = pd.DataFrame(real.values, columns=list(SCHEMA.names)).dropna(subset=["died"])
        age, lab = (
            (frame[name] - patients_frame[name].mean()) / patients_frame[name].std(ddof=0)
            for name in ("age", "creatinine")
        )
        design = pd.DataFrame({("age", None): age, ("creatinine", None): lab.fillna(0)})
        design["lab gone"], design["stage gone"] = frame["creatinine"].isna(), frame["stage"].isna()
        other = 1 - most_common(real["sex"][known])
        design[("sex", SCHEMA["sex"].levels[other])] = frame["sex"] == other
        for level in {0, 1, 2} - {common}:
            design[("stage", SCHEMA["stage"].levels[level])] = frame["stage"] == level
        model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=500).fit(design.to_numpy(float), frame["died"] == 1)
        for name, value in zip(design.columns, model.coef_[0], strict=True):
            if name in terms:
                assert getattr(terms[name], side).value == pytest.approx(value, abs=1e-4)
    assert len(terms) == 5 and found.left_out == () and not found.ridge
    assert found.real_rows == int((~np.isnan(real["died"])).sum())


def test_two_samples_of_one_population_agree() -> None:
    found = compare_effects(patients(3000, 2), patients(3000, 3), "died", 1)
    assert found.clear >= 3 and found.same_sign_where_clear == 1 and found.found_again == 1
    assert found.overlap is not None and found.overlap > 0.4
    assert found.median_difference is not None and found.median_difference < 2.5


def test_a_cohort_that_lost_its_relations_does_not_agree() -> None:
    real = patients(3000, 4)
    lost = changed(real, 4, np.random.default_rng(0).permutation(real["died"]))
    found = compare_effects(lost, real, "died", 1)
    assert found.found_again is not None and found.found_again < 0.5
    assert found.overlap is not None and found.overlap < 0.6
    reverse = compare_effects(changed(real, 4, 1 - real["died"]), real, "died", 1)
    assert reverse.same_sign == 0 and reverse.found_again == 0 and reverse.clear >= 3
    assert all(e.synthetic.value == pytest.approx(-e.real.value, abs=1e-5) for e in reverse.effects)


def test_equal_tables_agree_wholly() -> None:
    real = patients(800, 5)
    found = compare_effects(real, real, "died", 1)
    assert found.same_sign == 1 and found.overlap == pytest.approx(1) and found.median_difference == 0


ends = st.tuples(st.floats(-5, 5), st.floats(0.1, 5)).map(lambda p: Estimate(p[0] + p[1] / 2, p[0], p[0] + p[1]))


@given(ends, ends)
def test_the_overlap_is_symmetric_one_for_equals_and_negative_apart(a: Estimate, b: Estimate) -> None:
    assert interval_overlap(a, b) == pytest.approx(interval_overlap(b, a))
    assert interval_overlap(a, a) == pytest.approx(1)
    assert interval_overlap(a, b) <= 1 + 1e-12
    if a.high < b.low:
        assert interval_overlap(a, b) < 0


def test_the_overlap_of_karr_by_hand() -> None:
    # [0, 2] and [1, 5] share [1, 2]: half of the one, a quarter of the other.
    assert interval_overlap(Estimate(1, 0, 2), Estimate(3, 1, 5)) == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_separation_is_shrunk_and_said() -> None:
    real = patients(600, 6)
    told = changed(real, 2, np.where(np.isnan(real["died"]), 0, real["died"]))
    found = compare_effects(told, real, "died", 1)
    assert found.ridge and found.effects and all(np.isfinite(e.synthetic.high) for e in found.effects)


def test_constant_rare_and_dependent_columns_are_left_out_by_name() -> None:
    fields = [
        {"name": "x", "type": "number", "constraints": {"minimum": -5, "maximum": 5}},
        {"name": "twice", "type": "number", "constraints": {"minimum": -10, "maximum": 10}},
        {"name": "fixed", "type": "number", "constraints": {"minimum": 0, "maximum": 1}},
        {"name": "never", "type": "number", "constraints": {"minimum": 0, "maximum": 1}},
        {"name": "rare", "type": "string", "constraints": {"enum": ["common", "rare"]}},
        {"name": "y", "type": "boolean"},
    ]
    schema = parse_schema({"fields": fields, "cohortium:target": "y"})
    tables = []
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        x = rng.normal(0, 1, 400).clip(-5, 5)
        y = rng.random(400) < 1 / (1 + np.exp(-x))
        columns = [x, 2 * x, np.full(400, 0.5), np.full(400, np.nan), np.arange(400) < 4, y]
        tables.append(Table(schema, np.column_stack(columns)))
    found = compare_effects(tables[0], tables[1], "y", 1)
    assert [e.term for e in found.effects] == [Term("x")]
    said = " ".join(found.left_out)
    assert "twice: follows from" in said and "fixed: too few" in said and "never: too few" in said
    assert "rare=rare: too few" in said


def test_few_outcomes_allow_few_terms() -> None:
    found = compare_effects(patients(60, 7), patients(60, 8), "died", 1)
    assert 0 < len(found.effects) < 5 and any("rarer outcome" in each for each in found.left_out)


def test_declared_columns_only() -> None:
    found = compare_effects(patients(500, 9), patients(500, 10), "died", 1, columns=["sex"])
    assert [e.term.column for e in found.effects] == ["sex"]
    for wrong in ("nonsense", "died"):
        with pytest.raises(DataError, match="no column whose effect"):
            compare_effects(patients(50, 0), patients(50, 1), "died", 1, columns=[wrong])


@pytest.mark.parametrize("value", [1.0, np.nan])
def test_no_regression_without_two_outcomes(value: float) -> None:
    real, synthetic = patients(100, 11), patients(100, 12)
    found = compare_effects(changed(synthetic, 4, np.full(100, value)), real, "died", 1)
    assert found.effects == () and found.overlap is None and "not possible because the synthetic" in found.reason
    hollow = Table(SCHEMA, np.column_stack([np.full((100, 4), np.nan), np.arange(100) % 2]))
    assert "no column has enough" in compare_effects(hollow, hollow, "died", 1).reason


def test_an_outcome_of_few_is_not_regressed() -> None:
    few = changed(patients(100, 13), 4, (np.arange(100) < 5).astype(float))
    models = fit_effects({"real": few}, "real", "died", 1)
    assert "fewer than 11 rows of the real table have 'true'" in models.reason
