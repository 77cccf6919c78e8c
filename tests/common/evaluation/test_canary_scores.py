import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from common.encoding import TableEncoding
from common.evaluation.canary_scores import (
    KERNEL_WIDTH,
    SEEN_BY,
    CodeSearch,
    cohort_scores,
    message_scores,
    paired,
    reconstruction,
)
from common.model.vae import Decoder
from common.privacy.accountant import Adversary
from common.study import ModelSection
from common.table import Table
from tests.client.test_trainers import SCHEMA, make_table

ENCODING = TableEncoding(SCHEMA)
MODEL = ModelSection(latent_dim=1, hidden=(16, 16))


def make_decoder(seed: int = 0, model: ModelSection = MODEL) -> Decoder:
    return Decoder(ENCODING, model, torch.Generator().manual_seed(seed))


def moved(decoder: Decoder, size: float, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(a.shape, generator=generator) for name, a in decoder.arrays().items()}


def test_every_adversary_has_a_score() -> None:
    assert set(SEEN_BY.values()) == set(get_args(Adversary))


def test_the_difference_of_a_pair_is_first_minus_second() -> None:
    assert paired(np.array([5.0, 1.0, 2.0, 4.0])).tolist() == [3.0, -3.0]


def test_the_search_finds_the_best_code_of_a_line() -> None:
    """Against a fine grid over the one latent dimension, in float64 sums of the head's own log-probabilities."""
    decoder, levels = make_decoder(), ENCODING.encode(make_table(40)).levels
    search = CodeSearch(levels, 1)
    search.improve(decoder, 300)
    grid = torch.linspace(-6, 6, 2401)[:, None]
    with torch.no_grad():
        objective = torch.stack(
            [
                -decoder.head.negative_log_likelihood(decoder(grid), row.expand(len(grid), -1)) - grid[:, 0] ** 2 / 2
                for row in levels
            ]
        )
        reached = search.log_likelihood(decoder) - search.codes[:, 0].detach().numpy() ** 2 / 2
    best = objective.max(dim=1).values.numpy()
    assert (reached <= best + 1e-3).all()
    assert np.mean(reached > best - 0.01) > 0.6  # some rows end in a local optimum, not far below
    assert np.mean(best - reached) < 0.1
    start = CodeSearch(levels, 1).log_likelihood(decoder)
    assert np.mean(best - start) > 0.1  # so that finding it is an achievement
    assert all(parameter.grad is None for parameter in decoder.parameters())


def test_a_decoder_that_emits_a_row_reconstructs_it_better_than_another_row() -> None:
    table = make_table(2)
    levels = ENCODING.encode(table).levels
    decoder = make_decoder()
    optimiser = torch.optim.Adam(decoder.parameters(), lr=0.05)
    for _ in range(200):
        loss = decoder.head.negative_log_likelihood(decoder(torch.zeros(1, 1)), levels[:1]).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    first, second = reconstruction(decoder, levels)
    assert first > second + 5 and first <= 0


def test_the_update_score_is_to_first_order_the_inner_product_with_the_gradient() -> None:
    levels = ENCODING.encode(make_table(12)).levels
    decoder, latent = make_decoder(3), 1
    start, update = decoder.arrays(), moved(decoder, 1e-4, 5)
    found = message_scores([(start, update)], make_decoder(4), levels)["updates"]
    # The codes that the search had found, under the decoder that the site trained.
    own = make_decoder(4)
    own.load_arrays({name: array + update[name] for name, array in start.items()})
    search = CodeSearch(levels, latent)
    search.improve(own, 5)
    codes = search.codes.detach()
    decoder.load_arrays(start)
    for row in range(len(levels)):
        likelihood = -decoder.head.negative_log_likelihood(decoder(codes[row : row + 1]), levels[row : row + 1]).sum()
        gradient = torch.autograd.grad(likelihood, list(decoder.parameters()), allow_unused=True)
        product = sum(
            float((g * update[name]).sum())
            for g, (name, _) in zip(gradient, decoder.named_parameters(), strict=True)
            if g is not None
        )
        assert found[row] == pytest.approx(product, abs=2e-4 + 0.05 * abs(product))


def test_the_site_s_decoders_are_averaged_over_the_later_half_of_the_rounds() -> None:
    levels = ENCODING.encode(make_table(10)).levels
    decoder = make_decoder(1)
    rounds = [(moved(decoder, 0.2, seed), moved(decoder, 0.1, 50 + seed)) for seed in range(4)]
    found = message_scores(rounds, make_decoder(2), levels)
    search, after = CodeSearch(levels, 1), []
    for start, update in rounds:
        decoder.load_arrays({name: start[name] + update[name] for name in start})
        search.improve(decoder, 5)
        after.append(search.log_likelihood(decoder))
    assert found["site's decoders"] == pytest.approx((after[2] + after[3]) / 2)
    alone = [message_scores(rounds[:n], make_decoder(2), levels)["updates"] for n in range(1, 5)]
    assert found["updates"] == pytest.approx(alone[3]) and not np.allclose(alone[3], alone[2])  # a sum over all rounds


def test_cohort_scores_against_a_loop_over_pairs_of_rows() -> None:
    cohort, rows = make_table(30, seed=1), make_table(7, seed=2)
    a, b = ENCODING.encode(cohort).inputs.numpy(), ENCODING.encode(rows).inputs.numpy()
    found = cohort_scores(cohort, rows)
    for i, row in enumerate(b):
        squares = [sum((float(p) - float(q)) ** 2 for p, q in zip(row, other, strict=True)) for other in a]
        assert found["nearest row"][i] == pytest.approx(-math.sqrt(min(squares)), abs=1e-5)
        kernel = sum(math.exp(-s / (2 * KERNEL_WIDTH**2)) for s in squares) / len(a)
        assert found["density"][i] == pytest.approx(math.log(kernel), abs=1e-5)


def test_a_cohort_that_holds_a_row_gives_it_away() -> None:
    cohort, others = make_table(50, seed=1), make_table(50, seed=2)
    rows = Table(SCHEMA, np.vstack([cohort.values[:20], others.values[:20]]))
    found = cohort_scores(cohort, rows)
    assert (found["nearest row"][:20] == 0).all()
    assert (paired(found["nearest row"]) > 0).mean() > 0.9
