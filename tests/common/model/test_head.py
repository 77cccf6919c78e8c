import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp
from scipy.stats import chi2
from torch import Tensor

from common.encoding import TableEncoding
from common.encoding.base import UNOBSERVED, Block
from common.encoding.number import polynomial_basis
from common.model.head import ObservationHead
from common.schema import parse_schema


def number_field(name: str, required: bool = False) -> dict[str, object]:
    return {"name": name, "type": "number", "constraints": {"minimum": 0, "maximum": 9, "required": required}}


def enum_field(name: str, size: int) -> dict[str, object]:
    return {"name": name, "type": "string", "constraints": {"enum": [f"c{i}" for i in range(size)]}}


FIELDS = {
    "mixed": [number_field("a"), enum_field("b", 3), enum_field("c", 40), number_field("d", True), enum_field("e", 2)],
    "numbers only": [number_field("a", True), number_field("b", True)],
    "nullable number": [number_field("a")],
    "one number": [number_field("a", True)],
    "categories only": [enum_field("a", 2), enum_field("b", 100)],
    "one category": [enum_field("a", 5)],
}
SCHEMAS = {name: TableEncoding(parse_schema({"fields": fields})).blocks for name, fields in FIELDS.items()}


def make_head(blocks: tuple[Block, ...], scale: float = 3.0, seed: int = 0) -> ObservationHead:
    head = ObservationHead(blocks, scale)
    with torch.no_grad():
        head.base.copy_(torch.randn(head.base.shape, generator=torch.Generator().manual_seed(seed)))
    return head


def block_logits(head: ObservationHead, blocks: tuple[Block, ...], theta: Tensor) -> list[np.ndarray]:
    """Unpadded logits (n, size) of every block in float64, from the formula and the documented order of the base."""
    values = theta.detach().double().numpy()
    starts = np.cumsum([0, *(block.parameters for block in blocks)])
    base = head.base.detach().double().numpy() * head.scale
    found: dict[int, np.ndarray] = {}
    # `base` runs over the polynomial blocks in the order of the groups.
    start = 0
    for members, _ in head.logits(theta):
        for i in members:
            block = blocks[i]
            own = values[:, starts[i] : starts[i] + block.parameters]
            if block.basis is None:
                found[i] = own
            else:
                found[i] = base[start : start + block.size] + own @ block.basis.T
                start += block.size
    assert start == len(base) and set(found) == set(range(len(blocks)))
    return [found[i] for i in range(len(blocks))]


def random_levels(blocks: tuple[Block, ...], rows: int, rng: np.random.Generator, silent: float = 0.3) -> np.ndarray:
    levels = np.column_stack([rng.integers(0, block.size, rows) for block in blocks])
    return np.where(rng.random(levels.shape) < silent, UNOBSERVED, levels)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 1.0, 30.0, 1e3]))
@pytest.mark.parametrize("name", SCHEMAS)
def test_negative_log_likelihood_against_a_slow_loop(name: str, seed: int, size: float) -> None:
    blocks = SCHEMAS[name]
    head = make_head(blocks, seed=seed)
    rng = np.random.default_rng(seed)
    theta = torch.from_numpy(rng.normal(size=(6, head.width)) * size).float()
    levels = random_levels(blocks, 6, rng)
    expected = np.zeros(6)
    for i, logits in enumerate(block_logits(head, blocks, theta)):
        for row in range(6):
            if levels[row, i] != UNOBSERVED:
                expected[row] -= logits[row, levels[row, i]] - logsumexp(logits[row])
    found = head.negative_log_likelihood(theta, torch.from_numpy(levels))
    assert found.shape == (6,) and (found >= -1e-5).all()
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=2e-5, atol=2e-5 * max(1.0, size))


@pytest.mark.parametrize("name", SCHEMAS)
def test_unobserved_blocks_contribute_nothing(name: str) -> None:
    blocks = SCHEMAS[name]
    head = make_head(blocks)
    theta = torch.randn(4, head.width, generator=torch.Generator().manual_seed(1), requires_grad=True)
    silent = torch.full((4, len(blocks)), UNOBSERVED)
    loss = head.negative_log_likelihood(theta, silent)
    assert not loss.any()
    # Only the first block speaks: only its own θ get a gradient.
    heard = silent.clone()
    heard[:, 0] = 0
    (gradient,) = torch.autograd.grad(head.negative_log_likelihood(theta, heard).sum(), theta)
    own = blocks[0].parameters
    assert gradient[:, :own].any() and not gradient[:, own:].any()


@pytest.mark.parametrize("name", SCHEMAS)
def test_gradient_is_that_of_the_softmax_and_padding_gets_none(name: str) -> None:
    blocks = SCHEMAS[name]
    head = make_head(blocks)
    rng = np.random.default_rng(2)
    theta = torch.from_numpy(rng.normal(size=(5, head.width))).float().requires_grad_()
    levels = random_levels(blocks, 5, rng, silent=0.0)
    head.negative_log_likelihood(theta, torch.from_numpy(levels)).sum().backward()
    assert theta.grad is not None and torch.isfinite(theta.grad).all()
    # d(-log p)/d logits = softmax - one-hot, carried back through the basis: no trace of the padded levels.
    expected = []
    for i, logits in enumerate(block_logits(head, blocks, theta)):
        own = np.exp(log_softmax(logits, axis=1)) - np.eye(blocks[i].size)[levels[:, i]]
        basis = blocks[i].basis
        expected.append(own if basis is None else own @ basis)
    np.testing.assert_allclose(theta.grad.numpy(), np.hstack(expected), atol=1e-5)
    if head.base.numel():
        assert head.base.grad is not None and torch.isfinite(head.base.grad).all()
        # Probabilities of a block sum to one whatever happens, so the gradient over all levels sums to zero.
        assert abs(float(head.base.grad.sum())) < 1e-3


@pytest.mark.parametrize("name", SCHEMAS)
def test_levels_drawn_exist_and_padding_is_never_drawn(name: str) -> None:
    blocks = SCHEMAS[name]
    head = make_head(blocks)
    sizes = torch.tensor([block.size for block in blocks])
    for size in (0.0, 1.0, 50.0, 1e3):
        theta = size * torch.randn(3000, head.width, generator=torch.Generator().manual_seed(3))
        levels = head.sample(theta, torch.Generator().manual_seed(4))
        assert levels.shape == (3000, len(blocks)) and levels.dtype == torch.int64
        assert (levels >= 0).all() and (levels < sizes).all()


@pytest.mark.parametrize("name", SCHEMAS)
def test_frequencies_agree_with_the_probabilities(name: str) -> None:
    blocks = SCHEMAS[name]
    head = make_head(blocks, scale=1.0)
    rows = 20_000
    one = torch.randn(1, head.width, generator=torch.Generator().manual_seed(5))
    levels = head.sample(one.expand(rows, -1), torch.Generator().manual_seed(6)).numpy()
    for i, logits in enumerate(block_logits(head, blocks, one)):
        expected = rows * np.exp(log_softmax(logits[0]))
        counts = np.bincount(levels[:, i], minlength=blocks[i].size)
        frequent = expected >= 5
        observed = np.append(counts[frequent], counts[~frequent].sum())
        wanted = np.append(expected[frequent], expected[~frequent].sum())
        if wanted[-1] < 5:  # a rest too rare for chi-square joins the last frequent level
            observed, wanted = np.append(observed[:-2], observed[-2:].sum()), np.append(wanted[:-2], wanted[-2:].sum())
        statistic = float(((observed - wanted) ** 2 / wanted).sum())
        assert statistic <= chi2.isf(1e-6, max(1, len(wanted) - 1))


def test_blocks_are_drawn_independently_given_theta() -> None:
    head = make_head((Block(2), Block(2), Block(3)))
    levels = head.sample(torch.zeros(20_000, 7), torch.Generator().manual_seed(7)).double()
    correlation = torch.corrcoef(levels.T) - torch.eye(3)
    assert float(correlation.abs().max()) < 6 / math.sqrt(20_000)


@pytest.mark.parametrize("shift", [-1e3, 0.0, 1e3])
def test_extreme_logits(shift: float) -> None:
    head = ObservationHead((Block(3), Block(5), Block(8, polynomial_basis(np.linspace(-1, 1, 8)))), 5.0)
    theta = torch.full((2000, head.width), shift)
    theta[:, 1] = shift + 1e3
    theta[:, 3:8] = torch.tensor([shift, shift, shift + 2.0, shift, shift - 1e3])
    levels = head.sample(theta, torch.Generator().manual_seed(8))
    assert (levels[:, 0] == 1).all() and (levels[:, 1] != 4).all()
    share = math.exp(2) / (math.exp(2) + 3)
    assert float((levels[:, 1] == 2).double().mean()) == pytest.approx(share, abs=6 * math.sqrt(0.25 / 2000))
    if shift:  # P_1 … P_4 are all 1 at the right end, and sum to 0 at the left
        last = {1e3: 7}.get(shift)
        weights = head.logits(theta)[-1][1][0, 0].detach().double().numpy()
        assert (levels[:, 2] == (last if last is not None else int(np.argmax(weights)))).all()
    wrong = torch.tensor([[0, 4, 0]]).expand(2000, -1)
    loss = head.negative_log_likelihood(theta, wrong)
    assert torch.isfinite(loss).all() and (loss >= 1.9e3).all()


def test_the_same_seed_draws_the_same_levels() -> None:
    head = make_head(SCHEMAS["mixed"])
    theta = torch.randn(50, head.width, generator=torch.Generator().manual_seed(9))
    one, two, other = (head.sample(theta, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_base_is_scaled_like_every_output() -> None:
    blocks = SCHEMAS["one number"]
    head = make_head(blocks, scale=4.0)
    zero = torch.zeros(1, head.width)
    expected = log_softmax(4.0 * head.base.detach().double().numpy())
    found = [head.negative_log_likelihood(zero, torch.tensor([[j]])).item() for j in range(blocks[0].size)]
    np.testing.assert_allclose(found, -expected, rtol=1e-5)
