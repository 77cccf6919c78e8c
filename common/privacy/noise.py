"""Gaussian noise that privacy rests on: from the operating system's CSPRNG, or from a seed in a simulation.

Floating-point Gaussians have a stated caveat (Mironov 2012): their low bits are not exactly those of a real-valued
normal distribution.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def add_noise(update: Mapping[str, Tensor], stddev: float, seed: int | None) -> dict[str, Tensor]:
    """u + N(0, stddev² I), entry by entry, float32 by name as given.

    `seed=None` draws from the operating system; a seed is for simulations, whose ε is then "as if".
    """
    sizes = [array.numel() for array in update.values()]
    noise = torch.from_numpy(stddev * RandomNumbers(seed).normal(sum(sizes)))
    return {
        name: (array.to(torch.float64) + part.reshape(array.shape)).to(torch.float32)
        for (name, array), part in zip(update.items(), noise.split(sizes), strict=True)
    }


class RandomNumbers:
    """Independent random numbers that privacy rests on, one stream however often it is asked.

    `seed=None` draws every number from the operating system; a seed is for simulations, whose ε is then "as if".
    """

    def __init__(self, seed: int | None) -> None:
        self._generator = None if seed is None else np.random.default_rng(seed)

    def uniform(self, size: int) -> NDArray[np.float64]:
        """`size` numbers, uniform in [0, 1); from the operating system, with 52 random bits each and never 0."""
        if self._generator is not None:
            return self._generator.random(size)
        # 52 bits: with 53 the largest number plus a half rounds to 1, whose normal quantile is infinite.
        bits = np.frombuffer(secrets.token_bytes(8 * size), dtype=np.uint64) >> np.uint64(12)
        return (bits.astype(np.float64) + 0.5) / 2.0**52

    def normal(self, size: int) -> NDArray[np.float64]:
        """`size` standard normal numbers, by inversion of the uniform ones."""
        if self._generator is not None:
            return self._generator.standard_normal(size)
        from scipy.special import ndtri  # takes a moment to import, which a site without noise need not wait for

        return ndtri(self.uniform(size))

    def sample(self, size: int, probability: float) -> NDArray[np.int64]:
        """A Poisson sample of range(size): every index independently with `probability`, in ascending order."""
        if probability >= 1:
            return np.arange(size)
        return np.flatnonzero(self.uniform(size) < probability)
