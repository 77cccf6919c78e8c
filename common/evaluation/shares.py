"""The pooled marginals of a federated evaluation as shares, in the form of `marginals.Marginal`: for a picture.

Pure functions of the sites' counts, so that whatever covers those covers these.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.evaluation.counts import FINE_BINS, Key
from common.evaluation.marginals import DIGITS, bin_labels
from common.evaluation.pooled import PooledCounts, repaired
from common.schema import Column, Schema


def marginal_shares(
    schema: Schema, pooled: PooledCounts, own: Mapping[Key, NDArray[np.float64]]
) -> dict[str, dict[str, Any]]:
    """Every column that was counted: the patients' shares, repaired where they are noised, and the cohort's.

    `own` are the cohort's counts in the same tables. A column of which no site showed a table is left out.
    """
    found = {}
    for column in schema.columns:
        key = ("marginal", column.name)
        if pooled.patients.get(key, 0) > 0 and own[key].sum() > 0:
            counts = repaired(pooled.counts[key], pooled.patients[key])
            found[column.name] = _shares(column, own[key] / own[key].sum(), counts / counts.sum())
    return found


def _shares(column: Column, synthetic: NDArray[np.float64], real: NDArray[np.float64]) -> dict[str, Any]:
    inner = FINE_BINS if column.is_numeric else len(column.levels)
    sides = [[round(float(share), DIGITS) for share in side] for side in (synthetic, real)]
    return {
        "column": column.name,
        "kind": column.kind,
        "scale": column.scale,
        "labels": list(bin_labels(column, FINE_BINS) if column.is_numeric else column.levels),
        "synthetic": sides[0][:inner],
        "real": sides[1][:inner],
        "synthetic_missing": sides[0][inner] if column.nullable else 0.0,
        "real_missing": sides[1][inner] if column.nullable else 0.0,
    }
