import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from common.errors import DataError
from common.evaluation.attacks.counts import NotPossible
from common.evaluation.attacks.report import AttackReport, add_reports
from common.evaluation.attacks.suite import run_attacks
from common.schema import parse_schema
from common.table import Table
from tests.common.evaluation.attacks.patients import (
    SCHEMA,
    columns_of,
    head,
    jittered,
    levels,
    number,
    population,
    resampled,
    with_rows,
)

TRAIN, CONTROL, FRESH = population(1500, 1), population(1500, 2), population(1500, 3)


def attacked(
    synthetic: Table, train: Table = TRAIN, control: Table = CONTROL, seed: int = 0, **options
) -> AttackReport:
    return run_attacks(synthetic, train, control, np.random.default_rng(seed), **options)


@pytest.mark.parametrize(
    "leaky",
    [
        lambda: TRAIN,
        lambda: with_rows(FRESH, head(TRAIN, 15)),
        lambda: with_rows(FRESH, jittered(head(TRAIN, 30), 6, 0.003)),
        lambda: jittered(resampled(TRAIN, 1500, 4), 5, 0.03),
    ],
    ids=["the patients themselves", "1 % copies", "2 % near copies", "overfitted"],
)
def test_planted_leaks_are_found(leaky: Callable[[], Table]) -> None:
    overall = attacked(leaky()).to_json(0.999)["overall"]
    assert overall["p_value_bonferroni"] < 0.001
    assert "leaks" in overall["reading"]


def test_the_patients_themselves_are_found_by_every_attack() -> None:
    report = attacked(TRAIN).to_json(0.999)
    assert report["not_possible"] == []
    assert len(report["attacks"]) == 2 + 2 + len(SCHEMA.columns) + 3 + 3
    assert all(each["difference"]["low"] > 0.2 for each in report["attacks"])
    assert all("weaker" not in each["reading"] and not each["weaker_than_baseline"] for each in report["attacks"])
    assert len(report["membership"]) == 2
    for each in report["membership"]:
        assert each["auroc"]["low"] > 0.98
        assert all(t["true_positive_rate"]["low"] > 0.9 for t in each["true_positives"])


@pytest.mark.parametrize("seed", [3, 4, 5])
def test_an_independent_cohort_stays_near_chance(seed: int) -> None:
    report = attacked(population(1500, seed), reference=population(500, 77)).to_json(0.999)
    assert report["overall"]["p_value_bonferroni"] > 0.001
    assert "no evidence of privacy" in report["overall"]["reading"]
    for each in report["attacks"]:
        if each["counts"]["unit"] == "patient":
            assert each["difference"]["low"] <= 0 <= each["difference"]["high"]
    for each in report["membership"]:
        assert each["auroc"]["low"] < 0.5 < each["auroc"]["high"]


def test_the_report_is_plain_labelled_json() -> None:
    report = attacked(
        head(FRESH, 200), head(TRAIN, 150), head(CONTROL, 100), secrets=["age"], reference=population(50, 9)
    )
    text = json.dumps(report.to_json(), allow_nan=False)
    found = json.loads(text)
    for n in ("n = 150 training", "n = 100 control", "n = 50 reference", "no ε covers them", "Un-noised empirical"):
        assert n in found["caution"]
    assert found["rows"] == {"synthetic": 200, "train": 150, "control": 100, "reference": 50}
    assert [each["counts"]["secret"] for each in found["attacks"] if each["counts"]["attack"] == "inference"] == ["age"]


def test_the_same_seed_gives_the_same_report_and_inputs_stay_as_they_were() -> None:
    tables = head(FRESH, 200), head(TRAIN, 150), head(CONTROL, 100)
    before = [table.values.copy() for table in tables]
    assert attacked(*tables) == attacked(*tables)
    for table, values in zip(tables, before, strict=True):
        assert np.array_equal(table.values, values, equal_nan=True)


def test_hospitals_counts_add_up_to_one_report() -> None:
    cohort = head(FRESH, 300)
    parts = [attacked(cohort, population(n, n), population(m, m)) for n, m in ((200, 120), (90, 60))]
    total = add_reports(parts)
    assert (total.sites, total.train_rows, total.control_rows) == (2, 290, 180)
    assert total.synthetic_rows == 300
    for each in total.counts:
        same = [c for part in parts for c in part.counts if c.key == each.key]
        assert each.guesses == sum(c.guesses for c in same)
        assert each.control_successes == sum(c.control_successes for c in same)
    for each in total.scores:
        assert (sum(each.train), sum(each.control)) == (290, 180)
    # The smaller hospital cannot calibrate a rate of 1 %, which stays listed.
    assert [each.setting for each in total.not_possible] == ["false positives<=0.01"] * 2
    json.dumps(total.to_json(), allow_nan=False)


def test_counts_per_patient_do_not_depend_on_who_holds_them() -> None:
    # Linkability, inference and the copy check look at one patient at a time.
    cohort = head(FRESH, 300)
    halves = [(slice(0, 100), slice(0, 60)), (slice(100, 200), slice(60, 120))]
    parts = [attacked(cohort, Table(SCHEMA, TRAIN.values[a]), Table(SCHEMA, CONTROL.values[b])) for a, b in halves]
    together, apart = attacked(cohort, head(TRAIN, 200), head(CONTROL, 120)), add_reports(parts)
    for attack in ("linkability", "inference", "copies_exact", "copies_near", "copies_in_all_but_one_column"):
        a, b = ([c for c in report.counts if c.attack == attack] for report in (together, apart))
        assert [(c.key, c.guesses, c.successes, c.control_guesses, c.control_successes) for c in a] == [
            (c.key, c.guesses, c.successes, c.control_guesses, c.control_successes) for c in b
        ]
        assert a
    assert [(s.train, s.control) for s in together.scores] == [(s.train, s.control) for s in apart.scores]


@pytest.mark.parametrize("side", ["train", "control"])
@pytest.mark.parametrize("position", [0, 37])
def test_one_patient_changes_each_count_of_patients_by_one_at_most(side: str, position: int) -> None:
    cohort, train, control = head(FRESH, 200), head(TRAIN, 60), head(CONTROL, 60)
    changed = Table(SCHEMA, (train if side == "train" else control).values.copy())
    changed.values[position] = cohort.values[5]  # as exposed as can be
    before = attacked(cohort, train, control)
    after = attacked(cohort, changed, control) if side == "train" else attacked(cohort, train, changed)
    steps = []
    for a, b in zip(before.counts, after.counts, strict=True):
        if a.attack in ("linkability", "inference", "copies_exact", "copies_near", "copies_in_all_but_one_column"):
            assert a.key == b.key
            prefix = "" if side == "train" else "control_"
            steps.append(abs(getattr(a, f"{prefix}successes") - getattr(b, f"{prefix}successes")))
            assert abs(getattr(a, f"{prefix}guesses") - getattr(b, f"{prefix}guesses")) <= 1
            if side == "train":
                assert (a.control_guesses, a.control_successes) == (b.control_guesses, b.control_successes)
            else:
                assert (a.guesses, a.successes) == (b.guesses, b.successes)
    assert max(steps) == 1
    for a, b in zip(before.scores, after.scores, strict=True):
        moved = np.abs(np.subtract(getattr(a, side), getattr(b, side)))
        assert sorted(moved.tolist())[-2:] == [1, 1] and moved.sum() == 2


def test_reports_that_do_not_belong_together_are_not_added() -> None:
    report = attacked(head(FRESH, 100), head(TRAIN, 60), head(CONTROL, 60))
    for other in (replace(report, synthetic_rows=99), replace(report, reference_rows=10, reference_in_train=0)):
        with pytest.raises(DataError, match=r"cannot be added|reference"):
            add_reports([report, other])
    with pytest.raises(DataError, match="different attacks or bins"):
        add_reports([report, attacked(head(CONTROL, 100), head(TRAIN, 60), head(CONTROL, 60))])
    with pytest.raises(DataError, match="no attack report"):
        add_reports([])


def test_patients_in_both_groups_are_counted() -> None:
    control = with_rows(head(CONTROL, 100), head(TRAIN, 7))
    report = attacked(head(FRESH, 100), TRAIN, control, reference=with_rows(population(30, 8), head(TRAIN, 3)))
    assert (report.control_in_train, report.reference_in_train) == (7, 3)
    assert report.to_json()["control_rows_in_train"] == 7


def wide_schema():
    fields = [number(f"n{i}", required=i % 2 == 0) for i in range(30)]
    fields += [levels(f"c{i}", *"pqrs"[: 2 + i % 3], required=i % 3 > 0) for i in range(23)]
    return columns_of(*fields)


def test_wide_constant_missing_and_one_class_columns_break_nothing() -> None:
    schema = wide_schema()
    tables = population(300, 1, schema), population(300, 2, schema), population(300, 3, schema)
    for table in tables:
        table.values[:, 0] = 0.5  # constant
        table.values[:, 1] = np.nan  # all missing
        table.values[:, schema.index("c1")] = 1.0  # one class
    report = attacked(*tables)
    assert [each.secret for each in report.not_possible if each.attack == "inference"] == ["n1"]
    found = {c.secret: c for c in report.counts if c.attack == "inference"}
    for secret in ("n0", "c1"):
        assert found[secret].successes == found[secret].guesses == 300
    found = report.to_json()
    json.dumps(found, allow_nan=False)
    assert found["overall"]["p_value_bonferroni"] > 0.001
    (constant,) = (each for each in found["attacks"] if each["counts"]["secret"] == "n0")
    assert constant["excess"] is None


def test_a_column_that_the_hospital_withholds_hides_no_copies() -> None:
    train, control = head(TRAIN, 300), head(CONTROL, 300)
    cohort = with_rows(head(FRESH, 300), jittered(head(TRAIN, 60), 6, 0.003))
    withheld = [Table(SCHEMA, table.values.copy()) for table in (train, control)]
    for table in withheld:
        table.values[:, SCHEMA.index("crea")] = np.nan
    report = attacked(cohort, withheld[0], withheld[1], withheld=["crea"])
    found = {c.attack: c.successes for c in report.counts}
    assert found["copies_near"] >= 50
    (missed,) = (each for each in report.not_possible if each.secret == "crea")
    assert "training patients with a value: 0" in missed.reason


def test_a_leak_shows_in_a_wide_table() -> None:
    train, control = (population(300, seed, wide_schema()) for seed in (1, 2))
    synthetic = jittered(resampled(train, 300, 3), 4, 0.05)
    assert attacked(synthetic, train, control).to_json()["overall"]["p_value_bonferroni"] < 1e-6


def test_tiny_tables_give_reasons_instead_of_zeros() -> None:
    report = attacked(head(FRESH, 1), head(TRAIN, 1), head(CONTROL, 1))
    assert report.counts == () and report.scores == ()
    assert all(isinstance(each, NotPossible) and "not possible because" in each.reason for each in report.not_possible)
    assert {each.attack for each in report.not_possible} >= {"linkability", "inference", "copies_exact"}
    assert report.to_json()["overall"]["comparisons"] == 0


def test_bad_tables_are_refused() -> None:
    other = parse_schema({"fields": [number("age", 0, 99)]})
    with pytest.raises(DataError, match="different schemas"):
        attacked(FRESH, TRAIN, population(50, 1, other))
    with pytest.raises(DataError, match="different schemas"):
        attacked(FRESH, reference=population(50, 1, other))
    for tables, name in (
        ((head(FRESH, 0), TRAIN, CONTROL), "synthetic"),
        ((FRESH, head(TRAIN, 0), CONTROL), "training"),
        ((FRESH, TRAIN, head(CONTROL, 0)), "control"),
    ):
        with pytest.raises(DataError, match=f"the {name} table has no rows"):
            attacked(*tables)
    with pytest.raises(DataError, match="no such column: 'nothing', named as secret"):
        attacked(FRESH, secrets=["age", "nothing"])
    with pytest.raises(DataError, match="named as withheld"):
        attacked(FRESH, withheld=["nothing"])
    with pytest.raises(DataError, match="'age' is withheld, but"):
        attacked(FRESH, withheld=["age"])


@pytest.mark.parametrize(("column", "value"), [("age", np.inf), ("stage", 4.0), ("stage", -1.0), ("died", 0.5)])
def test_values_that_no_table_may_hold_are_refused_and_not_shown(column: str, value: float) -> None:
    broken = Table(SCHEMA, TRAIN.values.copy())
    broken.values[3, SCHEMA.index(column)] = value
    with pytest.raises(DataError, match=f"training table holds 1 value.* column '{column}'") as caught:
        attacked(FRESH, broken)
    assert str(value) not in str(caught.value)
