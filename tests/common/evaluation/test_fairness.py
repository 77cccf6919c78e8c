import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from common.errors import DataError
from common.evaluation.fairness import FLOOR, Group, by_group, group_names
from common.evaluation.outcome_models import OutcomeModel, fit_outcome_models
from common.schema import parse_schema
from common.table import Table
from tests.common.evaluation.evaluated import SCHEMA, patients


def models_of(synthetic: Table, real: Table) -> dict[str, OutcomeModel]:
    return {"tstr": fit_outcome_models(synthetic, "died", 0)[0], "trtr": fit_outcome_models(real, "died", 0)[0]}


def only(groups: list[Group], column: str, name: str) -> Group:
    (found,) = [each for each in groups if (each.column, each.group) == (column, name)]
    return found


def test_every_group_has_its_own_auroc_and_patients() -> None:
    synthetic, real, test = patients(900, 0), patients(800, 1), patients(700, 2)
    models = models_of(synthetic, real)
    found = by_group(synthetic, real, test, ["sex", "age"], target="died", models=models)
    assert [(g.column, g.group) for g in found] == [
        ("sex", "f"), ("sex", "m"), ("age", "18 to 38"), ("age", "38 to 58"), ("age", "58 to 78"), ("age", "78 to 98"),
    ]  # fmt: skip
    inside = (test["age"] >= 38) & (test["age"] < 58)
    group = only(found, "age", "38 to 58")
    assert group.held_out == inside.sum()
    assert group.patients == ((real["age"] >= 38) & (real["age"] < 58)).sum()
    known = inside & ~np.isnan(test["died"])
    for utility in group.utility:
        scores = models[utility.trained_on].probabilities(test)[known, 1]
        assert utility.auroc is not None and utility.intercept is not None
        assert utility.auroc.value == pytest.approx(float(roc_auc_score(test["died"][known], scores)))
        assert utility.auroc.low < utility.auroc.value < utility.auroc.high
    assert [utility.trained_on for utility in group.utility] == ["tstr", "trtr"]


def test_a_group_that_the_cohort_got_wrong_stands_out() -> None:
    synthetic, real = patients(3000, 3), patients(3000, 4)
    women = synthetic["sex"] == 0
    synthetic.values[women, 0] = np.clip(synthetic.values[women, 0] + 25, 18, 98)
    found = by_group(synthetic, real, None, ["sex"])
    women_, men = only(found, "sex", "f"), only(found, "sex", "m")
    assert women_.distance is not None and women_.chance is not None and women_.distance > 3 * women_.chance
    assert men.distance is not None and men.chance is not None and men.distance < 1.5 * men.chance
    assert women_.utility == () and women_.held_out == 0


@pytest.mark.parametrize("few", [1, FLOOR - 1])
def test_a_small_group_is_suppressed_with_the_one_that_would_reveal_it(few: int) -> None:
    synthetic, real, test = patients(300, 5), patients(300, 6), patients(300, 7)
    real.values[:, 2] = (np.arange(300) < few).astype(float)
    test.values[:, 2] = real.values[:, 2]
    models = models_of(synthetic, patients(300, 8))
    found = by_group(synthetic, real, test, ["sex", "stage"], target="died", models=models)
    for name in ("f", "m"):  # with 300 patients in all, the number of one group gives the other's
        group = only(found, "sex", name)
        assert (group.patients, group.held_out, group.distance) == (None, None, None) and "suppressed" in group.reason
        assert all(u.auroc is None and "suppressed" in u.reason for u in group.utility)
    assert only(found, "stage", "I").patients is not None


def test_a_group_with_enough_patients_but_few_outcomes_has_no_auroc() -> None:
    synthetic, real, test = patients(400, 9), patients(400, 10), patients(400, 11)
    men = np.flatnonzero(test["sex"] == 1)
    test.values[men, 4] = 0.0
    test.values[men[:5], 4] = 1.0
    found = by_group(synthetic, real, test, ["sex"], target="died", models=models_of(synthetic, real))
    men_, women = only(found, "sex", "m"), only(found, "sex", "f")
    assert men_.held_out == men.size and all(u.auroc is None and "fewer than 11" in u.reason for u in men_.utility)
    assert all(u.auroc is not None for u in women.utility)


def test_sites_are_compared_with_the_whole_cohort() -> None:
    synthetic, real = patients(2000, 12), patients(1000, 13)
    sites = np.where(real["age"] > 70, "geriatric", "general")
    sites[:7] = "tiny"
    found = by_group(synthetic, real, None, [], sites=sites.tolist())
    assert [g.group for g in found] == ["general", "geriatric", "tiny"] and {g.column for g in found} == {"site"}
    geriatric = only(found, "site", "geriatric")
    assert geriatric.distance is None  # the smaller of the others hides the number of the tiny site
    assert only(found, "site", "tiny").patients is None and geriatric.synthetic == 2000
    found = by_group(synthetic, real, None, [], sites=np.where(real["age"] > 70, "geriatric", "general").tolist())
    geriatric = only(found, "site", "geriatric")
    assert geriatric.distance is not None and geriatric.chance is not None
    assert geriatric.distance > 3 * geriatric.chance
    with pytest.raises(DataError, match="2 sites are named for 1000"):
        by_group(synthetic, real, None, [], sites=["a", "b"])


def test_groups_of_dates_and_missing_values_have_names() -> None:
    bounds = {"minimum": "2020-01-01", "maximum": "2020-01-09"}
    schema = parse_schema({"fields": [{"name": "day", "type": "date", "constraints": bounds}]})
    assert group_names(schema["day"]) == [
        "2020-01-01 to 2020-01-03", "2020-01-03 to 2020-01-05", "2020-01-05 to 2020-01-07", "2020-01-07 to 2020-01-09",
        "missing",
    ]  # fmt: skip
    assert group_names(SCHEMA["sex"]) == ["f", "m"]


def test_a_group_on_one_side_only_says_so_and_unknown_names_are_refused() -> None:
    synthetic, real = patients(200, 14), patients(200, 15)
    synthetic.values[:, 2] = 0
    assert "no synthetic row" in only(by_group(synthetic, real, None, ["sex"]), "sex", "m").reason
    with pytest.raises(DataError, match="no such column: 'nonsense'"):
        by_group(synthetic, real, None, ["nonsense"])
    with pytest.raises(DataError, match="no rows"):
        by_group(Table(SCHEMA, np.empty((0, 5))), real, None, ["sex"])
