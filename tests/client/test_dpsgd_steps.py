"""One step: its sample, its noise, its division."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

import client.trainers.dpsgd
from client.trainers import MODES
from client.trainers.clipping import row_gradients
from common.model.vae import Decoder, Encoder
from common.privacy.events import SampledGaussianSteps
from common.privacy.noise import RandomNumbers
from tests.client.noised import (
    CLIP,
    Chosen,
    flat,
    gradient,
    make_study,
    make_table,
    one_step,
    run,
)
from tests.client.rounds import round_inputs, same


@pytest.mark.parametrize("chosen", [[3], [0, 1, 2, 3, 4], list(range(60))])
def test_the_sum_is_divided_by_the_expected_batch(chosen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = round_inputs(one_step(batch_size=40), make_table(60))  # q = 2/3; round(60 / 40) = 2 steps
    inputs = replace(inputs, study=one_step(batch_size=45))  # round(60 / 45) = 1
    monkeypatch.setattr(client.trainers.dpsgd, "RandomNumbers", lambda _seed: Chosen(chosen))
    encoder = Encoder(inputs.encoding, inputs.study.model, torch.Generator().manual_seed(7))
    decoder = Decoder(inputs.encoding, inputs.study.model)
    decoder.load_arrays(inputs.decoder)
    data, generator = inputs.data, torch.Generator().manual_seed(7)
    rows = row_gradients(encoder, decoder, data.inputs[chosen], data.levels[chosen], 1.0, generator)
    assert float(rows.norms().min()) > CLIP
    wanted = flat(rows.clipped_sum(CLIP)) / 45.0
    assert torch.allclose(gradient(run(inputs)), wanted, rtol=1e-4, atol=1e-7)


def test_a_large_sample_is_worked_through_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without latent noise, which pieces draw in another order, the pieces must add up to the whole.
    monkeypatch.setattr(client.trainers.dpsgd, "RandomNumbers", lambda _seed: Chosen(list(range(30))))
    monkeypatch.setattr("common.model.vae.torch.randn", lambda shape, **_: torch.zeros(shape))
    inputs = round_inputs(one_step(), make_table(30))
    whole = gradient(run(inputs))
    monkeypatch.setattr(client.trainers.dpsgd, "LARGEST_PIECE", 7)
    assert torch.allclose(gradient(run(inputs)), whole, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize(("chosen", "rows"), [(None, 30), ([], 30), (None, 1)])
def test_the_noise_has_the_calibrated_size(
    seed: int | None, chosen: list[int] | None, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a sample of nobody, whose step is noise alone, and for a single patient."""
    study = one_step(seed=seed)
    inputs = round_inputs(study, make_table(rows))
    clean = Chosen(list(range(rows)) if chosen is None else chosen)
    with monkeypatch.context() as patch:
        patch.setattr(client.trainers.dpsgd, "RandomNumbers", lambda _seed: clean)
        quiet = gradient(run(inputs))
    assert (float(quiet.norm()) == 0) == (chosen == [])
    if chosen == []:
        monkeypatch.setattr(RandomNumbers, "sample", lambda *_: np.array([], dtype=np.int64))
    event = MODES["dpsgd"].event(study, 1, 0.5, rows)
    assert isinstance(event, SampledGaussianSteps) and event.sampling_probability == 1 and event.steps == 1
    noise = (gradient(run(inputs)) - quiet) * rows / (CLIP * event.noise_multiplier)
    count = noise.numel()
    assert abs(float(noise.mean())) < 5 / math.sqrt(count)
    assert abs(float(noise.square().mean()) - 1) < 5 * math.sqrt(2 / count)
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-6


def test_randomness_is_the_systems_in_production_and_repeatable_in_simulation() -> None:
    table = make_table(50)
    first, again, other = (run(round_inputs(make_study(), table, seed=seed)) for seed in (1, 1, 2))
    assert same(first.update, again.update) and same(first.state, again.state)
    assert not same(first.update, other.update)
    # Without the study's seed the same request gives other noise, though the networks start alike.
    production = [run(round_inputs(make_study(seed=None), table, seed=1)) for _ in range(2)]
    assert not same(production[0].update, production[1].update)


def test_poisson_samples_have_independent_members() -> None:
    for seed in (None, 3):
        random = RandomNumbers(seed)
        samples = np.zeros((4000, 5))
        for row in samples:
            row[random.sample(5, 0.3)] = 1
        assert np.all(np.abs(samples.mean(axis=0) - 0.3) < 5 * math.sqrt(0.21 / 4000))
        assert np.abs(np.corrcoef(samples.T) - np.eye(5)).max() < 5 / math.sqrt(4000)
        sizes = np.bincount(samples.sum(axis=1).astype(int), minlength=6) / 4000
        assert np.abs(sizes - stats.binom.pmf(range(6), 5, 0.3)).max() < 0.04
    assert RandomNumbers(None).sample(4, 1.0).tolist() == [0, 1, 2, 3]
