"""Attribute inference: who knows all other values of a patient reads the secret one off the most similar synthetic row.

After Giomi et al. 2022, section 3.3, except that tolerance is a share of the declared range, and that an unknown secret
is nothing to guess: a patient is right, wrong or, his secret being missing, in neither cell, and never in two cells.
Results for several secrets speak of the same patients.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.encoding.number import from_unit, to_unit
from common.evaluation.attacks.counts import AttackCounts, NotPossible, too_few
from common.evaluation.attacks.gower import blocks
from common.schema import Column
from common.table import Table

ATTACK = "inference"
TOLERANCE = 0.05


def infer(
    synthetic: Table,
    train: Table,
    control: Table,
    rng: np.random.Generator,
    *,
    secrets: Sequence[str] | None = None,
    tolerance: float = TOLERANCE,
) -> list[AttackCounts | NotPossible]:
    """Counts of patients whose secret is guessed, one result for each of `secrets` (names; default: all columns).

    Success is the exact level, or a number within `tolerance` times the declared range, on the declared scale. The
    guess comes from the nearest synthetic row with a known secret. The baseline is a uniform guess from the schema.
    """
    schema = synthetic.schema
    names = schema.names if secrets is None else tuple(secrets)
    positions = [schema.index(name) for name in names]
    setting = f"tolerance={tolerance:g}"
    reasons = {j: _why_not(synthetic, train, control, j) for j in positions}
    if len(schema.columns) < 2:
        reasons = dict.fromkeys(positions, "not possible because it needs another column to go by")
    attacked = [j for j in positions if reasons[j] is None]
    guesses = [_guess(synthetic, patients, attacked) for patients in (train, control)]
    results: list[AttackCounts | NotPossible] = []
    for j, name in zip(positions, names, strict=True):
        reason = reasons[j]
        if reason is not None:
            results.append(NotPossible(ATTACK, name, reason, setting))
            continue
        column = schema.columns[j]
        truth = [patients.values[~np.isnan(patients.values[:, j]), j] for patients in (train, control)]
        right = []
        for patients, guess in zip((train, control), guesses, strict=True):
            known = ~np.isnan(patients.values[:, j])
            right.append(guessed_right(guess[known, attacked.index(j)], patients.values[known, j], column, tolerance))
        blind = guessed_right(_blind(column, len(truth[0]), rng), truth[0], column, tolerance)
        results.append(
            AttackCounts(
                attack=ATTACK,
                secret=name,
                setting=setting,
                guesses=right[0].size,
                successes=int(right[0].sum()),
                control_guesses=right[1].size,
                control_successes=int(right[1].sum()),
                baseline_guesses=blind.size,
                baseline_successes=int(blind.sum()),
            )
        )
    return results


def _why_not(synthetic: Table, train: Table, control: Table, secret: int) -> str | None:
    known = [int((~np.isnan(table.values[:, secret])).sum()) for table in (synthetic, train, control)]
    few = too_few(ATTACK, None, training_patients_with_a_value=known[1], control_patients_with_a_value=known[2])
    if few is not None:
        return few.reason
    return None if known[0] else "not possible because the column is missing in every synthetic row"


def _guess(synthetic: Table, patients: Table, secrets: Sequence[int]) -> np.ndarray:
    """The secret of the synthetic row that is nearest on all other columns, shape (patients, secrets)."""
    # Added to the distance of rows that have no secret to offer; no distance reaches it.
    unknown = np.isnan(synthetic.values[:, secrets])
    penalty = [np.where(unknown[:, i], np.float32(1e6), np.float32(0)) for i in range(len(secrets))]
    guesses = np.empty((len(patients), len(secrets)))
    rest: np.ndarray | None = None
    for block in blocks(patients, synthetic) if secrets else ():
        if rest is None:
            rest = np.empty_like(block.total)
        others = rest[: len(block.total)]
        for i, secret in enumerate(secrets):
            np.subtract(block.total, block.part(secret), out=others)
            if unknown[:, i].any():
                others += penalty[i]
            guesses[block.rows, i] = synthetic.values[others.argmin(axis=1), secret]
    return guesses


def guessed_right(guess: np.ndarray, truth: np.ndarray, column: Column, tolerance: float) -> np.ndarray:
    """Whether each guess is right; both without missing values, shapes (patients,)."""
    if not column.is_numeric:
        return guess == truth
    # to_unit spans 2; a hair of slack keeps a guess at exactly the tolerance right whatever the rounding.
    return np.abs(to_unit(guess, column) - to_unit(truth, column)) / 2 <= tolerance * (1 + 1e-9)


def _blind(column: Column, n: int, rng: np.random.Generator) -> np.ndarray:
    """Guesses from the schema alone: a uniform level, or uniform in the declared range on the declared scale."""
    if column.is_numeric:
        return from_unit(rng.uniform(-1.0, 1.0, n), column)
    return rng.integers(0, len(column.levels), n).astype(np.float64)
