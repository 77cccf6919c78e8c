"""The decoder's last step: from its outputs θ to a distribution over every block of levels (see `encoding/base.py`)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.encoding.base import Block

# Blocks of similar size are padded to a common one and processed together. A group costs about as much overhead as
# this many padded levels; the grouping balances the two.
GROUP_OVERHEAD = 60
# exp(±this) and sums of a hundred of them are far from overflow and underflow in float32.
SAFE_EXPONENT = 75.0


class ObservationHead(nn.Module):
    """Log-likelihood of levels under θ, and sampling of levels from θ.

    Identity blocks take their logits from θ; polynomial ones are `scale`·base + basisᵀ θ, where `base`, a free vector
    over all their levels, is multiplied like every output of the decoder. A Python loop over columns would cost more
    than the network, so blocks are processed in a few padded groups.
    """

    def __init__(self, blocks: Sequence[Block], scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.block_count = len(blocks)
        starts = [0, *itertools.accumulate(block.parameters for block in blocks)]
        self.width = starts[-1]
        identity = [i for i, block in enumerate(blocks) if block.basis is None]
        polynomial = [i for i, block in enumerate(blocks) if block.basis is not None]
        groups: list[_Group] = []
        for members in _grouped(identity, [block.size for block in blocks]):
            groups.append(
                _IdentityGroup(members, [blocks[i] for i in members], [starts[i] for i in members], self.width)
            )
        base_start = 0
        for members in _grouped(polynomial, [block.size for block in blocks]):
            chosen = [blocks[i] for i in members]
            groups.append(_PolynomialGroup(members, chosen, [starts[i] for i in members], self.width, base_start))
            base_start += sum(block.size for block in chosen)
        self.groups = nn.ModuleList(groups)
        self.base = nn.Parameter(torch.zeros(base_start))

    def logits(self, theta: Tensor, base: Tensor | None = None) -> list[tuple[list[int], Tensor]]:
        """Per group: the blocks in it, and unnormalised log-probabilities (blocks, n, levels); padding is -inf.

        `theta` has shape (n, width) and includes the decoder's output scale. `base` replaces the parameter of that
        name; of shape (n, len(base)) it gives every row its own, which is how its per-row gradients are had.
        """
        base = self.base if base is None else base
        # One column of zeros behind θ, and one zero behind the base, are where the padding's indices point.
        padded = torch.cat((theta, theta.new_zeros(len(theta), 1)), dim=1)
        base = torch.cat((base * self.scale, base.new_zeros(*base.shape[:-1], 1)), dim=-1)
        return [(group.members, group(padded, base)) for group in self.groups if isinstance(group, _Group)]

    def negative_log_likelihood(self, theta: Tensor, levels: Tensor, base: Tensor | None = None) -> Tensor:
        """-log p(levels | θ) in nats, shape (n,), for levels (n, blocks); unobserved blocks contribute nothing.

        `base` as in `logits`.
        """
        total = theta.new_zeros(len(theta))
        for members, logits in self.logits(theta, base):
            wanted = levels[:, members].T
            chosen = logits.log_softmax(dim=-1).gather(-1, wanted.clamp_min(0)[..., None])[..., 0]
            total = total - torch.where(wanted < 0, 0.0, chosen).sum(dim=0)
        return total

    @torch.no_grad()
    def sample(self, theta: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw levels (n, blocks), int64, independently over blocks given θ (n, width)."""
        levels = torch.empty(len(theta), self.block_count, dtype=torch.int64, device=theta.device)
        for members, logits in self.logits(theta):
            levels[:, members] = _draw(logits, generator).T
        return levels


class _Group(nn.Module):
    """Blocks padded to the largest of them; maps padded θ (n, width + 1) and base to logits (blocks, n, levels)."""

    index: Tensor
    mask: Tensor

    def __init__(self, members: list[int], blocks: list[Block], starts: list[int], width: int) -> None:
        super().__init__()
        self.members = members
        mask = torch.full((len(blocks), max(block.size for block in blocks)), -torch.inf)
        index = torch.full((len(blocks), max(block.parameters for block in blocks)), width)
        for row, (block, start) in enumerate(zip(blocks, starts, strict=True)):
            mask[row, : block.size] = 0.0
            index[row, : block.parameters] = torch.arange(start, start + block.parameters)
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("index", index, persistent=False)


class _IdentityGroup(_Group):
    """θ are the logits."""

    def forward(self, theta: Tensor, base: Tensor) -> Tensor:
        return theta[:, self.index].transpose(0, 1) + self.mask[:, None, :]


class _PolynomialGroup(_Group):
    """logits = base + basisᵀ θ."""

    basis: Tensor
    base_index: Tensor

    def __init__(self, members: list[int], blocks: list[Block], starts: list[int], width: int, base_start: int) -> None:
        super().__init__(members, blocks, starts, width)
        basis = torch.zeros(len(blocks), self.index.shape[1], self.mask.shape[1])
        base_index = torch.full(self.mask.shape, -1)
        for row, block in enumerate(blocks):
            if block.basis is not None:
                basis[row, : block.parameters, : block.size] = torch.from_numpy(block.basis.T)
            base_index[row, : block.size] = torch.arange(base_start, base_start + block.size)
            base_start += block.size
        self.register_buffer("basis", basis, persistent=False)
        self.register_buffer("base_index", base_index, persistent=False)

    def forward(self, theta: Tensor, base: Tensor) -> Tensor:
        offset = base[..., self.base_index] + self.mask
        offset = offset[:, None, :] if base.ndim == 1 else offset.transpose(0, 1)
        return torch.baddbmm(offset, theta[:, self.index].transpose(0, 1), self.basis)


def _grouped(members: list[int], sizes: Sequence[int]) -> list[list[int]]:
    """Partition blocks, sorted by size, into runs that minimise padded levels plus `GROUP_OVERHEAD` a run."""
    order = sorted(members, key=lambda i: (-sizes[i], i))
    best: list[tuple[float, int]] = [(0.0, 0)]
    for stop in range(1, len(order) + 1):
        costs = [
            (best[start][0] + GROUP_OVERHEAD + (stop - start) * sizes[order[start]], start) for start in range(stop)
        ]
        best.append(min(costs))
    groups, stop = [], len(order)
    while stop > 0:
        start = best[stop][1]
        groups.append(order[start:stop])
        stop = start
    return groups[::-1]


def _draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Inverse-CDF draw over the last axis; padding of probability 0 is never drawn. Overwrites `logits`."""
    largest = logits.amax(dim=-1, keepdim=True)
    if float(largest.abs().max()) > SAFE_EXPONENT:
        logits = logits - largest
    cumulative = logits.exp_().cumsum(dim=-1)
    uniform = torch.rand(cumulative.shape[:-1], generator=generator, device=logits.device)
    # Unnormalised sums need no softmax: the threshold is scaled by the total, and kept below it, which rounding may
    # not, so that the first sum above the threshold always belongs to a level of positive weight.
    total = cumulative[..., -1:]
    threshold = torch.minimum(uniform[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold, right=True)[..., 0]
