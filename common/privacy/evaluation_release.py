"""The evaluation of a study at one site, in declared constants: what it spends, and its noise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.errors import StudyError
from common.evaluation.counts import CountPlan
from common.evaluation.plan import score_names
from common.privacy.events import GaussianStatistics, UnnoisedAggregates
from common.privacy.gaussian import gaussian_noise_multiplier
from common.study import Protocol, Study


def evaluation_round(study: Study) -> int:
    """The number under which the ledger keeps the evaluation: behind the rounds and behind a release."""
    return study.training.rounds + 2


def evaluation_event(study: Study) -> GaussianStatistics:
    """What the noised counts spend: one Gaussian mechanism, calibrated to [evaluation] epsilon at the study's δ.

    In units of the noise of each table, all tables together have sensitivity 1 (`CountPlan.deviations`).
    `StudyError` if the study has no accounted evaluation.
    """
    if study.evaluation.method != "accounted":
        raise StudyError('[evaluation] method is not "accounted": nothing is noised', fix="set the method")
    return GaussianStatistics(
        round=evaluation_round(study),
        noise_multiplier=gaussian_noise_multiplier(study.evaluation.epsilon, study.privacy.delta),
        sensitivity=1.0,
        statistics="evaluation: tables of counts, every patient in one cell of each",
    )


def evaluation_spend(protocol: Protocol) -> GaussianStatistics | UnnoisedAggregates:
    """What answering spends at every site: a function of the study alone. `StudyError` if it has no evaluation."""
    study = protocol.study
    if study.evaluation.method != "unnoised":
        return evaluation_event(study)
    return UnnoisedAggregates(
        round=evaluation_round(study),
        statistics=f"evaluation of the cohort: counts under the site's floor, {len(score_names(protocol))} scores",
    )


def noised_counts(
    exact: NDArray[np.float64], plan: CountPlan, event: GaussianStatistics, seed: int | None
) -> NDArray[np.float64]:
    """The counts with their noise, shape (plan.size,), float64; `seed=None` draws from the operating system."""
    from common.privacy.noise import RandomNumbers  # with PyTorch, for which what only plans need not wait

    if exact.shape != (plan.size,):
        raise ValueError(f"expected {plan.size} cells, got shape {exact.shape}")
    return exact + plan.deviations(event.noise_multiplier) * RandomNumbers(seed).normal(plan.size)
