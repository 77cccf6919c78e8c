"""The anchor of a study at one site, in declared constants: what its two messages spend (privacy.md, section 5).

[anchor] epsilon is split between two Gaussian mechanisms. With ν the multiplier that the analytic Gaussian mechanism
gives for (ε, δ), message one gets ν/√s and message two ν/√(1 − s): 1/ν₁² + 1/ν₂² = 1/ν², so that both together are one
Gaussian mechanism of multiplier ν, although the second depends on the first's noised result (Dong, Roth, Su 2022).
"""

from __future__ import annotations

import math
from typing import Literal

from common.errors import StudyError
from common.privacy.events import GaussianStatistics
from common.privacy.gaussian import gaussian_noise_multiplier
from common.study import Study

Step = Literal["marginals", "moments"]
STEPS: tuple[Step, Step] = ("marginals", "moments")
# The first message's share of the budget, 1/ν² in units of the whole; chosen on two public tables.
MARGINALS_SHARE = 0.35
_STATISTICS: dict[Step, str] = {
    "marginals": "anchor: counts of every column's cells, in units of their L2 sensitivity",
    "moments": "anchor: second moments of clipped rows, in units of their L2 sensitivity √2 R²",
}


def anchor_round(study: Study, step: Step) -> int:
    """The number under which the ledger keeps a message: behind rounds, release and evaluation."""
    return study.training.rounds + 3 + STEPS.index(step)


def anchor_event(study: Study, step: Step) -> GaussianStatistics:
    """What a message spends: a function of the study alone. `StudyError` if the study has no anchor."""
    if study.anchor.epsilon is None:
        raise StudyError("[anchor] epsilon is missing: the study has no anchor", fix="set epsilon")
    share = MARGINALS_SHARE if step == "marginals" else 1.0 - MARGINALS_SHARE
    whole = gaussian_noise_multiplier(study.anchor.epsilon, study.privacy.delta)
    return GaussianStatistics(
        round=anchor_round(study, step),
        # A hair more noise than the split asks for: composed again, rounding must not exceed the target.
        noise_multiplier=whole / math.sqrt(share) * (1.0 + 1e-9),
        sensitivity=1.0,
        statistics=_STATISTICS[step],
    )


def due_spends(study: Study, number: int) -> set[int]:
    """Under which numbers a site's ledger must hold what it answered in a line of rounds.jsonl: 0 is the anchor."""
    return {anchor_round(study, step) for step in STEPS} if number == 0 else {number}


def anchor_events(study: Study) -> tuple[GaussianStatistics, ...]:
    """Both spends in order; none if the study has no anchor."""
    return () if study.anchor.epsilon is None else tuple(anchor_event(study, step) for step in STEPS)
