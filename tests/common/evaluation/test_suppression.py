"""Small cells stay hidden: checked by listing every table that is consistent with what is published."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.evaluation.suppression import changed_too_little, hidden_cells

FLOOR = 3


def lines_of(shape: tuple[int, ...]) -> list[tuple[slice | int, ...]]:
    if len(shape) == 1:
        return [(slice(None),)]
    return [(row, slice(None)) for row in range(shape[0])] + [(slice(None), column) for column in range(shape[1])]


def possible(counts: np.ndarray, hidden: np.ndarray, totals_shown: list[bool]) -> list[set[int]]:
    """Every value each hidden cell takes in a table of whole numbers with the shown cells and totals."""
    places = list(zip(*np.nonzero(hidden), strict=True))
    most = int(counts[hidden].sum())
    found: list[set[int]] = [set() for _ in places]
    lines = [line for line, shown in zip(lines_of(counts.shape), totals_shown, strict=True) if shown]
    for values in itertools.product(range(most + 1), repeat=len(places)):
        if sum(values) != most:
            continue
        trial = counts.copy()
        for place, value in zip(places, values, strict=True):
            trial[place] = value
        if all(trial[line].sum() == counts[line].sum() for line in lines):
            for values_seen, value in zip(found, values, strict=True):
                values_seen.add(value)
    return found


@given(st.lists(st.integers(0, 9), min_size=2, max_size=6))
@settings(max_examples=150, deadline=None)
def test_a_hidden_cell_of_a_line_keeps_its_range(counts: list[int]) -> None:
    table = np.array(counts, dtype=float)
    hidden = hidden_cells(table, FLOOR)
    assert hidden[table < FLOOR].all()
    if hidden.all():
        return  # nothing is published but the number of patients
    if hidden.any():
        assert hidden.sum() >= 2 and table[hidden].sum() >= FLOOR
        for values in possible(table, hidden, [True]):
            assert min(values) == 0 and max(values) >= FLOOR


@given(st.lists(st.integers(0, 5), min_size=6, max_size=6))
@settings(max_examples=60, deadline=None)
def test_a_hidden_cell_of_a_table_keeps_its_range(counts: list[int]) -> None:
    table = np.array(counts, dtype=float).reshape(2, 3)
    hidden = hidden_cells(table, FLOOR)
    assert hidden[table < FLOOR].all()
    if hidden.all() or not hidden.any():
        return
    # The attacker knows a row's or column's total unless it is itself under the rule for hidden totals.
    shown = [*~hidden_cells(table.sum(axis=1), FLOOR), *~hidden_cells(table.sum(axis=0), FLOOR)]
    for values in possible(table, hidden, shown):
        assert max(values) - min(values) >= FLOOR


def test_small_cells_that_fill_their_total_are_not_alone() -> None:
    """Two hidden cells of 10 under a floor of 11 with total 20 would both be known."""
    hidden = hidden_cells(np.array([10.0, 10.0, 30.0, 40.0]), 11)
    assert hidden.tolist() == [True, True, True, False]


def test_one_small_cell_takes_the_smallest_other_one_with_it() -> None:
    assert hidden_cells(np.array([50.0, 4.0, 20.0, 30.0]), 11).tolist() == [False, True, True, False]


def test_a_table_without_small_cells_is_shown() -> None:
    assert not hidden_cells(np.full((3, 4), 11.0), 11).any()


def test_a_group_of_bins_is_a_line_of_its_own() -> None:
    """Another table shows 5 + 40 + 60: with 5 hidden alone in its group it could be computed from that."""
    fine = np.array([5.0, 40.0, 60.0, 30.0, 50.0, 20.0])
    assert hidden_cells(fine, 11).sum() == 2
    grouped = hidden_cells(fine, 11, nested=3)
    assert grouped.tolist() == [True, True, False, False, False, False]


def test_what_was_hidden_stays_hidden() -> None:
    before = np.array([True, True, False, False])
    assert hidden_cells(np.array([20.0, 30.0, 40.0, 50.0]), 11, before)[:2].all()


@pytest.mark.parametrize(("now", "small"), [(100.0, False), (101.0, True), (110.0, True), (111.0, False)])
def test_a_small_change_since_the_last_answer_is_found(now: float, small: bool) -> None:
    assert changed_too_little(np.array([now]), np.array([100.0]), 11).item() is small
