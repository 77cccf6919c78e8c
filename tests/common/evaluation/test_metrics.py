import json

import numpy as np
import pytest

from common.errors import DataError
from common.evaluation.fidelity import compare
from common.evaluation.metrics import evaluate
from common.evaluation.utility import train_and_test
from common.schema import Schema, parse_schema
from common.table import Table

FIELDS = [
    {"name": "x", "type": "number", "constraints": {"minimum": 0, "maximum": 1}},
    {"name": "lab", "type": "number", "constraints": {"minimum": 0, "maximum": 1}},
    {"name": "y", "type": "boolean"},
]
SCHEMA = parse_schema({"fields": FIELDS, "cohortium:target": "y"})


def draw(rows: int, seed: int, schema: Schema = SCHEMA) -> Table:
    rng = np.random.default_rng(seed)
    x = rng.random(rows)
    return Table(schema, np.column_stack([x, rng.random(rows), x + rng.normal(0, 0.3, rows) > 0.5]))


def test_the_document_repeats_what_its_parts_found() -> None:
    synthetic, real, test = draw(120, 0), draw(100, 1), draw(80, 2)
    document = json.loads(json.dumps(evaluate(synthetic, real, test, 0), allow_nan=False))
    fidelity = compare(synthetic, real)
    assert document["schema_version"] == 1
    assert document["rows"] == {"synthetic": 120, "real": 100, "test": 80}
    assert document["target"] == "y"
    assert document["fidelity"]["ks"] == fidelity.ks
    assert document["fidelity"]["correlation_difference"] == fidelity.correlation_difference
    tstr, trtr = train_and_test(synthetic, test, "y", 0), train_and_test(real, test, "y", 0)
    assert document["utility"]["tstr"]["logistic_regression"] == tstr.logistic_regression
    assert document["utility"]["trtr"]["train_rows"] == 100
    assert tstr.gradient_boosting is not None and trtr.gradient_boosting is not None
    assert document["utility"]["gap"]["gradient_boosting"] == pytest.approx(
        trtr.gradient_boosting - tstr.gradient_boosting
    )
    assert document["utility_reason"] == ""


def test_the_caution_says_un_noised_how_many_patients_and_no_epsilon() -> None:
    text = evaluate(draw(30, 0), draw(41, 1), draw(23, 2), 0)["caution"]
    for part in ("Un-noised", "simulation", "n = 41", "n = 23", "no ε", "excluding this evaluation"):
        assert part in text
    assert "held-out" not in evaluate(draw(30, 0), draw(41, 1), None, 0)["caution"]


def test_without_test_or_target_utility_is_null_with_a_reason() -> None:
    document = evaluate(draw(30, 0), draw(30, 1), None, 0)
    assert document["utility"] is None and "no test table" in document["utility_reason"]
    assert document["rows"]["test"] is None
    aimless = parse_schema({"fields": FIELDS})
    document = evaluate(draw(30, 0, aimless), draw(30, 1, aimless), draw(30, 2, aimless), 0)
    assert document["utility"] is None and "no target" in document["utility_reason"]


def test_degenerate_columns_leave_null_and_not_nan() -> None:
    synthetic, real, test = draw(60, 0), draw(60, 1), draw(60, 2)
    real.values[:, SCHEMA.index("lab")] = np.nan
    real.values[:, SCHEMA.index("x")] = 0.25
    synthetic.values[:, SCHEMA.index("y")] = 1.0
    document = json.loads(json.dumps(evaluate(synthetic, real, test, 0), allow_nan=False))
    assert document["fidelity"]["ks"]["lab"] is None
    assert document["fidelity"]["skipped"] == ["lab"]
    assert document["fidelity"]["correlation_difference"] is None
    assert document["utility"]["tstr"]["gradient_boosting"] is None
    assert "one outcome class" in document["utility"]["tstr"]["reason"]
    assert document["utility"]["gap"] == {"gradient_boosting": None, "logistic_regression": None}


def test_an_empty_test_table_is_a_reason_and_not_an_error() -> None:
    empty = Table(SCHEMA, np.empty((0, 3)))
    document = evaluate(draw(30, 0), draw(30, 1), empty, 0)
    assert "no row" in document["utility"]["trtr"]["reason"]


def test_an_empty_cohort_and_foreign_tables_are_refused() -> None:
    real, other = draw(20, 0), draw(20, 0, parse_schema({"fields": FIELDS}))
    with pytest.raises(DataError, match="no rows"):
        evaluate(Table(SCHEMA, np.empty((0, 3))), real, None, 0)
    with pytest.raises(DataError, match="different schemas"):
        evaluate(other, real, None, 0)
    with pytest.raises(DataError, match="test table has another schema"):
        evaluate(real, real, other, 0)
