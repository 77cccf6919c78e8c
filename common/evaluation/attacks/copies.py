"""Copies of patients among the synthetic rows, against what a control finds by chance.

Nearness to the closest record is used for this check only, because it is no measure of privacy: a cohort that is far
from its patients on average can still repeat one of them, and a small distance may be nothing but the truth about a
population in which patients resemble each other. Rows of few columns with few levels coincide by chance, which is what
the control is for.
"""

from __future__ import annotations

import numpy as np

from common.encoding.number import from_unit
from common.evaluation.attacks.counts import AttackCounts, NotPossible, too_few
from common.evaluation.attacks.gower import nearest
from common.evaluation.attacks.rows import canonical, contained, occurs_in
from common.schema import Column
from common.table import Table

EXACT, ONE_OFF, NEAR = "copies_exact", "copies_in_all_but_one_column", "copies_near"
# Mean Gower distance per column at or below which a row is a near copy; numbers are compared on the declared range.
THRESHOLD = 0.01


def find_copies(
    synthetic: Table, train: Table, control: Table, rng: np.random.Generator, *, threshold: float = THRESHOLD
) -> list[AttackCounts | NotPossible]:
    """Counts of patients with an exact copy, a copy in all but one column, or a row within `threshold`.

    An exact copy counts in all three. The baseline compares the training patients with as many rows as the cohort has,
    drawn uniformly from the schema.
    """
    settings = {EXACT: "", ONE_OFF: "", NEAR: f"distance<={threshold:g}"}
    few = too_few("copies", None, training_patients=len(train), control_patients=len(control))
    if few is not None:
        return [NotPossible(attack, None, few.reason, setting) for attack, setting in settings.items()]
    uniform = _uniform(synthetic, rng)
    found = [_copied(patients, rows, threshold) for patients, rows in ((train, synthetic), (control, synthetic))]
    blind = _copied(train, uniform, threshold)
    results: list[AttackCounts | NotPossible] = []
    for attack, setting in settings.items():
        if attack == ONE_OFF and len(synthetic.schema.columns) < 2:
            reason = "not possible because it needs at least two columns"
            results.append(NotPossible(attack, None, reason, setting))
            continue
        results.append(
            AttackCounts(
                attack=attack,
                secret=None,
                setting=setting,
                guesses=len(train),
                successes=int(found[0][attack].sum()),
                control_guesses=len(control),
                control_successes=int(found[1][attack].sum()),
                baseline_guesses=len(train),
                baseline_successes=int(blind[attack].sum()),
            )
        )
    return results


def _copied(patients: Table, rows: Table, threshold: float) -> dict[str, np.ndarray]:
    """Which patients have a copy of each kind, shapes (patients,)."""
    return {
        EXACT: occurs_in(patients, rows),
        ONE_OFF: _all_but_one(patients, rows),
        NEAR: nearest(patients, rows) <= threshold,
    }


def _all_but_one(patients: Table, rows: Table) -> np.ndarray:
    a, b = canonical(patients), canonical(rows)
    result = np.zeros(len(a), dtype=np.bool_)
    for j in range(a.shape[1]):
        result |= contained(np.delete(a, j, axis=1), np.delete(b, j, axis=1))
    return result


def _uniform(synthetic: Table, rng: np.random.Generator) -> Table:
    drawn = [_uniform_column(column, len(synthetic), rng) for column in synthetic.schema.columns]
    return Table(synthetic.schema, np.column_stack(drawn))


def _uniform_column(column: Column, rows: int, rng: np.random.Generator) -> np.ndarray:
    if not column.is_numeric:
        drawn = rng.integers(0, len(column.levels), rows).astype(np.float64)
        choices = len(column.levels)
    else:
        drawn = from_unit(rng.uniform(-1.0, 1.0, rows), column)
        drawn = drawn if column.kind == "number" else np.round(drawn)
        choices = 2
    # Missing is one more level, and for a number as likely as either half of the range.
    return np.where(rng.integers(0, choices + 1, rows) == choices, np.nan, drawn) if column.nullable else drawn
