import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.errors import CohortiumError, DataError, SchemaError
from common.evaluation.canaries import FEWEST, LARGEST_SHARE, corners, draw_canaries
from common.generation import check_rows
from common.schema import parse_schema
from common.table import Table

SCHEMA = parse_schema(
    {
        "fields": [
            {"name": "age", "type": "number", "constraints": {"minimum": 18, "maximum": 100}},
            {"name": "lab", "type": "number", "cohortium:scale": "log", "constraints": {"minimum": 0, "maximum": 1e4}},
            {"name": "visits", "type": "integer", "constraints": {"minimum": 0, "maximum": 9, "required": True}},
            {"name": "ward", "type": "string", "constraints": {"enum": list("abcde"), "required": True}},
            {"name": "grade", "type": "string", "constraints": {"enum": ["only"]}},
            {"name": "dead", "type": "boolean"},
            {"name": "seen", "type": "date", "constraints": {"minimum": "2020-01-01", "maximum": "2021-12-31"}},
            {"name": "b1", "type": "boolean"},
            {"name": "b2", "type": "boolean"},
        ]
    }
)
CAN_DIFFER = 8


@settings(max_examples=30, deadline=None)
@given(st.integers(10, 80), st.integers(0, 2**40), st.booleans())
def test_canaries_are_valid_different_rows_in_different_slots(number: int, seed: int, seeded: bool) -> None:
    patients = 4 * number + 3
    found = draw_canaries(SCHEMA, patients, number, seed if seeded else None)
    assert len(found) == number
    for table in (found.first, found.second):
        check_rows(table)  # what the schema accepts
        for column, values in zip(SCHEMA.columns, table.values.T, strict=True):
            assert np.isin(values, corners(column)).all()
    assert (found.first.values != found.second.values).sum(axis=1).min() >= CAN_DIFFER / 3
    assert len(np.unique(np.vstack([found.first.values, found.second.values]), axis=0)) == 2 * number
    assert len(set(found.slots)) == number and found.slots.min() >= 0 and found.slots.max() < patients
    assert set(found.coins) <= {-1, 1}


def test_planting_replaces_the_slots_and_nothing_else() -> None:
    found = draw_canaries(SCHEMA, 100, 20, 1)
    table = Table(SCHEMA, np.full((100, len(SCHEMA.columns)), np.nan))
    planted = found.plant(table)
    assert np.isnan(table.values).all()  # the given table is not touched
    others = np.setdiff1d(np.arange(100), found.slots)
    assert np.isnan(planted.values[others]).all() and len(others) == 80
    for slot, coin, first, second in zip(
        found.slots, found.coins, found.first.values, found.second.values, strict=True
    ):
        assert np.array_equal(planted.values[slot], first if coin == 1 else second)


def test_a_seed_repeats_everything_and_none_repeats_nothing() -> None:
    one, again, other = (draw_canaries(SCHEMA, 400, 100, seed) for seed in (3, 3, 4))
    assert np.array_equal(one.slots, again.slots) and np.array_equal(one.coins, again.coins)
    assert np.array_equal(one.first.values, again.first.values)
    assert not np.array_equal(one.slots, other.slots) and not np.array_equal(one.coins, other.coins)
    fresh, more = (draw_canaries(SCHEMA, 400, 100, None) for _ in range(2))
    assert not np.array_equal(fresh.slots, more.slots) and not np.array_equal(fresh.coins, more.coins)


def test_the_coins_are_fair_and_independent_of_slot_and_row() -> None:
    coins = np.array([draw_canaries(SCHEMA, 80, 20, seed).coins for seed in range(400)])
    heads = int((coins > 0).sum())
    assert stats.binomtest(heads, coins.size).pvalue > 1e-6
    per_slot = (coins > 0).sum(axis=0)
    assert stats.chisquare(per_slot, np.full(20, heads / 20)).pvalue > 1e-6
    together = (coins[:, :-1] * coins[:, 1:]) > 0
    assert stats.binomtest(int(together.sum()), together.size).pvalue > 1e-6


@pytest.mark.parametrize(
    ("patients", "number", "words"),
    [
        (1000, FEWEST - 1, ["9 canaries", "at least 10", "--canaries 200"]),
        (100, 26, ["26 canaries", "26% of the site's 100 patients", "at most 25%", "--canaries 25", "104 patients"]),
        (30, 10, ["33% of the site's 30 patients", "How to mend it: a larger site with --site: 10 need 40"]),
        (12, 200, ["1667% of the site's 12 patients", "800 patients"]),
    ],
)
def test_a_number_that_does_not_fit_the_site_is_refused(patients: int, number: int, words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        draw_canaries(SCHEMA, patients, number, 0)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert LARGEST_SHARE == 0.25


def test_a_narrow_schema_is_refused() -> None:
    narrow = parse_schema({"fields": [{"name": f"b{i}", "type": "boolean"} for i in range(6)]})
    assert len(draw_canaries(narrow, 400, 16, 0)) == 16  # 64 corners
    with pytest.raises(SchemaError, match="64 different corner rows, 17 pairs of canaries need 68"):
        draw_canaries(narrow, 400, 17, 0)
    one = parse_schema({"fields": [{"name": "only", "type": "string", "constraints": {"enum": ["x"]}}]})
    with pytest.raises(CohortiumError, match="1 different corner rows"):
        draw_canaries(one, 400, 10, 0)
