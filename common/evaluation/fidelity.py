"""Distances between the marginals and the correlations of two tables of one schema.

Every number is an un-noised aggregate of patients when one of the tables holds patients (privacy.md, section 0).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from common.errors import DataError
from common.table import Table


@dataclass(frozen=True)
class Fidelity:
    """How two tables differ; every distance lies in [0, 1] except `correlation_difference`, in [0, 2]; 0 is equal.

    `ks` covers the numeric columns, `tv` the categorical and boolean ones, `missingness` all. A mean over nothing is
    None. `skipped` names the numeric columns without one known value on either or both sides, whose `ks` is None and
    which `ks_mean` leaves out. `correlation_pairs` counts the pairs behind `correlation_difference`.
    """

    ks: dict[str, float | None]
    tv: dict[str, float]
    missingness: dict[str, float]
    ks_mean: float | None
    tv_mean: float | None
    missingness_mean: float
    correlation_difference: float | None
    correlation_pairs: int
    skipped: tuple[str, ...]


def compare(synthetic: Table, real: Table) -> Fidelity:
    """Compare two tables of the same schema; symmetric in its arguments.

    Raises `DataError` if the schemas differ or a table has no rows.
    """
    check_comparable(synthetic, real)
    ks: dict[str, float | None] = {}
    tv: dict[str, float] = {}
    missingness: dict[str, float] = {}
    for j, column in enumerate(real.schema.columns):
        a, b = synthetic.values[:, j], real.values[:, j]
        gone_a, gone_b = np.isnan(a), np.isnan(b)
        missingness[column.name] = abs(float(gone_a.mean()) - float(gone_b.mean()))
        if column.is_numeric:
            ks[column.name] = kolmogorov_smirnov(a[~gone_a], b[~gone_b])
        else:
            tv[column.name] = total_variation(a, b, len(column.levels))
    difference, pairs = correlation_difference(synthetic, real)
    missingness_mean = _mean(missingness.values())
    assert missingness_mean is not None  # a schema has at least one column
    return Fidelity(
        ks=ks,
        tv=tv,
        missingness=missingness,
        ks_mean=_mean(ks.values()),
        tv_mean=_mean(tv.values()),
        missingness_mean=missingness_mean,
        correlation_difference=difference,
        correlation_pairs=pairs,
        skipped=tuple(name for name, value in ks.items() if value is None),
    )


def check_comparable(synthetic: Table, real: Table) -> None:
    """Raise `DataError` unless both tables have rows and the same schema (by digest)."""
    if real.schema.digest != synthetic.schema.digest:
        raise DataError(
            "the two tables have different schemas and cannot be compared",
            fix="read both with the study's schema.json",
        )
    for name, table in (("synthetic", synthetic), ("real", real)):
        if len(table) == 0:
            raise DataError(f"the {name} table has no rows", fix="an evaluation needs at least one row a side")


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float | None:
    """sup |F_a − F_b| of the empirical distribution functions of two samples without NaN, shapes (n,) and (m,).

    None if a sample is empty. Ties are exact: both functions are right-continuous and read at every sample point.
    """
    if a.size == 0 or b.size == 0:
        return None
    a, b = np.sort(a), np.sort(b)
    points = np.concatenate([a, b])
    below_a = np.searchsorted(a, points, side="right") / a.size
    below_b = np.searchsorted(b, points, side="right") / b.size
    return float(np.abs(below_a - below_b).max())


def total_variation(a: np.ndarray, b: np.ndarray, levels: int) -> float:
    """½ Σ |p_a − p_b| over `levels` levels and 'missing' as one more; level indices or NaN, shapes (n,) and (m,)."""
    return float(np.abs(_frequencies(a, levels) - _frequencies(b, levels)).sum() / 2)


def _frequencies(codes: np.ndarray, levels: int) -> np.ndarray:
    counts = np.bincount(np.where(np.isnan(codes), levels, codes).astype(np.intp), minlength=levels + 1)
    return counts / codes.size


def correlation_difference(a: Table, b: Table) -> tuple[float | None, int]:
    """Mean |r_a − r_b| of Pearson correlations over pairs of features, and the number of pairs (None, 0 if none).

    Features: each numeric column with missing values replaced by the median of its own table, and one indicator per
    level of each categorical or boolean column (all 0 where missing). A feature constant in either table is dropped,
    since it has no correlation there. Pairs of levels of one column are excluded: they are negatively correlated by
    construction and would count a column's marginal a second time.
    """
    features_a, owner = expand(a)
    features_b, _ = expand(b)
    varies = (np.ptp(features_a, axis=0) > 0) & (np.ptp(features_b, axis=0) > 0)
    owner = owner[varies]
    difference = np.abs(correlation_matrix(features_a[:, varies]) - correlation_matrix(features_b[:, varies]))
    counted = np.triu(owner[:, None] != owner[None, :], k=1)
    pairs = int(counted.sum())
    return (float(difference[counted].mean()), pairs) if pairs else (None, 0)


def expand(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Features, shape (rows, features), and the index of the column each belongs to, shape (features,)."""
    columns = table.schema.columns
    owner = np.repeat(np.arange(len(columns)), [1 if c.is_numeric else len(c.levels) for c in columns])
    features = np.empty((len(table), owner.size))
    start = 0
    for j, column in enumerate(columns):
        values = table.values[:, j]
        if column.is_numeric:
            known = values[~np.isnan(values)]
            # A column without any known value becomes a constant, which the caller drops.
            features[:, start] = np.where(np.isnan(values), np.median(known) if known.size else 0.0, values)
            start += 1
        else:
            stop = start + len(column.levels)
            features[:, start:stop] = values[:, None] == np.arange(len(column.levels))
            start = stop
    return features, owner


def correlation_matrix(features: np.ndarray) -> np.ndarray:
    """Pearson correlation matrix of features that all vary, shape (features, features)."""
    centred = features - features.mean(axis=0)
    # Scaled before squaring, so that neither very large nor very small values over- or underflow.
    centred /= np.abs(centred).max(axis=0, initial=0.0)
    centred /= np.linalg.norm(centred, axis=0)
    return centred.T @ centred


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
