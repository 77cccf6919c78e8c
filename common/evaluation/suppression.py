"""Small counts stay at the site: cells under the floor are hidden, and so many more that none can be computed back.

This is disclosure control, not privacy: no ε follows from it (privacy.md, section 0). It protects against somebody who
knows the floor, the number of patients, and every total of the table's rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from common.evaluation.counts import CountPlan, Counts, Key

HIDDEN = np.nan
Mask = NDArray[np.bool_]


def suppress(
    plan: CountPlan, counts: Counts, floor: int, *, hidden_before: Mapping[Key, Mask] | None = None
) -> dict[Key, Mask]:
    """Which cells of every table are hidden; `hidden_before` are cells that an earlier answer about these tables hid.

    Tables of more than two dimensions are judged as two: the first against all others.
    """
    before = hidden_before or {}
    return {
        table.key: hidden_cells(counts[table.key], floor, before.get(table.key), nested=table.nested)
        for table in plan.tables
    }


def hidden_cells(table: NDArray[np.float64], floor: int, before: Mask | None = None, *, nested: int = 1) -> Mask:
    """The hidden cells of one table, in its shape: every count under `floor`, zeros too, and complementary ones.

    In a line (the whole of a one-dimensional table, a row or column of another) with a hidden cell at least two are
    hidden, their sum is at least the floor, and it does not force any of them away from zero. A row or column whose
    own total is hidden by that rule is hidden whole. A table in which a hidden cell could still be computed from the
    other totals, or bounded to less than the floor, is hidden whole. In a one-dimensional table every `nested` cells
    in a row are a line too, whose total another table shows.
    """
    flat = table.reshape(table.shape[0], -1) if table.ndim > 1 else table.reshape(1, -1)
    hidden = flat < floor
    if before is not None:
        hidden = hidden | before.reshape(flat.shape)
    if flat.shape[0] == 1 or flat.shape[1] == 1:
        return _complete_nested(flat.ravel(), hidden.ravel(), floor, nested).reshape(table.shape)
    rows, columns = (_hidden_totals(flat.sum(axis=axis), floor) for axis in (1, 0))
    while True:
        grown = hidden | rows[:, None] | columns
        for row in range(flat.shape[0]):
            grown[row] = _complete_line(flat[row], grown[row], floor)
        for column in range(flat.shape[1]):
            grown[:, column] = _complete_line(flat[:, column], grown[:, column], floor)
        if np.array_equal(grown, hidden):
            break
        hidden = grown
    if hidden.any() and not hidden.all() and _narrowest(flat, hidden, rows, columns) < floor:
        hidden = np.ones_like(hidden)
    return hidden.reshape(table.shape)


def apply(counts: Counts, masks: Mapping[Key, Mask]) -> dict[Key, NDArray[np.float64]]:
    """The counts with NaN in every hidden cell."""
    return {key: np.where(masks[key], HIDDEN, table) for key, table in counts.items()}


def changed_too_little(now: NDArray[np.float64], before: NDArray[np.float64], floor: int) -> Mask:
    """Cells whose count differs from an earlier published one by less than the floor, but differs.

    Their difference would be a count under the floor, of the patients who came or went in between.
    """
    difference = np.abs(now - before)
    return (difference > 0) & (difference < floor)


def _complete_line(counts: NDArray[np.float64], hidden: Mask, floor: int) -> Mask:
    """Hide the smallest shown cells of a line until its total gives nothing away."""
    hidden = hidden.copy()
    order = [int(cell) for cell in np.argsort(counts, kind="stable")]
    while hidden.any() and not hidden.all():
        cells = counts[hidden]
        total, number = float(cells.sum()), int(hidden.sum())
        small = bool((cells < floor).all())
        # If only small cells are hidden, each is at most floor - 1: a total near number * (floor - 1) reveals them all.
        forced = small and total > (floor - 1) * (number - 1)
        if number >= 2 and total >= floor and not forced:
            break
        hidden[next(cell for cell in order if not hidden[cell])] = True
    return hidden


def _complete_nested(counts: NDArray[np.float64], hidden: Mask, floor: int, nested: int) -> Mask:
    """The line and, within it, every whole group of `nested` cells; one whose own total is hidden is hidden whole."""
    groups = len(counts) // nested if nested > 1 else 0
    inner = slice(0, groups * nested)
    coarse = (
        np.append(counts[inner].reshape(groups, nested).sum(axis=1), counts[groups * nested :]) if groups else counts
    )
    hidden_groups = _hidden_totals(coarse, floor)[:groups]
    while True:
        grown = hidden.copy()
        grown[inner] |= np.repeat(hidden_groups, nested)
        for group in range(groups):
            part = slice(group * nested, (group + 1) * nested)
            grown[part] = _complete_line(counts[part], grown[part], floor)
        grown = _complete_line(counts, grown, floor)
        if np.array_equal(grown, hidden):
            return hidden
        hidden = grown


def _hidden_totals(totals: NDArray[np.float64], floor: int) -> Mask:
    return _complete_line(totals, totals < floor, floor)


def _narrowest(counts: NDArray[np.float64], hidden: Mask, hidden_rows: Mask, hidden_columns: Mask) -> float:
    """The narrowest interval to which the shown totals of rows and columns bound a hidden cell, by linear programming.

    The number of all patients is known as well, and so is the total of all hidden rows together, and of all columns.
    """
    from scipy.optimize import linprog
    from scipy.sparse import csr_array, vstack

    rows, columns = np.nonzero(hidden)
    number = rows.size
    position = np.arange(number)
    lines = np.concatenate([rows, counts.shape[0] + columns])
    matrix = csr_array(
        (np.ones(2 * number), (lines, np.concatenate([position, position]))), shape=(sum(counts.shape), number)
    )
    unknown = np.where(hidden, counts, 0.0)
    totals = np.concatenate([unknown.sum(axis=1), unknown.sum(axis=0)])
    known = ~np.concatenate([hidden_rows, hidden_columns]) & (np.bincount(lines, minlength=totals.size) > 0)
    everything = csr_array(np.ones((1, number)))
    equations, totals = vstack([matrix[np.flatnonzero(known)], everything]), np.append(totals[known], unknown.sum())
    narrowest = np.inf
    for cell in range(number):
        objective = np.zeros(number)
        objective[cell] = 1.0
        ends = [
            linprog(sign * objective, A_eq=equations, b_eq=totals, bounds=(0, None), method="highs").fun
            for sign in (1.0, -1.0)
        ]
        narrowest = min(narrowest, -ends[1] - ends[0])
    return narrowest
