"""An audit of one step by repetition: below the claim, and above it when the noise is halved."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import client.trainers.dpsgd
from client.trainers import MODES
from common.privacy.accountant import account
from common.privacy.dpsgd import dpsgd_schedule
from common.privacy.noise import RandomNumbers
from common.study import Study
from common.table import Table
from tests.client.noised import (
    CLIP,
    COIN,
    Chosen,
    gradient,
    one_step,
    run,
)
from tests.client.rounds import round_inputs

REPETITIONS = 1000
# A large δ, because how fast a violation shows depends on both, and 10^-5 would need millions of repetitions.
AUDIT_EPSILON, AUDIT_DELTA = 1.0, 0.2


def audited_sums(study: Study, values: list[float], direction: Tensor | None, seed: int) -> Tensor:
    """Noised gradients of many independent runs of one round: all of them (1, d), or their parts along `direction`."""
    inputs = round_inputs(study, Table(COIN, np.array(values)[:, None]))
    # From a decoder of zeros, which an active coordinator may send, the two outcomes pull in opposite directions.
    inputs = replace(inputs, decoder={name: torch.zeros_like(array) for name, array in inputs.decoder.items()})
    count = 1 if direction is None else REPETITIONS
    found = []
    for repetition in range(count):
        client_random = RandomNumbers(seed * REPETITIONS + repetition)
        with pytest.MonkeyPatch.context() as patch:
            source = client_random if direction is not None else Chosen(list(range(len(values))))
            patch.setattr(client.trainers.dpsgd, "RandomNumbers", lambda _seed, source=source: source)
            found.append(gradient(run(inputs)))
    stacked = torch.stack(found)
    return stacked if direction is None else stacked @ direction


def largest_epsilon_shown(left: np.ndarray, right: np.ndarray) -> float:
    """The largest ε that tests of one table against the other refute at δ, at 99.9 % over all tests together.

    For the likelihood ratio of normals every threshold on the statistic is an optimal test; (ε, δ)-DP demands
    P(S) ≤ e^ε P'(S) + δ of each. Clopper-Pearson bounds with a Bonferroni correction.
    """
    thresholds = np.quantile(np.concatenate([left, right]), np.linspace(0.05, 0.95, 10))
    level = 0.001 / (2 * 2 * len(thresholds))  # two bounds, two directions
    largest = 0.0
    for first, second in ((left, right), (right, left)):
        for threshold in thresholds:
            sign = 1.0 if first.mean() > second.mean() else -1.0
            hits = int((sign * first > sign * threshold).sum())
            false = int((sign * second > sign * threshold).sum())
            least = stats.beta.ppf(level, hits, len(first) - hits + 1) if hits else 0.0
            most = stats.beta.ppf(1 - level, false + 1, len(second) - false) if false < len(second) else 1.0
            if least > AUDIT_DELTA:
                largest = max(largest, math.log((least - AUDIT_DELTA) / most))
    return largest


def test_an_audit_stays_below_the_claim_and_finds_halved_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tables that differ in one patient, the real trainer, and a likelihood-ratio test between them."""
    document = one_step(
        batch_size=6, kl_weight=1e-6, privacy={"epsilon": AUDIT_EPSILON, "delta": AUDIT_DELTA}
    ).document()
    study = Study.model_validate(document | {"model": document["model"] | {"hidden": [4], "latent_dim": 1}})
    left, right = [0.0, 1.0, 0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    event = MODES["dpsgd"].event(study, 1, 1.0, 6)
    claim = account([event], AUDIT_DELTA).epsilon
    assert 0.98 * AUDIT_EPSILON < claim <= AUDIT_EPSILON

    difference = (audited_sums(study, left, None, 0) - audited_sums(study, right, None, 0))[0]
    distance = float(difference.norm()) * 6
    assert 1.99 * CLIP < distance <= 2 * CLIP  # the worst pair: their clipped gradients are opposite

    direction = difference / difference.norm()
    honest = [audited_sums(study, values, direction, seed).numpy() for seed, values in ((1, left), (2, right))]
    shown = largest_epsilon_shown(*honest)
    assert shown < claim

    schedule = dpsgd_schedule(study, 6)
    weakened = replace(schedule, noise_multiplier=schedule.noise_multiplier / 2)
    monkeypatch.setattr(client.trainers.dpsgd, "dpsgd_schedule", lambda *_: weakened)
    halved = [audited_sums(study, values, direction, seed).numpy() for seed, values in ((3, left), (4, right))]
    assert largest_epsilon_shown(*halved) > claim
