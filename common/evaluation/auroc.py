"""AUROC with an interval: DeLong, DeLong and Clarke-Pearson 1988 (Biometrics 44:837)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, rankdata

from common.evaluation.attacks.risk import Estimate

Array = NDArray[np.float64]


def delong(positive: NDArray[np.bool_], scores: Array) -> tuple[float, float]:
    """AUROC of `scores` for `positive`, both of shape (n,), and its variance; `ValueError` if a class is empty.

    Through mid-ranks (Sun and Xu 2014): ties count one half. With one row in a class its variance is taken as 0.
    """
    yes, no = scores[positive], scores[~positive]
    if yes.size == 0 or no.size == 0:
        raise ValueError("an AUROC needs rows with the level and rows without it")
    ranks = rankdata(np.concatenate([yes, no]))
    above = (ranks[: yes.size] - rankdata(yes)) / no.size  # of each positive: share of negatives below it
    below = 1.0 - (ranks[yes.size :] - rankdata(no)) / yes.size
    variance = sum(part.var(ddof=1) / part.size for part in (above, below) if part.size > 1)
    return float(above.mean()), float(variance)


def auroc_estimate(value: float, variance: float, confidence: float = 0.95) -> Estimate:
    """The AUROC with its normal interval, cut to [0, 1]."""
    half = float(norm.ppf((1 + confidence) / 2)) * variance**0.5
    return Estimate(value, max(0.0, value - half), min(1.0, value + half))
