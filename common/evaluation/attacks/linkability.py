"""Linkability: does the cohort help to join two halves of a patient's record that are kept in different places?

For each half the k nearest synthetic rows are found; the halves are linked if they share one of them (Giomi et al.
2022, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from common.evaluation.attacks.counts import AttackCounts, NotPossible, too_few
from common.evaluation.attacks.gower import neighbours
from common.schema import Schema
from common.table import Table

ATTACK = "linkability"
NEIGHBOURS = (1, 10)


def halves(schema: Schema) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Every second column in schema order, and the others: neighbours in a form are correlated, which helps to link."""
    return schema.names[::2], schema.names[1::2]


def link(
    synthetic: Table,
    train: Table,
    control: Table,
    rng: np.random.Generator,
    *,
    columns: tuple[Sequence[str], Sequence[str]] | None = None,
    k: Sequence[int] = NEIGHBOURS,
) -> list[AttackCounts | NotPossible]:
    """Counts of patients whose halves are linked, one result for each of `k`.

    `columns` are two disjoint, non-empty sets of names (default: `halves`); `ValueError` if they are not. The baseline
    draws k rows at random for each half, which takes no more than the public number of rows.
    """
    schema = synthetic.schema
    left, right = (tuple(schema.index(name) for name in half) for half in columns or halves(schema))
    if set(left) & set(right):
        raise ValueError("the two sets of columns must be disjoint")
    settings = {each: f"k={each}" for each in k}
    if not left or not right:
        reason = "not possible because it needs at least two columns"
        return [NotPossible(ATTACK, None, reason, settings[each]) for each in k]
    possible = [each for each in k if each < len(synthetic)]
    results: list[AttackCounts | NotPossible] = [
        NotPossible(ATTACK, None, f"not possible because the cohort has {len(synthetic)} rows only", settings[each])
        for each in k
        if each not in possible
    ]
    if not possible:
        return results
    few = too_few(ATTACK, None, training_patients=len(train), control_patients=len(control))
    if few is not None:
        return [NotPossible(ATTACK, None, few.reason, settings[each]) for each in k]
    found = [
        [neighbours(patients, synthetic, half, max(possible)) for half in (left, right)]
        for patients in (train, control)
    ]
    for each in possible:
        hits = [int(_linked(a[:, :each], b[:, :each]).sum()) for a, b in found]
        shared = rng.hypergeometric(each, len(synthetic) - each, each, size=len(train))
        results.append(
            AttackCounts(
                attack=ATTACK,
                secret=None,
                setting=settings[each],
                guesses=len(train),
                successes=hits[0],
                control_guesses=len(control),
                control_successes=hits[1],
                baseline_guesses=len(train),
                baseline_successes=int((shared > 0).sum()),
            )
        )
    return results


def _linked(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether row i of `a` and row i of `b` share a number; shapes (patients, k), result (patients,)."""
    both = np.sort(np.hstack([a, b]), axis=1)  # the numbers of one row are distinct, so a repeat is shared
    return np.any(both[:, 1:] == both[:, :-1], axis=1)
