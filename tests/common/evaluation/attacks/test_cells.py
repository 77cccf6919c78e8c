"""Attacks in tables: the same successes as the attacks themselves, and no patient in another one's cell."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from common.evaluation.attacks.cells import AttackCells, why_no_attack
from common.evaluation.attacks.copies import EXACT, NEAR, find_copies
from common.evaluation.attacks.counts import AttackCounts
from common.evaluation.attacks.gower import nearest
from common.evaluation.attacks.inference import infer
from common.evaluation.attacks.linkability import link
from common.evaluation.plan import MEMBERSHIP_BINS
from common.schema import parse_schema
from common.table import Table
from tests.common.evaluation.evaluated import SCHEMA, patients

COHORT = patients(300, 1)
SECRETS = ("died", "creatinine")
CELLS = AttackCells(COHORT, SECRETS)


def successes(results: list, attack: str, secret: str | None = None) -> tuple[int, int]:
    found = next(r for r in results if isinstance(r, AttackCounts) and (r.attack, r.secret) == (attack, secret))
    return found.successes, found.control_successes


def test_successes_are_those_of_the_attacks() -> None:
    copied = Table(SCHEMA, np.vstack([COHORT.values[:7], patients(150, 2).values]))
    control, rng = patients(90, 3), np.random.default_rng(0)
    cells = [CELLS(table) for table in (copied, control)]
    exact, near = (
        tuple(int((found["membership", "distance"] >= first).sum()) for found in cells)
        for first in (MEMBERSHIP_BINS - 1, MEMBERSHIP_BINS - 2)
    )
    copies = find_copies(COHORT, copied, control, rng)
    assert exact == successes(copies, EXACT) and near == successes(copies, NEAR) and exact[0] >= 7
    linked = tuple(int(found["linkability",].sum()) for found in cells)
    assert linked == successes(link(COHORT, copied, control, rng, k=(1,)), "linkability")
    for secret in SECRETS:  # whose secret is missing is in the table here, and in none of the attack's own counts
        guessed = tuple(int(found["inference", secret].sum()) for found in cells)
        assert guessed == successes(infer(COHORT, copied, control, rng, secrets=[secret]), "inference", secret)


def test_bins_order_patients_as_the_scores_do() -> None:
    mixed = Table(SCHEMA, np.vstack([COHORT.values[:60], patients(200, 4).values]))
    member = np.arange(260) < 60
    binned = CELLS(mixed)
    raw = {"density": CELLS._density(mixed), "distance": -nearest(mixed, COHORT)}
    for score, values in raw.items():
        cells = binned["membership", score]
        assert cells.min() >= 0 and cells.max() <= MEMBERSHIP_BINS - 1 and len(np.unique(cells)) > 6
        order = np.argsort(values, kind="stable")
        known = order if score == "density" else order[values[order] < -0.01]  # exact copies stand above near ones
        assert (np.diff(cells[known]) >= 0).all()
        assert roc_auc_score(member, cells) == pytest.approx(roc_auc_score(member, values), abs=0.03)


@given(slot=st.integers(0, 39), other=st.integers(0, 10_000), copied=st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_cell_of_a_patient_depends_on_no_other(slot: int, other: int, copied: bool) -> None:
    table = patients(40, 5)
    neighbour = table.values.copy()
    neighbour[slot] = COHORT.values[other % 300] if copied else patients(1, other).values[0]
    before, after = CELLS(table), CELLS(Table(SCHEMA, neighbour))
    assert set(before) == set(after) and len(before) == 5
    for key, cells in before.items():
        assert np.array_equal(np.delete(cells, slot), np.delete(after[key], slot)), key


def test_bins_and_guesses_are_the_same_at_every_site() -> None:
    again, table = AttackCells(COHORT, SECRETS), patients(80, 6)
    assert all(np.array_equal(cells, again(table)[key]) for key, cells in CELLS(table).items())


def test_a_secret_that_is_not_known_is_not_guessed() -> None:
    values = COHORT.values[:30].copy()  # copies, whose other columns give everything away
    values[:, SCHEMA.index("died")] = np.nan
    assert not CELLS(Table(SCHEMA, values))["inference", "died"].any()
    nobody = COHORT.values.copy()
    nobody[:, SCHEMA.index("died")] = np.nan
    assert not AttackCells(Table(SCHEMA, nobody), ["died"])(COHORT)["inference", "died"].any()


def test_a_table_of_one_column_has_membership_only() -> None:
    schema = parse_schema({"fields": [{"name": "x", "type": "number", "constraints": {"minimum": 0, "maximum": 1}}]})
    rng = np.random.default_rng(0)
    cohort, table = (Table(schema, rng.uniform(size=(rows, 1))) for rows in (50, 30))
    assert set(AttackCells(cohort, ())(table)) == {("membership", "density"), ("membership", "distance")}


def test_a_cohort_of_equal_rows_is_attacked_without_error() -> None:
    same = Table(SCHEMA, np.repeat(patients(1, 7).values, 25, axis=0))
    cells = AttackCells(same, ["died"])(patients(30, 8))
    assert all(found.min() >= 0 and found.max() < MEMBERSHIP_BINS for found in cells.values())


def test_a_cohort_of_few_rows_is_not_attacked() -> None:
    assert "19 rows; 20 are needed" in why_no_attack(19) and why_no_attack(20) == ""
