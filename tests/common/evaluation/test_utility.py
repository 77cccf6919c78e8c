import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.compose import make_column_transformer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.impute import MissingIndicator, SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from common.errors import DataError
from common.evaluation.utility import Utility, UtilityGap, train_and_test, utility_gap
from common.schema import Schema, parse_schema
from common.table import Table

NAN = float("nan")


def schema_of(*outcomes: str, predictors: bool = True) -> Schema:
    fields: list[dict] = [
        {"name": "x", "type": "number", "constraints": {"minimum": -100, "maximum": 100}},
        {"name": "z", "type": "number", "constraints": {"minimum": -100, "maximum": 100}},
        {"name": "c", "type": "string", "constraints": {"enum": ["p", "q", "r"]}},
    ]
    target = {"name": "y", "type": "string", "constraints": {"enum": list(outcomes)}}
    return parse_schema({"fields": [*(fields if predictors else []), target], "cohortium:target": "y"})


BINARY = schema_of("alive", "dead")
TRIPLE = schema_of("home", "ward", "dead")


def draw(schema: Schema, rows: int, seed: int, missing: float = 0.15) -> Table:
    """Patients whose outcome depends on x (in a small unit, so that scaling matters), on z being missing and on c."""
    rng = np.random.default_rng(seed)
    x, z = rng.normal(0, 0.01, rows), rng.normal(50, 10, rows)
    c = rng.integers(0, 3, rows).astype(float)
    x[rng.random(rows) < missing] = NAN
    z[rng.random(rows) < missing] = NAN
    c[rng.random(rows) < missing] = NAN
    score = 300 * np.nan_to_num(x) + 2 * np.isnan(z) + (c == 1) - 0.5 * np.isnan(c) + rng.logistic(0, 1, rows)
    classes = len(schema["y"].levels)
    cuts = np.quantile(score, np.arange(1, classes) / classes)
    return Table(schema, np.column_stack([x, z, c, np.digitize(score, cuts)]))


def auroc_of_ranks(positive: np.ndarray, score: np.ndarray) -> float:
    """AUROC as the Mann-Whitney U statistic divided by the number of pairs."""
    u = stats.mannwhitneyu(score[positive], score[~positive]).statistic
    return float(u) / (int(positive.sum()) * int((~positive).sum()))


def frame_of(table: Table) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "x": table["x"],
            "z": table["z"],
            "c": pd.Categorical.from_codes(
                np.nan_to_num(table["c"], nan=-1).astype(int), categories=pd.Index(["p", "q", "r"])
            ),
        }
    )


def reference_probabilities(train: Table, test: Table, model: str) -> np.ndarray:
    """The same two models put together from scikit-learn's own preprocessing on data frames."""
    a, b, y = frame_of(train), frame_of(test), train["y"].astype(int)
    if model == "boosting":
        boosted = HistGradientBoostingClassifier(categorical_features="from_dtype", random_state=0).fit(a, y)
        return np.asarray(boosted.predict_proba(b))
    text = [frame.assign(c=frame["c"].astype(object).fillna("missing")) for frame in (a, b)]
    design = make_column_transformer(
        (make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), ["x", "z"]),
        (MissingIndicator(features="all"), ["x", "z"]),
        (OneHotEncoder(), ["c"]),
    )
    linear = make_pipeline(design, LogisticRegression(max_iter=5000)).fit(text[0], y)
    return np.asarray(linear.predict_proba(text[1]))


@pytest.mark.parametrize("schema", [BINARY, TRIPLE], ids=["binary", "three levels"])
def test_aurocs_agree_with_models_built_another_way(schema: Schema) -> None:
    train, test = draw(schema, 600, 0), draw(schema, 400, 1)
    found = train_and_test(train, test, "y", seed=0)
    outcome, classes = test["y"].astype(int), range(len(schema["y"].levels))
    for name, value in [("boosting", found.gradient_boosting), ("linear", found.logistic_regression)]:
        scores = reference_probabilities(train, test, name)
        expected = np.mean([auroc_of_ranks(outcome == k, scores[:, k]) for k in classes])
        assert value == pytest.approx(float(expected), abs=2e-4)
        assert value is not None and 0.75 < value < 1
    assert (found.train_rows, found.test_rows, found.reason) == (600, 400, "")


def test_an_outcome_that_follows_from_a_column_is_found_and_its_reverse_is_not() -> None:
    schema = schema_of("no", "yes")
    rng = np.random.default_rng(0)
    x = rng.normal(0, 3, 200)
    train = Table(schema, np.column_stack([x, x, np.zeros(200), x > 0]))
    reverse = Table(schema, np.column_stack([x, x, np.zeros(200), x <= 0]))
    found = train_and_test(train, train, "y", 0)
    assert (found.gradient_boosting, found.logistic_regression) == (1.0, 1.0)
    found = train_and_test(train, reverse, "y", 0)
    assert found.logistic_regression == 0.0
    assert found.gradient_boosting == pytest.approx(0.0, abs=0.01)


def test_a_boolean_target_works() -> None:
    schema = parse_schema(
        {
            "fields": [
                {"name": "n", "type": "integer", "constraints": {"minimum": 0, "maximum": 99}},
                {"name": "ill", "type": "boolean"},
            ]
        }
    )
    n = np.arange(100.0)
    table = Table(schema, np.column_stack([n, n >= 50]))
    assert train_and_test(table, table, "ill", 0).logistic_regression == 1.0


def test_a_level_that_training_lacks_scores_a_half() -> None:
    rng = np.random.default_rng(3)
    y = np.repeat([0.0, 1.0], 100)
    x = np.where(y == 1, 5.0, -5.0) + rng.normal(0, 0.1, 200)
    train = Table(TRIPLE, np.column_stack([x, np.zeros(200), np.zeros(200), y]))
    third = np.column_stack([np.full(20, -5.0), np.zeros(20), np.zeros(20), np.full(20, 2.0)])
    test = Table(TRIPLE, np.vstack([train.values, third]))
    found = train_and_test(train, test, "y", 0)
    boosted = HistGradientBoostingClassifier(random_state=0).fit(x[:, None], y.astype(int))
    p = boosted.predict_proba(test["x"][:, None])
    expected = (auroc_of_ranks(test["y"] == 0, p[:, 0]) + auroc_of_ranks(test["y"] == 1, p[:, 1]) + 0.5) / 3
    assert found.gradient_boosting == pytest.approx(expected, abs=5e-3)


def test_rows_without_an_outcome_are_counted_and_have_no_influence() -> None:
    train, test = draw(BINARY, 300, 4), draw(BINARY, 200, 5)
    clean = train_and_test(train, test, "y", 0)
    extra = draw(BINARY, 50, 6)
    extra.values[:, BINARY.index("y")] = NAN
    found = train_and_test(
        Table(BINARY, np.vstack([train.values, extra.values])),
        Table(BINARY, np.vstack([extra.values[:20], test.values])),
        "y",
        0,
    )
    assert (found.train_rows, found.train_left_out) == (300, 50)
    assert (found.test_rows, found.test_left_out) == (200, 20)
    assert found.gradient_boosting == clean.gradient_boosting
    assert found.logistic_regression == pytest.approx(clean.logistic_regression, abs=1e-12)


@pytest.mark.parametrize("filler", [NAN, 0.1], ids=["all missing", "constant"])
def test_a_column_without_information_in_training_changes_nothing(filler: float) -> None:
    train, test = draw(BINARY, 300, 7), draw(BINARY, 200, 8)
    train.values[:, 1] = filler
    quiet = Table(BINARY, test.values.copy())
    quiet.values[:, 1] = filler
    found, expected = train_and_test(train, test, "y", 0), train_and_test(train, quiet, "y", 0)
    assert found.gradient_boosting == expected.gradient_boosting
    assert found.logistic_regression == pytest.approx(expected.logistic_regression, abs=1e-3)
    assert found.logistic_regression is not None and found.logistic_regression > 0.7


def test_missing_in_the_test_table_alone_is_no_error() -> None:
    train, test = draw(BINARY, 300, 9, missing=0), draw(BINARY, 200, 10, missing=0.5)
    found = train_and_test(train, test, "y", 0)
    assert found.gradient_boosting is not None and found.logistic_regression is not None


@pytest.mark.parametrize("which", ["training", "test"])
@pytest.mark.parametrize(
    ("outcome", "reason"),
    [(1.0, "one outcome class only"), (NAN, "no row with a known outcome")],
)
def test_a_table_that_allows_no_auroc_gives_a_reason(which: str, outcome: float, reason: str) -> None:
    tables = {"training": draw(BINARY, 50, 11), "test": draw(BINARY, 40, 12)}
    tables[which].values[:, BINARY.index("y")] = outcome
    found = train_and_test(tables["training"], tables["test"], "y", 0)
    assert (found.gradient_boosting, found.logistic_regression) == (None, None)
    assert which in found.reason and reason in found.reason


def test_an_empty_table_and_a_lone_target_give_a_reason() -> None:
    full = draw(BINARY, 50, 13)
    empty = Table(BINARY, np.empty((0, 4)))
    assert "no row" in train_and_test(full, empty, "y", 0).reason
    assert "no row" in train_and_test(empty, full, "y", 0).reason
    blank = Table(BINARY, full.values.copy())
    blank.values[:, :3] = NAN
    assert "no known value besides the target" in train_and_test(blank, full, "y", 0).reason
    lone = Table(schema_of("a", "b", predictors=False), np.array([[0.0], [1.0]]))
    assert "no known value besides the target" in train_and_test(lone, lone, "y", 0).reason


def test_a_class_with_one_member_in_a_large_table_is_no_error() -> None:
    rng = np.random.default_rng(14)
    values = np.column_stack([rng.normal(0, 1, (10_001, 2)), np.zeros(10_001), np.zeros(10_001)])
    values[0, 3] = 1
    table = Table(BINARY, values)
    assert train_and_test(table, table, "y", 0).gradient_boosting is not None


def test_what_cannot_be_a_target_is_refused() -> None:
    table = draw(BINARY, 20, 15)
    for target in ("x", "nonsense"):
        with pytest.raises(DataError, match="not a column with categories"):
            train_and_test(table, table, target, 0)
    with pytest.raises(DataError, match="different schemas"):
        train_and_test(table, draw(TRIPLE, 20, 15), "y", 0)


def test_the_gap_is_trtr_less_tstr_and_none_where_either_is_none() -> None:
    synthetic, real = Utility(0.6, None, 9, 9, 0, 0), Utility(0.7, 0.8, 9, 9, 0, 0)
    gap = utility_gap(synthetic, real)
    assert isinstance(gap, UtilityGap)
    assert gap.gradient_boosting == pytest.approx(0.1)
    assert gap.logistic_regression is None
    assert utility_gap(real, synthetic).gradient_boosting == pytest.approx(-0.1)
