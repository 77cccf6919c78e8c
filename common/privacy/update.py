"""The norm projection of decoder updates and what it bounds (privacy.md, T2). Pure functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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


def influence(weight: float, radius: float) -> float:
    """2 w_k C: how far replacing all of a site's data moves the next global decoder, others held fixed (T2)."""
    return 2.0 * weight * radius


def output_influence(
    layer_bounds: Sequence[float], biases: Sequence[float], output_scale: float, latent_radius: float
) -> float:
    """max(1, τ) K(r) of T2: the factor from ‖Δθ‖₂ to the largest change of g(z) over ‖z‖ ≤ `latent_radius`.

    `layer_bounds` are s_l, `biases` the norms ‖b_l‖ of one of the two decoders; H_0 = r, H_l = s_l H_{l-1} + ‖b_l‖ and
    K(r)² = Σ_l (∏_{m>l} s_m)² (H_{l-1}² + 1).
    """
    heights = [latent_radius]
    for bound, bias in zip(layer_bounds, biases, strict=True):
        heights.append(bound * heights[-1] + bias)
    total = 0.0
    for position in range(len(layer_bounds)):
        behind = math.prod(layer_bounds[position + 1 :])
        total += behind**2 * (heights[position] ** 2 + 1.0)
    return max(1.0, output_scale) * math.sqrt(total)
