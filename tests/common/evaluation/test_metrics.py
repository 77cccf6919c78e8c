import json
from typing import Any

import numpy as np
import pytest

from common.errors import DataError
from common.evaluation.detection import detect
from common.evaluation.fidelity import compare
from common.evaluation.inference import compare_effects
from common.evaluation.metrics import evaluate
from common.evaluation.pairs import compare_pairs
from common.evaluation.plain import plain
from common.evaluation.utility import train_and_test
from common.schema import Schema, parse_schema
from common.table import Table
from tests.common.evaluation.evaluated import SCHEMA as CLINICAL
from tests.common.evaluation.evaluated import patients

PARTS = (
    "pairs", "correlations", "missingness", "detection", "calibration", "roc", "effects", "inflation", "groups",
    "attacks",
)  # fmt: skip
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
    assert document["schema_version"] == 2
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


def strict(document: dict[str, Any]) -> dict[str, Any]:
    """As a reader of the file gets it; a number that is not finite is an error."""
    return json.loads(json.dumps(document, allow_nan=False))


def test_a_thorough_evaluation_repeats_its_parts_and_names_its_times() -> None:
    synthetic, real, test = patients(400, 0), patients(350, 1), patients(300, 2)
    seconds: dict[str, float] = {}
    sites = ["north"] * 200 + ["south"] * 150
    document = strict(
        evaluate(synthetic, real, test, 7, groups=["sex"], sites=sites, secrets=["stage"], on_part=seconds.__setitem__)
    )
    assert [document[name]["reason"] for name in PARTS] == [""] * len(PARTS)
    assert list(seconds) == ["fidelity", "utility", *PARTS] and min(seconds.values()) >= 0
    assert document["pairs"]["mean"] == compare_pairs(synthetic, real).mean
    first = np.random.default_rng(7).spawn(1)[0]
    found = detect(synthetic, real, first)
    assert found.auroc is not None and document["detection"]["exact"]["auroc"]["value"] == found.auroc.value
    assert document["detection"]["binned"]["values"] == "binned"
    matrix = document["correlations"]["real"]
    assert len(matrix) == len(matrix[0]) == len(document["correlations"]["features"]) == 7
    assert [each["model"] for each in document["calibration"]["tstr"]] == ["gradient_boosting", "logistic_regression"]
    (effects,) = document["effects"]["levels"]
    assert effects["overlap"] == compare_effects(synthetic, real, "died", 1).overlap
    assert document["inflation"]["levels"][0]["at_least"] == pytest.approx((1 + 400 / 350) ** 0.5, rel=0.05)
    assert {(g["column"], g["group"]) for g in document["groups"]["groups"]} == {
        ("sex", "f"), ("sex", "m"), ("site", "north"), ("site", "south"),
    }  # fmt: skip
    report = document["attacks"]["report"]
    assert report["rows"] == {"synthetic": 400, "train": 350, "control": 300, "reference": None}
    assert "no ε" in report["caution"] and document["sampled"] == {}
    assert {a["counts"]["secret"] for a in report["attacks"] if a["counts"]["attack"] == "inference"} == {"stage"}


def test_a_thorough_evaluation_depends_on_nothing_but_its_seed() -> None:
    tables = patients(120, 0), patients(110, 1), patients(100, 2)
    assert evaluate(*tables, 3, groups=["sex"]) == evaluate(*tables, 3, groups=["sex"])


def test_less_can_be_asked_for() -> None:
    tables = draw(60, 0), draw(60, 1), draw(60, 2)
    short, whole = evaluate(*tables, 0, thorough=False), evaluate(*tables, 0)
    assert not set(PARTS) & set(short) and set(PARTS) < set(whole)
    assert {name: whole[name] for name in short} == short


def ruined(which: int, how: str) -> tuple[Table, Table, Table]:
    """Three tables, one of which is spoilt."""
    tables = [patients(90, 0), patients(80, 1), patients(70, 2)]
    values = tables[which].values
    match how:
        case "one class":
            values[:, 4] = 1.0
        case "no outcome":
            values[:, 4] = np.nan
        case "no value in a column":
            values[:, 1] = np.nan
        case "withheld though required":
            values[:, 0] = np.nan
        case "constant":
            values[:, :4] = 0.0
        case "nothing":
            values[:, :] = np.nan
        case "one row":
            tables[which] = Table(CLINICAL, values[:1])
        case "no rows":
            tables[which] = Table(CLINICAL, values[:0])
    return tables[0], tables[1], tables[2]


SPOILT = (
    "one class",
    "no outcome",
    "no value in a column",
    "withheld though required",
    "constant",
    "nothing",
    "one row",
)


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_no_table_that_can_be_read_breaks_a_part_or_leaves_nan(which: int, how: str) -> None:
    document = strict(evaluate(*ruined(which, how), 0, groups=["sex", "creatinine"]))
    assert set(PARTS) < set(document)
    if how in ("one class", "no outcome", "nothing"):
        level = document["effects"]["levels"][0]
        inflated = document["inflation"]["levels"][0]
        assert "not possible because" in inflated["reason"]
        assert ("not possible because" in level["reason"]) == (which < 2)
        told = document["calibration"]["reason"] + "".join(each["reason"] for each in document["calibration"]["trtr"])
        assert "not possible because" in told or which == 0


def test_parts_that_need_patients_or_a_target_say_so() -> None:
    document = strict(evaluate(draw(60, 0), draw(60, 1), None, 0))
    for name in ("calibration", "inflation", "attacks"):
        assert document[name]["reason"].startswith("not possible because no test table was given")
    assert "no column was named as a group" in document["groups"]["reason"]
    assert document["effects"]["reason"] == "" and document["detection"]["reason"] == ""
    document = strict(evaluate(*ruined(2, "no rows"), 0))
    assert "no rows" in document["attacks"]["reason"] and "no rows" in document["inflation"]["reason"]
    aimless = parse_schema({"fields": FIELDS})
    document = strict(evaluate(draw(60, 0, aimless), draw(60, 1, aimless), draw(60, 2, aimless), 0))
    for name in ("calibration", "roc", "effects", "inflation"):
        assert "the schema names no target" in document[name]["reason"]
    assert document["attacks"]["reason"] == "" and document["pairs"]["mean"] is not None


def test_a_group_or_secret_that_is_no_column_is_refused_before_anything_is_measured() -> None:
    for groups, secrets in (["height"], []), ([], ["height"]):
        with pytest.raises(DataError, match="no such column: 'height'"):
            evaluate(draw(20, 0), draw(20, 1), None, 0, groups=groups, secrets=secrets)


def test_two_hundred_columns_are_evaluated_and_what_was_cut_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.evaluation.metrics.DETECTION_VALUES", 200 * 100)
    monkeypatch.setattr("common.evaluation.metrics.ATTACK_ROWS", 80)
    fields = [{"name": f"c{j}", "type": "boolean"} for j in range(100)]
    fields += [{"name": f"n{j}", "type": "number", "constraints": {"minimum": 0, "maximum": 1}} for j in range(100)]
    wide = parse_schema({"fields": fields, "cohortium:target": "c0"})
    rng = np.random.default_rng(0)
    tables = [Table(wide, np.hstack([rng.integers(0, 2, (n, 100)), rng.random((n, 100))])) for n in (150, 140, 120)]
    document = strict(evaluate(tables[0], tables[1], tables[2], 0))
    assert document["pairs"]["pairs"] == 19_900 and len(document["correlations"]["features"]) == 60
    assert document["correlations"]["left_out"] == 140
    assert document["sampled"]["detection"] == {"synthetic": 100, "real": 100}
    assert document["sampled"]["attacks"] == {"synthetic": 80, "real": 80, "test": 80}
    (effects,) = document["effects"]["levels"]
    assert 0 < len(effects["effects"]) <= 15 and len(effects["left_out"]) > 100


def test_plain_leaves_json_types_only() -> None:
    assert plain({"a": np.array([1.0, np.nan]), "b": (np.int64(2), None, True), 3: np.inf}) == {
        "a": [1.0, None], "b": [2, None, True], "3": None,
    }  # fmt: skip
