"""What the norm projection of updates bounds (privacy.md, T2), in plain numbers: a statement needs no PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence


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
