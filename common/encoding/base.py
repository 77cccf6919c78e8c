"""What one column contributes: features for the encoder, and blocks of levels whose distribution the decoder emits.

The observation model is discrete throughout. A column has one block (its levels, or its bins) and, if it is a nullable
number, a second one (known or missing). The distribution over a block with m levels is the exponential family
p(j) ∝ exp(base_j + Σ_k basis_jk θ_k): θ comes from the Lipschitz decoder, `base` is a free vector of the decoder, and
`basis` is fixed by the schema. For categories the basis is the identity, so θ are the logits; for numbers it is a few
Legendre polynomials over the declared range, so θ tilts and bends the column's marginal shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from common.schema import Column

UNOBSERVED = -1


@dataclass(frozen=True)
class Block:
    """One discrete variable of the observation model.

    `size` levels; `basis` has shape (size, parameters) with entries in [-1, 1], or is None for the identity.
    """

    size: int
    basis: np.ndarray | None = None

    @property
    def parameters(self) -> int:
        """Number of decoder outputs this block takes."""
        return self.size if self.basis is None else self.basis.shape[1]


class ColumnEncoding(ABC):
    """Encoding of one column; a kind of column is a subclass in a module of its own."""

    column: Column
    input_width: int
    blocks: tuple[Block, ...]
    diameter: float
    """Largest Euclidean distance between two encoded values: d_j of privacy.md, section 2."""

    @abstractmethod
    def inputs(self, values: np.ndarray) -> np.ndarray:
        """Encoder features, float32 of shape (n, input_width), for float64 values (n,) with NaN for missing."""

    @abstractmethod
    def levels(self, values: np.ndarray) -> np.ndarray:
        """Level of each block, int64 of shape (n, len(blocks)); `UNOBSERVED` where a block says nothing."""

    @abstractmethod
    def decode(self, levels: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        """Values (n,) in the column's unit from levels (n, len(blocks)) and uniform numbers (n,) in [0, 1)."""


def one_hot(codes: np.ndarray, size: int) -> np.ndarray:
    """Float32 one-hot rows of shape (n, size)."""
    return np.eye(size, dtype=np.float32)[codes]
