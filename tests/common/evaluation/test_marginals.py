"""Marginals for pictures: shares that add up, in bins that were declared."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError
from common.evaluation.marginals import BINS, compare_marginals
from common.evaluation.plain import plain
from common.schema import parse_schema
from common.table import Table

SCHEMA = parse_schema(
    {
        "fields": [
            {
                "name": "weight",
                "type": "number",
                "constraints": {"minimum": 1, "maximum": 100},
                "cohortium:scale": "log",
            },
            {"name": "children", "type": "integer", "constraints": {"minimum": 2, "maximum": 9}},
            {"name": "seen", "type": "date", "constraints": {"minimum": "2020-01-01", "maximum": "2021-01-01"}},
            {"name": "sex", "type": "string", "constraints": {"enum": ["f", "m"]}},
        ]
    }
)


def table(rows: int, seed: int, gone: float = 0.2) -> Table:
    random = np.random.default_rng(seed)
    days = SCHEMA["seen"]
    values = np.column_stack(
        [
            random.uniform(1, 100, rows),
            random.integers(2, 10, rows),
            random.integers(int(days.minimum), int(days.maximum) + 1, rows),
            random.integers(0, 2, rows),
        ]
    ).astype(float)
    values[random.random(values.shape) < gone] = np.nan
    return Table(SCHEMA, values)


@given(st.integers(5, 200), st.integers(0, 1000), st.floats(0, 0.9))
@settings(deadline=None, max_examples=25)
def test_shares_and_missing_add_up_to_one(rows: int, seed: int, gone: float) -> None:
    for found in compare_marginals(table(rows, seed, gone), table(rows, seed + 1, gone)):
        assert sum(found.real) + found.real_missing == pytest.approx(1, abs=2e-3)
        assert sum(found.synthetic) + found.synthetic_missing == pytest.approx(1, abs=2e-3)
        assert len(found.labels) - len(found.real) == (1 if found.kind in ("number", "date") else 0)


def test_equal_tables_have_no_distance_and_swapping_changes_nothing() -> None:
    a, b = table(300, 1), table(200, 2)
    assert {found.distance for found in compare_marginals(a, a)} == {0.0}
    for one, other in zip(compare_marginals(a, b), compare_marginals(b, a), strict=True):
        assert one.distance == pytest.approx(other.distance) and one.real == other.synthetic


def test_a_short_integer_has_a_bin_for_every_value_and_a_date_its_days() -> None:
    found = {one.column: one for one in compare_marginals(table(400, 1, 0.0), table(400, 2, 0.0))}
    children = found["children"]
    assert children.labels == tuple("23456789") and len(children.real) == 8
    share = float(np.mean(table(400, 2, 0.0)["children"] == 5))
    assert children.real[3] == pytest.approx(share, abs=5e-5)
    assert found["seen"].labels[0] == "2020-01-01" and found["seen"].labels[-1] == "2021-01-01"
    middle = f"{1 + 99 * 0.01 * (math.sqrt(101) - 1):.4g}"  # half of log(1 + 100 share), from 1 to 100
    assert len(found["weight"].real) == BINS and found["weight"].labels[BINS // 2] == middle


def test_the_distance_is_over_the_bins_of_the_evaluation() -> None:
    values = np.full((100, 4), np.nan)
    values[:, 3] = [0] * 60 + [1] * 40
    other = values.copy()
    other[:, 3] = [0] * 20 + [1] * 30 + [np.nan] * 50
    found = compare_marginals(Table(SCHEMA, values), Table(SCHEMA, other))[3]
    assert found.distance == pytest.approx((0.4 + 0.1 + 0.5) / 2)
    assert (found.synthetic, found.real, found.real_missing) == ((0.6, 0.4), (0.2, 0.3), 0.5)
    assert plain(found)["labels"] == ["f", "m"]


def test_tables_of_other_schemas_are_refused() -> None:
    other = parse_schema({"fields": [{"name": "sex", "type": "string", "constraints": {"enum": ["f", "m"]}}]})
    with pytest.raises(DataError, match="different schemas"):
        compare_marginals(table(10, 1), Table(other, np.zeros((10, 1))))
