"""What attacks on the cohort found at the sites: membership, copies, linking, inference, as plain JSON.

Every attack is measured on patients who took part and on held-out ones, who are its control: what it achieves there
is what the cohort teaches about anybody. No failed attack is evidence of privacy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from common.evaluation.attacks.cells import why_no_attack
from common.evaluation.attacks.counts import MINIMUM_GUESSES
from common.evaluation.attacks.inference import TOLERANCE
from common.evaluation.contrast import (
    FALSE_POSITIVES,
    Finding,
    Sides,
    auroc_between,
    find,
    rate_difference,
    rate_of,
    true_positive_rate,
)
from common.evaluation.counts import Key
from common.evaluation.plan import DISTANCE, MEMBERSHIP_BINS, MEMBERSHIP_SCORES, guesses_of
from common.evaluation.pooled import PooledCounts
from common.study import Protocol

# The first cell of a distance table that holds copies of each kind; an exact copy is a near one too.
COPIES = {"exact": MEMBERSHIP_BINS - 1, "near": MEMBERSHIP_BINS - 2}


def noised_attacks(
    protocol: Protocol, cohort_rows: int, pooled: PooledCounts, rng: np.random.Generator
) -> dict[str, Any]:
    """The findings from the noised tables of one site, or of all together."""
    membership: dict[str, Any] = {}
    for score in MEMBERSHIP_SCORES:
        sides, about = _sides(pooled, ("membership", score), cohort_rows)
        membership[score] = about | (
            {"auroc": None, "true_positive_rate": None}
            if sides is None
            else {
                "auroc": asdict(find(sides, auroc_between, 0.5, rng)),
                "true_positive_rate": {
                    "false_positive_rate": FALSE_POSITIVES,
                    **asdict(find(sides, true_positive_rate, FALSE_POSITIVES, rng, linear=False)),
                },
            }
        )
    copies = {kind: _rates(pooled, ("membership", DISTANCE), cohort_rows, first, rng) for kind, first in COPIES.items()}
    guessed = {key: _rates(pooled, key, cohort_rows, 1, rng) for key in guesses_of(protocol)}
    return document(protocol, membership, copies, guessed)


def document(
    protocol: Protocol,
    membership: Mapping[str, Any],
    copies: Mapping[str, Any],
    guessed: Mapping[Key, dict[str, Any]],
) -> dict[str, Any]:
    """The findings under their names."""
    inference = {key[1]: found for key, found in guessed.items() if key[0] == "inference"}
    return {
        "membership": dict(membership),
        "copies": dict(copies),
        "linkability": guessed.get(("linkability",)),
        "inference": {name: found | {"blind": blind_guess(protocol, name)} for name, found in inference.items()},
    }


def blind_guess(protocol: Protocol, secret: str) -> float:
    """How often a guess from the schema alone is right: a uniform level; of a number at most, near the middle."""
    column = protocol.schema[secret]
    return min(1.0, 2 * TOLERANCE) if column.is_numeric else 1 / len(column.levels)


def why_not(cohort_rows: int, patients: int, control: int) -> str:
    """Why there is no finding, from public numbers alone; empty if there is one."""
    if cohort := why_no_attack(cohort_rows):
        return cohort
    few = [f"{name}: {n}" for name, n in (("patients", patients), ("held out", control)) if n < MINIMUM_GUESSES]
    return f"not possible because too few ({'; '.join(few)}); at least {MINIMUM_GUESSES}" if few else ""


def about(patients: int, control: int, reason: str) -> dict[str, Any]:
    """How many patients a finding speaks of, and why there is none."""
    return {"patients": patients, "control": control, "reason": reason}


def _sides(pooled: PooledCounts, key: Key, cohort_rows: int) -> tuple[Sides | None, dict[str, Any]]:
    fit, holdout = (*key, "fit"), (*key, "holdout")
    patients, control = pooled.patients[fit], pooled.patients[holdout]
    reason = why_not(cohort_rows, patients, control)
    if reason:
        return None, about(patients, control, reason)
    counts, deviation = pooled.counts, pooled.deviation
    sides = Sides(counts[fit], counts[holdout], patients, control, deviation[fit], deviation[holdout])
    return sides, about(patients, control, "")


def _rates(pooled: PooledCounts, key: Key, cohort_rows: int, first: int, rng: np.random.Generator) -> dict[str, Any]:
    sides, found = _sides(pooled, key, cohort_rows)
    if sides is None:
        return found | {"fit": None, "holdout": None, "difference": None}
    # Each group by itself, in the place of the first.
    turned = Sides(
        sides.holdout, sides.fit, sides.control, sides.patients, sides.holdout_deviation, sides.fit_deviation
    )
    return found | {
        "fit": _interval(find(sides, rate_of(first), 0.0, rng)),
        "holdout": _interval(find(turned, rate_of(first), 0.0, rng)),
        "difference": asdict(find(sides, rate_difference(first), 0.0, rng, within=(-1.0, 1.0))),
    }


def _interval(found: Finding) -> dict[str, float]:
    return {"value": found.value, "low": found.low, "high": found.high}
