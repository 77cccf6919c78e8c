"""How far p-values and intervals computed from synthetic rows can be trusted.

An analyst who takes M synthetic rows for M patients computes standard errors that shrink with M. But the cohort was
learned from n patients, and repeats what was chance in them. Let β be the truth, b the patients' estimate with
variance V_n, and suppose the best: a generator whose effects are exactly b. The analyst's estimate then varies around
β with V_n + V_M, and V_n ≈ V_M · M/n: his standard errors are too small by √(1 + M/n) (Raab, Nowok and Dibben 2016,
Journal of Privacy and Confidentiality 7(3):4). A worse generator adds to this.

No check on the cohort alone can show it: rows of one generator are independent given the generator, so that a
bootstrap of them, several cohorts of it, a permuted outcome or a column of noise all behave as nominal. It takes
patients who were not learned from. Every number with patients is an un-noised aggregate of them (privacy.md,
section 0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import chi2, norm

from common.errors import DataError
from common.evaluation.attacks.risk import Estimate
from common.evaluation.effects import EffectModels, Effects, fit_effects
from common.evaluation.fidelity import check_comparable
from common.evaluation.logistic import fit_logistic
from common.table import Table

PERMUTATIONS, PERMUTED_ROWS, COMMON = 50, 5_000, 50


@dataclass(frozen=True)
class Dispersion:
    """How far the effects in a table are from those in held-out patients, for what sampling of both explains.

    `value` is d'(V₁ + V₂)⁻¹ d / k over k effects with difference d: about 1 if the table's rows are patients of the
    same population, and chi-squared with k degrees of freedom over k. `p_value` is of that. `within`: share of effects
    whose difference is within 1.96 of its standard error; 95 % expected.
    """

    value: float
    p_value: float
    within: float


@dataclass(frozen=True)
class Inflation:
    """What nominal standard errors of the cohort leave out; `reason` says why there is none of it.

    `permuted` is the rejection rate at 5 % after permuting the outcome among synthetic rows: it must be about 5 %,
    which shows that the test works in these rows, and nothing about the generator. `at_least` is √(1 + M/n): by how
    much nominal standard errors are too small even with the best of generators. `synthetic` compares the cohort with
    held-out patients; `real`, the control, the patients it was learned from with the same; `best` is what `synthetic`
    would be on average with the best of generators.
    """

    level: str
    synthetic_rows: int
    real_rows: int
    held_out_rows: int
    permuted: Estimate | None
    at_least: float | None
    synthetic: Dispersion | None
    real: Dispersion | None
    best: float | None
    ridge: bool
    reason: str = ""


def measure_inflation(
    synthetic: Table,
    real: Table,
    held_out: Table,
    target: str,
    level: int,
    rng: np.random.Generator,
    *,
    columns: Sequence[str] | None = None,
) -> Inflation:
    """Compare the effects in the cohort, and in the patients it was learned from, with those in held-out patients.

    Raises `DataError` if the schemas differ, a table has no rows, or `columns` names what is no predictor.
    """
    check_comparable(synthetic, real)
    check_comparable(held_out, real)
    tables = {"synthetic": synthetic, "real": real, "test": held_out}
    models = fit_effects(tables, "real", target, level, columns)
    if models.reason:
        return Inflation(models.level, 0, 0, 0, None, None, None, None, None, False, models.reason)
    ours, theirs, others = (models.effects[key] for key in ("synthetic", "real", "test"))
    spread = np.linalg.solve(ours.covariance + others.covariance, theirs.covariance)
    return Inflation(
        level=models.level,
        synthetic_rows=ours.rows,
        real_rows=theirs.rows,
        held_out_rows=others.rows,
        permuted=permuted_rejections(models, "synthetic", rng),
        at_least=float(np.sqrt(1 + ours.rows / theirs.rows)),
        synthetic=dispersion(ours, others),
        real=dispersion(theirs, others),
        best=1.0 + float(np.trace(spread)) / len(ours.values),
        ridge=models.ridge,
    )


def dispersion(one: Effects, other: Effects) -> Dispersion:
    """The dispersion of the difference of the same effects in two tables without a row in common."""
    covariance = one.covariance + other.covariance
    gap = one.values - other.values
    square, terms = float(gap @ np.linalg.solve(covariance, gap)), len(gap)
    within = np.abs(gap) <= norm.ppf(0.975) * np.sqrt(np.diag(covariance))
    return Dispersion(square / terms, float(chi2.sf(square, terms)), float(within.mean()))


def permuted_rejections(
    models: EffectModels, key: str, rng: np.random.Generator, *, permutations: int = PERMUTATIONS, level: float = 0.05
) -> Estimate | None:
    """Share of Wald tests at `level` that reject after permuting the outcome among the rows of one table.

    On at most `PERMUTED_ROWS` rows, without terms that fewer than `COMMON` of them tell apart: the test is one for
    large samples. The interval is over permutations, whose tests depend on each other. None without a term, or if more
    than half of the regressions have no solution.
    """
    features, outcomes, reported = models.features[key], models.outcomes[key], models.reported
    if len(outcomes) > PERMUTED_ROWS:
        chosen = rng.choice(len(outcomes), PERMUTED_ROWS, replace=False)
        features, outcomes = features[chosen], outcomes[chosen]
    common = [_differing(feature) >= COMMON for feature in features.T]
    places = 1 + np.flatnonzero(np.isin(np.flatnonzero(common), reported))
    if places.size == 0:
        return None
    z = float(norm.ppf(1 - level / 2))
    rates = []
    for _ in range(permutations):
        try:
            fit = fit_logistic(features[:, common], rng.permutation(outcomes))
        except np.linalg.LinAlgError:
            continue
        rates.append(float(np.mean(np.abs(fit.coefficients[places] / fit.errors[places]) > z)))
    if len(rates) < max(2, permutations / 2):
        return None
    half = 1.96 * float(np.std(rates, ddof=1)) / len(rates) ** 0.5
    value = float(np.mean(rates))
    return Estimate(value, max(0.0, value - half), min(1.0, value + half))


def _differing(feature: np.ndarray) -> int:
    """How many rows differ from the most common value."""
    return len(feature) - int(np.unique(feature, return_counts=True)[1].max())


def spread_over_cohorts(
    cohorts: Sequence[Table], target: str, level: int, *, columns: Sequence[str] | None = None
) -> float | None:
    """How much effects vary over cohorts, for what their nominal standard errors say: root mean ratio of variances.

    About 1 for cohorts of one generator, whatever it learned. Over cohorts of *separately trained* generators it shows
    what training adds: its own randomness and, if each had its own patients, theirs. The first cohort gives scales and
    references. None if there is no regression. Raises `DataError` for fewer than two cohorts.
    """
    if len(cohorts) < 2:
        raise DataError("a spread needs at least two cohorts", fix="give the cohorts of several runs of one study")
    tables = {str(index): cohort for index, cohort in enumerate(cohorts)}
    models = fit_effects(tables, "0", target, level, columns)
    if models.reason:
        return None
    values = np.array([effects.values for effects in models.effects.values()])
    nominal = np.mean([np.diag(effects.covariance) for effects in models.effects.values()], axis=0)
    return float(np.sqrt(np.mean(values.var(axis=0, ddof=1) / nominal)))
