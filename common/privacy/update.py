"""The norm projection of decoder updates (privacy.md, T2); `influence` says what it bounds. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Arrays = Mapping[str, Tensor]
# Relative tolerance of a receiver: float32 rounding of a sum of squares over any model we send stays far below it.
NORM_TOLERANCE = 1e-6


def update_norm(update: Arrays) -> float:
    """‖u‖₂ over all arrays of an update together, accumulated in float64."""
    return math.sqrt(sum(float(array.detach().to(torch.float64).square().sum()) for array in update.values()))


def project_update(update: Arrays, radius: float) -> dict[str, Tensor]:
    """ū = u · min(1, C/‖u‖₂): the nearest update with norm at most `radius` (privacy.md, T2).

    The result satisfies `update_norm(result) <= radius`, float32 rounding included. `ValueError` if an entry is not
    finite: a non-finite update has no projection and must never be sent.
    """
    norm = update_norm(update)
    if not math.isfinite(norm):
        raise ValueError("the update has entries that are not finite")
    factor = 1.0 if norm <= radius else radius / norm
    slack = 4.0 * torch.finfo(torch.float32).eps
    projected = _scaled(update, factor)
    while update_norm(projected) > radius:  # rounding; more than once only below float32's normal range
        factor *= 1.0 - slack
        slack = min(2.0 * slack, 1.0)
        projected = _scaled(update, factor)
    return projected


def _scaled(update: Arrays, factor: float) -> dict[str, Tensor]:
    return {name: (array.detach().to(torch.float64) * factor).to(torch.float32) for name, array in update.items()}
