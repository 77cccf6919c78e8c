"""What an attacker makes of what he sees: one number a row, larger where the row seems to be among those trained on.

The encoder never leaves its site, so whoever holds a decoder has to find a row's code himself: the code that explains
it best. Every score is a function of what one adversary sees and of the rows in question. `paired` turns scores of
both rows of every pair into the guesses of an audit (`common/evaluation/audit.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from common.encoding import TableEncoding
from common.model.vae import Decoder
from common.privacy.accountant import Adversary
from common.table import Table

STEPS = 60
STEPS_A_ROUND = 5  # a search that goes on from the codes of the round before
RATE = 0.1
CHUNK = 2048
KERNEL_WIDTH = 1.0  # half the distance between a number's minimum and maximum, less than between two categories

# Who can compute a score. Whoever sees more can compute those before him as well.
SEEN_BY: Mapping[str, Adversary] = {
    "nearest row": "public",
    "density": "public",
    "reconstruction": "member",
    "site's decoders": "coordinator",
    "updates": "coordinator",
}


def paired(values: np.ndarray) -> np.ndarray:
    """Scores (m,) from values (2 m,): those of the first rows of all pairs, then those of the second rows."""
    first, second = np.split(values, 2)
    return first - second


class CodeSearch:
    """Adam on the code of every row: argmax over z of log p(row | z) - ‖z‖²/2, from z = 0 on."""

    def __init__(self, levels: Tensor, latent_dim: int) -> None:
        """`levels` (rows, blocks), as `TableEncoding.encode` gives them."""
        self.levels = levels
        self.codes = torch.zeros(len(levels), latent_dim, requires_grad=True)
        self._optimiser = torch.optim.Adam([self.codes], lr=RATE)

    def improve(self, decoder: Decoder, steps: int) -> None:
        """Take `steps` steps of all codes under this decoder."""
        for _ in range(steps):
            loss = self._misfit(decoder) + 0.5 * self.codes.square().sum(dim=-1)
            # Only of the codes: the decoder's parameters collect nothing.
            (self.codes.grad,) = torch.autograd.grad(loss.sum(), [self.codes])
            self._optimiser.step()

    @torch.no_grad()
    def log_likelihood(self, decoder: Decoder) -> np.ndarray:
        """log p(row | z) of every row under its present code, nats, float64 (rows,)."""
        return -self._misfit(decoder).to(torch.float64).numpy()

    def _misfit(self, decoder: Decoder) -> Tensor:
        return decoder.head.negative_log_likelihood(decoder(self.codes), self.levels)


def reconstruction(decoder: Decoder, levels: Tensor) -> np.ndarray:
    """log p(row | z) under the best code that the search finds, nats, (rows,): needs one decoder."""
    found = []
    for part in levels.split(CHUNK):
        search = CodeSearch(part, decoder.network.linears[0].in_features)
        search.improve(decoder, STEPS)
        found.append(search.log_likelihood(decoder))
    return np.concatenate(found)


def message_scores(
    rounds: Iterable[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]], decoder: Decoder, levels: Tensor
) -> dict[str, np.ndarray]:
    """Two scores (rows,) from what a site was sent and sent back in every round: (global decoder, update).

    "site's decoders": the mean over the later half of the rounds of log p(row | z) under global decoder + update, which
    is the decoder as this site trained it, before it was averaged with the others'. "updates": the sum over all rounds
    of what the update adds to log p(row | z), a finite difference: to first order ⟨update, gradient of log p⟩. Weights
    of `decoder` are overwritten.
    """
    search = CodeSearch(levels, decoder.network.linears[0].in_features)
    after, gains = [], []
    for start, update in rounds:
        own = {name: array + update[name] for name, array in start.items()}
        decoder.load_arrays(own)
        search.improve(decoder, STEPS_A_ROUND)
        after.append(search.log_likelihood(decoder))
        decoder.load_arrays(start)
        gains.append(after[-1] - search.log_likelihood(decoder))
    return {"site's decoders": np.mean(after[len(after) // 2 :], axis=0), "updates": np.sum(gains, axis=0)}


def cohort_scores(cohort: Table, rows: Table) -> dict[str, np.ndarray]:
    """Two scores (rows,) from a released cohort, with Euclidean distances between encoded rows.

    "nearest row": minus the distance to the nearest synthetic row. "density": log of the mean over synthetic rows of a
    Gaussian kernel of width `KERNEL_WIDTH`.
    """
    encoding = TableEncoding(rows.schema)
    synthetic = encoding.encode(cohort).inputs.to(torch.float64)
    nearest, density = [], []
    for part in encoding.encode(rows).inputs.to(torch.float64).split(CHUNK):
        squares = torch.cdist(part, synthetic).square()
        nearest.append(-squares.amin(dim=1).sqrt())
        density.append((-squares / (2.0 * KERNEL_WIDTH**2)).logsumexp(dim=1) - np.log(len(synthetic)))
    return {"nearest row": torch.cat(nearest).numpy(), "density": torch.cat(density).numpy()}
