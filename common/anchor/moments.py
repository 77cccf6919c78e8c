"""Message two: Σ a aᵀ over clipped feature rows a, ‖a‖ ≤ R, as one vector whose length is the Frobenius norm."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from common.anchor.features import FeatureMap

CHUNK_ROWS = 8192


def moment_size(features: int) -> int:
    """Number of values: the diagonal, and every pair once."""
    return features * (features + 1) // 2


def moment_sensitivity(radius: float) -> float:
    """L2 sensitivity of the vector under replacing one patient: ‖aaᵀ − bbᵀ‖_F ≤ √2 R² for ‖a‖, ‖b‖ ≤ R.

    ‖aaᵀ − bbᵀ‖_F² = ‖a‖⁴ + ‖b‖⁴ − 2 (a·b)² (privacy.md, section 5).
    """
    return math.sqrt(2.0) * radius * radius


def moment_vector(features: FeatureMap, levels: NDArray[np.int64]) -> NDArray[np.float64]:
    """The exact vector of encoded patients (rows, blocks), in chunks of constant memory."""
    total = np.zeros((features.size, features.size))
    for start in range(0, len(levels), CHUNK_ROWS):
        rows = features.of(features.cells.of(levels[start : start + CHUNK_ROWS]))
        total += rows.T @ rows
    return pack(total)


def pack(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """(S_ii, √2 S_ij for i < j): the vector whose Euclidean norm is the Frobenius norm of the symmetric matrix."""
    above = np.triu_indices(len(matrix), 1)
    return np.concatenate([np.diag(matrix), math.sqrt(2.0) * matrix[above]])


def unpack(vector: NDArray[np.float64], features: int) -> NDArray[np.float64]:
    """The symmetric matrix (features, features) behind `pack`."""
    matrix = np.zeros((features, features))
    matrix[np.triu_indices(features, 1)] = vector[features:] / math.sqrt(2.0)
    matrix += matrix.T
    matrix[np.diag_indices(features)] = vector[:features]
    return matrix
