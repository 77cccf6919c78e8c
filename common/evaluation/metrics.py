"""The metrics document of a simulated study: fidelity and utility as plain JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from common.errors import DataError
from common.evaluation.fidelity import compare
from common.evaluation.utility import train_and_test, utility_gap
from common.table import Table

SCHEMA_VERSION = 1


def evaluate(
    synthetic: Table, real: Table, test: Table | None, seed: int, *, target: str | None = None
) -> dict[str, Any]:
    """Score `synthetic` against the patients in `real` it was learned from; JSON-serialisable, None for undefined.

    Utility (TSTR, TRTR and their gap, in AUROC) needs held-out patients in `test` and a `target` (default: the
    schema's); without either, `utility` is null and `utility_reason` says why. `seed` fixes the gradient boosting.

    Raises `DataError` if the schemas differ or `synthetic` or `real` has no rows.
    """
    fidelity = compare(synthetic, real)
    if test is not None and test.schema.digest != real.schema.digest:
        raise DataError(
            "the test table has another schema than the real table",
            fix="read both with the study's schema.json",
        )
    target = target or real.schema.target
    utility: dict[str, Any] | None = None
    reason = ""
    if test is None:
        reason = "no test table was given"
    elif target is None:
        reason = "the schema names no target (cohortium:target)"
    else:
        tstr = train_and_test(synthetic, test, target, seed)
        trtr = train_and_test(real, test, target, seed)
        utility = {"tstr": asdict(tstr), "trtr": asdict(trtr), "gap": asdict(utility_gap(tstr, trtr))}
    return {
        "schema_version": SCHEMA_VERSION,
        "caution": caution(len(real), None if test is None else len(test)),
        "rows": {
            "synthetic": len(synthetic),
            "real": len(real),
            "test": None if test is None else len(test),
        },
        "target": target,
        "fidelity": asdict(fidelity) | {"skipped": list(fidelity.skipped)},
        "utility": utility,
        "utility_reason": reason,
    }


def caution(real_rows: int, test_rows: int | None) -> str:
    """The sentence that must stand beside these numbers (privacy.md, section 0)."""
    held_out = "" if test_rows is None else f" and n = {test_rows} held-out patients"
    return (
        f"Un-noised evaluation aggregates, computed in a simulation on the data of n = {real_rows} patients{held_out};"
        " no ε covers them. Any ε reported beside them is of the model and cohort alone, excluding this evaluation and"
        " the decision to release."
    )
