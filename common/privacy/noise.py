"""Gaussian noise that privacy rests on: from the operating system's CSPRNG, or from a seed in a simulation.

Floating-point Gaussians have a stated caveat (Mironov 2012): their low bits are not exactly those of a real-valued
normal distribution.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor


def add_noise(update: Mapping[str, Tensor], stddev: float, seed: int | None) -> dict[str, Tensor]:
    """u + N(0, stddev² I), entry by entry, float32 by name as given.

    `seed=None` draws from the operating system; a seed is for simulations, whose ε is then "as if".
    """
    sizes = [array.numel() for array in update.values()]
    noise = torch.from_numpy(stddev * _normal(sum(sizes), seed))
    return {
        name: (array.to(torch.float64) + part.reshape(array.shape)).to(torch.float32)
        for (name, array), part in zip(update.items(), noise.split(sizes), strict=True)
    }


def _normal(size: int, seed: int | None) -> np.ndarray:
    """Standard normal numbers (size,), float64, by inversion of uniform ones with 53 random bits each."""
    if seed is not None:
        return np.random.default_rng(seed).standard_normal(size)
    bits = np.frombuffer(secrets.token_bytes(8 * size), dtype=np.uint64) >> np.uint64(11)
    return ndtri((bits.astype(np.float64) + 0.5) / 2.0**53)
