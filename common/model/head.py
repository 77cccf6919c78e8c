"""The decoder's last step: from its outputs θ to a distribution over every block of levels (see `encoding/base.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from common.encoding.base import Block


class ObservationHead(nn.Module):
    """Log-likelihood of levels under θ, and sampling of levels from θ.

    Blocks are processed in two padded groups, identity ones (θ are the logits) and polynomial ones
    (logits = base + basis θ), because a Python loop over columns would cost more than the network. `base` has shape
    (polynomial blocks, largest size) and is multiplied by `scale` like every output of the decoder; its padding never
    receives a gradient.
    """

    identity_index: Tensor
    identity_mask: Tensor
    basis_index: Tensor
    basis: Tensor
    basis_mask: Tensor

    def __init__(self, blocks: Sequence[Block], scale: float) -> None:
        super().__init__()
        starts = np.concatenate([[0], np.cumsum([block.parameters for block in blocks])]).astype(int)
        self.width = int(starts[-1])
        self.scale = scale
        self.identity = [i for i, block in enumerate(blocks) if block.basis is None]
        self.polynomial = [i for i, block in enumerate(blocks) if block.basis is not None]
        # Index `width` points at a column of zeros that is appended to θ, so that padding needs no branch.
        index = _padded([np.arange(starts[i], starts[i + 1]) for i in self.identity], self.width)
        self.register_buffer("identity_index", torch.from_numpy(index), persistent=False)
        self.register_buffer("identity_mask", _mask([blocks[i].size for i in self.identity]), persistent=False)
        index = _padded([np.arange(starts[i], starts[i + 1]) for i in self.polynomial], self.width)
        self.register_buffer("basis_index", torch.from_numpy(index), persistent=False)
        mask = _mask([blocks[i].size for i in self.polynomial])
        self.register_buffer("basis_mask", mask, persistent=False)
        basis = torch.zeros(len(self.polynomial), index.shape[1], mask.shape[1])
        for row, i in enumerate(self.polynomial):
            matrix = blocks[i].basis
            if matrix is not None:
                basis[row, : matrix.shape[1], : matrix.shape[0]] = torch.from_numpy(matrix.T.astype(np.float32))
        self.register_buffer("basis", basis, persistent=False)
        self.base = nn.Parameter(torch.zeros(mask.shape))
        self.block_count = len(blocks)

    def logits(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Unnormalised log-probabilities for θ (n, width), scaled already.

        Returns (n, identity blocks, levels) and (polynomial blocks, n, levels); padding is -inf.
        """
        padded = torch.cat((theta, theta.new_zeros(len(theta), 1)), dim=1)
        identity = padded[:, self.identity_index] + self.identity_mask
        tilt = torch.bmm(padded[:, self.basis_index].transpose(0, 1), self.basis)
        return identity, tilt + (self.base * self.scale + self.basis_mask)[:, None, :]

    def negative_log_likelihood(self, theta: Tensor, levels: Tensor) -> Tensor:
        """-log p(levels | θ) in nats, shape (n,), for levels (n, blocks); unobserved blocks contribute nothing."""
        identity, polynomial = self.logits(theta)
        loss = _cross_entropy(identity, levels[:, self.identity]).sum(dim=1)
        return loss + _cross_entropy(polynomial, levels[:, self.polynomial].T).sum(dim=0)

    @torch.no_grad()
    def sample(self, theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw levels (n, blocks), int64, independently over blocks given θ (n, width)."""
        identity, polynomial = self.logits(theta)
        levels = torch.empty(len(theta), self.block_count, dtype=torch.int64, device=theta.device)
        if self.identity:
            levels[:, self.identity] = _draw(identity, generator)
        if self.polynomial:
            levels[:, self.polynomial] = _draw(polynomial, generator).T
        return levels


def _padded(indices: list[np.ndarray], fill: int) -> np.ndarray:
    width = max((len(index) for index in indices), default=0)
    padded = np.full((len(indices), width), fill, dtype=np.int64)
    for row, index in enumerate(indices):
        padded[row, : len(index)] = index
    return padded


def _mask(sizes: list[int]) -> Tensor:
    """0 for real levels and -inf for padding, shape (blocks, largest size)."""
    mask = torch.full((len(sizes), max(sizes, default=0)), -torch.inf)
    for row, size in enumerate(sizes):
        mask[row, :size] = 0.0
    return mask


def _cross_entropy(logits: Tensor, levels: Tensor) -> Tensor:
    """-log softmax(logits)[levels] over the last axis, 0 where the level is negative; shape of `levels`."""
    if logits.numel() == 0:
        return logits.new_zeros(levels.shape)
    chosen = logits.gather(-1, levels.clamp_min(0)[..., None])[..., 0]
    return torch.where(levels < 0, 0.0, logits.logsumexp(dim=-1) - chosen)


def _draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Inverse-CDF draw over the last axis; padding of probability 0 is never drawn."""
    cumulative = torch.softmax(logits, dim=-1).cumsum(dim=-1)
    uniform = torch.rand(cumulative.shape[:-1], generator=generator, device=logits.device)
    # Scaling by the last sum keeps the threshold below it although float32 sums rarely reach exactly 1.
    threshold = (uniform * cumulative[..., -1])[..., None]
    return (cumulative <= threshold).sum(dim=-1).clamp_(max=logits.shape[-1] - 1)
