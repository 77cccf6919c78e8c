"""The metrics document of a simulated study as plain JSON: fidelity, utility, inference, fairness, attacks.

A simulation owns all patients. Nothing here is noised, and no ε covers any of it (privacy.md, section 0).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from common.errors import DataError
from common.evaluation.attacks.suite import run_attacks
from common.evaluation.calibration import calibrate, predicted_levels
from common.evaluation.detection import detect
from common.evaluation.fairness import by_group
from common.evaluation.fidelity import compare
from common.evaluation.inference import compare_effects
from common.evaluation.inflation import measure_inflation
from common.evaluation.marginals import compare_marginals
from common.evaluation.missingness import compare_missingness
from common.evaluation.outcome_models import OutcomeModel, fit_outcome_models, why_no_model
from common.evaluation.pairs import compare_correlations, compare_pairs
from common.evaluation.plain import plain
from common.evaluation.roc import roc_curves
from common.evaluation.sample import at_most
from common.evaluation.utility import train_and_test, utility_gap
from common.table import Table

SCHEMA_VERSION = 2
DIGITS = 4  # of a correlation matrix, which is there to be looked at
# Above these a part looks at some of the rows, and `sampled` says so.
DETECTION_VALUES = 400_000  # rows times columns
ATTACK_PAIRS = 3_000_000_000  # pairs of rows times columns
ATTACK_ROWS, EFFECT_ROWS = 10_000, 50_000
MOST_LEVELS = 10  # of a target, each of which is a regression of its own
OnPart = Callable[[str, float], None]
Part = dict[str, Any]


def evaluate(
    synthetic: Table,
    real: Table,
    test: Table | None,
    seed: int,
    *,
    target: str | None = None,
    groups: Sequence[str] = (),
    secrets: Sequence[str] = (),
    sites: Sequence[str] | None = None,
    thorough: bool = True,
    on_part: OnPart | None = None,
) -> dict[str, Any]:
    """Score `synthetic` against the patients in `real` it was learned from; JSON-serialisable, None for undefined.

    `test` holds held-out patients, which utility, calibration, inflation and attacks need, as most parts need a
    `target` (default: the schema's). A part that is not possible says why under `reason` (`utility_reason` for
    utility). `groups` are columns by whose groups everything is scored again, `sites` the site of every real row,
    `secrets` the columns of the inference attack (default: the target). `seed` fixes all chance. With `thorough` false
    only fidelity and utility are measured. `on_part` is told how many seconds each part took.

    Raises `DataError` if the schemas differ, `synthetic` or `real` has no rows, or a name is no column.
    """
    clock = _Clock(on_part)
    fidelity = compare(synthetic, real)
    if test is not None and test.schema.digest != real.schema.digest:
        raise DataError(
            "the test table has another schema than the real table",
            fix="read both with the study's schema.json",
        )
    unknown = [repr(name) for name in (*groups, *secrets) if name not in real.schema.names]
    if unknown:
        raise DataError(
            f"no such column: {', '.join(unknown)}, named as a group or secret", fix="name columns of the schema"
        )
    target = target or real.schema.target
    clock("fidelity")
    reason = _why_no_utility(test, target)
    utility: Part | None = None
    if test is not None and target is not None:
        tstr = train_and_test(synthetic, test, target, seed)
        trtr = train_and_test(real, test, target, seed)
        utility = {"tstr": asdict(tstr), "trtr": asdict(trtr), "gap": asdict(utility_gap(tstr, trtr))}
    clock("utility")
    document = {
        "schema_version": SCHEMA_VERSION,
        "caution": caution(len(real), None if test is None else len(test)),
        "rows": {
            "synthetic": len(synthetic),
            "real": len(real),
            "test": None if test is None else len(test),
        },
        "target": target,
        "fidelity": asdict(fidelity) | {"skipped": list(fidelity.skipped)},
        "marginals": plain(compare_marginals(synthetic, real)),
        "utility": utility,
        "utility_reason": reason,
    }
    if thorough:
        parts = _Parts(synthetic, real, test, target, seed, clock)
        document |= parts.measure(groups, secrets or ((target,) if target else ()), sites)
    return document


def caution(real_rows: int, test_rows: int | None) -> str:
    """The sentence that must stand beside these numbers (privacy.md, section 0)."""
    held_out = "" if test_rows is None else f" and n = {test_rows} held-out patients"
    return (
        f"Un-noised evaluation aggregates, computed in a simulation on the data of n = {real_rows} patients{held_out};"
        " no ε covers them. Any ε reported beside them is of the model and cohort alone, excluding this evaluation and"
        " the decision to release."
    )


def _why_no_utility(test: Table | None, target: str | None) -> str:
    if test is None:
        return "no test table was given"
    return "" if target is not None else "the schema names no target (cohortium:target)"


class _Clock:
    def __init__(self, on_part: OnPart | None) -> None:
        self._on_part, self._last = on_part, time.perf_counter()

    def __call__(self, part: str) -> None:
        now = time.perf_counter()
        if self._on_part is not None:
            self._on_part(part, now - self._last)
        self._last = now


class _Parts:
    """The parts of a thorough evaluation; each has random numbers of its own, so that none depends on another."""

    def __init__(
        self, synthetic: Table, real: Table, test: Table | None, target: str | None, seed: int, clock: _Clock
    ) -> None:
        self.synthetic, self.real, self.target, self.clock = synthetic, real, target, clock
        self.test = test
        self.seed = seed
        self._numbers = iter(np.random.default_rng(seed).spawn(4))
        self.sampled: dict[str, dict[str, int]] = {}

    def measure(self, groups: Sequence[str], secrets: Sequence[str], sites: Sequence[str] | None) -> Part:
        """Every part by name."""
        detection, inflation, attacks, cut = self._numbers
        models: dict[str, tuple[OutcomeModel, ...]] = {}
        found: Part = {}

        def part(name: str, measure: Callable[[], Part]) -> None:
            try:
                found[name] = {"reason": ""} | plain(measure())
            except DataError as error:
                found[name] = {"reason": f"not possible because {error.message}"}
            self.clock(name)

        part("pairs", lambda: vars(compare_pairs(self.synthetic, self.real)))
        part("correlations", self._correlations)
        part("missingness", lambda: vars(compare_missingness(self.synthetic, self.real)))
        part("detection", lambda: self._detection(detection))
        part("calibration", lambda: self._calibration(models))
        part("roc", lambda: self._roc(models))
        part("effects", lambda: self._effects(cut))
        part("inflation", lambda: self._inflation(inflation))
        part("groups", lambda: self._groups(groups, sites, models))
        part("attacks", lambda: self._attacks(attacks, secrets))
        return {**found, "sampled": self.sampled}

    def _correlations(self) -> Part:
        found = compare_correlations(self.synthetic, self.real)
        # Rounding could leave -0.0; adding 0.0 makes it 0.0.
        matrices = {name: np.round(getattr(found, name), DIGITS) + 0.0 for name in ("synthetic", "real")}
        return vars(found) | matrices

    def _detection(self, rng: np.random.Generator) -> Part:
        rows = max(1, DETECTION_VALUES // len(self.real.schema.columns))
        both = [detect(self.synthetic, self.real, rng, values=seen, most_rows=rows) for seen in ("exact", "binned")]
        used, there = both[0].rows, min(len(self.synthetic), len(self.real))
        if used < there:
            self.sampled["detection"] = {"synthetic": used, "real": used}
        return {found.values: found for found in both} | {"reason": both[0].reason}

    def _calibration(self, models: dict[str, tuple[OutcomeModel, ...]]) -> Part:
        test, target = self._needed()
        found: Part = {}
        for name, table in (("tstr", self.synthetic), ("trtr", self.real)):
            why = why_no_model(table, target)
            if why:
                found[name], found["reason"] = [], f"not possible because {why} ({name})"
            else:
                models[name] = fit_outcome_models(table, target, self.seed)
                found[name] = calibrate(models[name], test, target)
        return found

    def _roc(self, models: Mapping[str, tuple[OutcomeModel, ...]]) -> Part:
        test, target = self._needed()
        if not models:
            raise DataError("neither the cohort nor the patients allow a model of the outcome")
        return {name: roc_curves(fitted, test, target) for name, fitted in models.items()}

    def _effects(self, rng: np.random.Generator) -> Part:
        target = self._target()
        cohort = self._cut("effects", {"synthetic": self.synthetic, "real": self.real}, EFFECT_ROWS, rng)
        levels = predicted_levels(self.real.schema, target)[:MOST_LEVELS]
        return {"levels": [compare_effects(cohort["synthetic"], cohort["real"], target, level) for level in levels]}

    def _inflation(self, rng: np.random.Generator) -> Part:
        test, target = self._needed()
        tables = self._cut("inflation", {"synthetic": self.synthetic, "real": self.real}, EFFECT_ROWS, rng)
        levels = predicted_levels(self.real.schema, target)[:MOST_LEVELS]
        measured = (
            measure_inflation(tables["synthetic"], tables["real"], test, target, level, rng) for level in levels
        )
        return {"levels": list(measured)}

    def _groups(
        self, groups: Sequence[str], sites: Sequence[str] | None, models: Mapping[str, tuple[OutcomeModel, ...]]
    ) -> Part:
        if not groups and sites is None:
            raise DataError("no column was named as a group ([evaluation] groups of the study)")
        boosting = {name: fitted[0] for name, fitted in models.items()}
        found = by_group(self.synthetic, self.real, self.test, groups, target=self.target, models=boosting, sites=sites)
        return {"groups": found}

    def _attacks(self, rng: np.random.Generator, secrets: Sequence[str]) -> Part:
        if self.test is None:
            raise DataError("no test table was given, and attacks need a control")
        rows = min(ATTACK_ROWS, math.isqrt(ATTACK_PAIRS // len(self.real.schema.columns)))
        tables = {"synthetic": self.synthetic, "real": self.real, "test": self.test}
        cut = self._cut("attacks", tables, rows, rng)
        report = run_attacks(cut["synthetic"], cut["real"], cut["test"], rng, secrets=secrets or None)
        return {"report": report.to_json()}

    def _target(self) -> str:
        if self.target is None:
            raise DataError(_why_no_utility(self.real, None))
        return self.target

    def _needed(self) -> tuple[Table, str]:
        if self.test is None:
            raise DataError(_why_no_utility(None, None))
        return self.test, self._target()

    def _cut(self, part: str, tables: Mapping[str, Table], rows: int, rng: np.random.Generator) -> dict[str, Table]:
        cut = {name: at_most(table, rows, rng) for name, table in tables.items()}
        shorter = {name: rows for name, table in tables.items() if len(table) > rows}
        if shorter:
            self.sampled[part] = shorter
        return cut
