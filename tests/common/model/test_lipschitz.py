import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.model.lipschitz import (
    LipschitzMLP,
    certificate,
    group_sort,
    project_spectral,
    project_spectral_,
    spectral_norm_bound,
)

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(1, 12)
BOUNDS = st.sampled_from([1e-6, 0.3, 1.0, 2.7, 1e3])


def rng_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def norm_of(matrix: Tensor) -> float:
    """‖·‖₂ by numpy, in float64."""
    return float(np.linalg.norm(matrix.detach().double().cpu().numpy(), 2))


def nearest(matrix: Tensor, bound: float) -> np.ndarray:
    """P_s by numpy, in float64."""
    left, singular, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return left @ np.diag(np.minimum(singular, bound)) @ right


def in_ball(rows: int, columns: int, bound: float, generator: torch.Generator, rank: int | None = None) -> Tensor:
    """A float64 matrix inside the spectral ball; of full norm and given rank, or anywhere."""
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    if rank is None:
        return matrix * (bound * torch.rand((), generator=generator, dtype=torch.float64) / singular[0])
    keep = (torch.arange(len(singular)) < rank).double()
    return (left * (bound * keep)) @ right


def nasty_matrices() -> dict[str, Tensor]:
    generator = rng_of(0)
    tall = torch.randn(60, 20, generator=generator)
    left, _, right = torch.linalg.svd(torch.randn(48, 48, generator=generator))

    def spectrum(values: Tensor) -> Tensor:
        return left @ torch.diag(values) @ right

    return {
        "tall": tall,
        "wide": tall.T.contiguous(),
        "square": torch.randn(64, 64, generator=generator),
        "barely outside": torch.nn.init.orthogonal_(torch.empty(64, 64), generator=generator) * (1 + 1e-6),
        "orthogonal": torch.nn.init.orthogonal_(torch.empty(64, 32), generator=generator),
        "rank one": torch.ones(40, 30) * 5,
        "rank deficient": torch.randn(50, 2, generator=generator) @ torch.randn(2, 40, generator=generator),
        "zeros": torch.zeros(6, 9),
        "1x1": torch.tensor([[-7.0]]),
        "one row": torch.randn(1, 50, generator=generator),
        "one column": torch.randn(50, 1, generator=generator),
        "entries 1e4": torch.randn(32, 16, generator=generator) * 1e4,
        "entries 1e30": torch.randn(16, 32, generator=generator) * 1e30,
        "entries 1e-8": torch.randn(16, 16, generator=generator) * 1e-8,
        "entries 1e-30": torch.randn(16, 16, generator=generator) * 1e-30,
        "ill-conditioned, far outside": spectrum(torch.logspace(4, -6, 48)),
        "ill-conditioned, just outside": spectrum(torch.logspace(0.3, -8, 48)),
        "clustered at the bound": spectrum(1 + 1e-4 * torch.linspace(-1, 1, 48)),
        "one large": spectrum(torch.cat((torch.tensor([1e6]), torch.full((47,), 0.999)))),
    }


NASTY = nasty_matrices()


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 8), st.sampled_from([1e-20, 1.0, 1e20]))
def test_group_sort_is_a_1_lipschitz_permutation(seed: int, pairs: int, size: float) -> None:
    x, y = torch.randn(2, 5, 2 * pairs, generator=rng_of(seed), dtype=torch.float64) * size
    fx, fy = group_sort(x), group_sort(y)
    assert torch.equal(fx.sort(dim=-1).values, x.sort(dim=-1).values), "a permutation of its input"
    assert ((fx - fy).norm(dim=-1) <= (x - y).norm(dim=-1) * (1 + 1e-12)).all()
    assert (fx[:, :pairs] >= fx[:, pairs:]).all()
    expected = [[max(a, b) for a, b in zip(r[:pairs], r[pairs:], strict=True)] for r in x.tolist()]
    assert fx[:, :pairs].tolist() == expected


def test_group_sort_of_zero_is_zero_and_keeps_gradients_whole() -> None:
    assert torch.equal(group_sort(torch.zeros(3, 4)), torch.zeros(3, 4))
    x = torch.randn(4, 6, generator=rng_of(1), requires_grad=True)
    upstream = torch.randn(4, 6, generator=rng_of(2))
    (gradient,) = torch.autograd.grad(group_sort(x), x, upstream)
    torch.testing.assert_close(gradient.norm(dim=-1), upstream.norm(dim=-1))


@pytest.mark.parametrize("name", NASTY)
def test_spectral_norm_bound_is_above_the_exact_norm_and_near(name: str) -> None:
    exact = norm_of(NASTY[name])
    assert exact <= spectral_norm_bound(NASTY[name]) <= exact * (1 + 2e-6)
    # A lower bound found without any SVD: ‖Wv‖/‖v‖ after power iteration.
    matrix = NASTY[name].double()
    vector = torch.ones(matrix.shape[1], dtype=torch.float64) + 0.1 * torch.arange(matrix.shape[1])
    for _ in range(50):
        vector = matrix.T @ (matrix @ (vector / max(float(vector.norm()), 1e-300)))
    if float(vector.norm()) > 0:
        assert float((matrix @ vector).norm() / vector.norm()) <= spectral_norm_bound(NASTY[name])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_matrix_has_no_finite_bound_and_no_projection(value: float) -> None:
    matrix = torch.ones(4, 4)
    matrix[1, 2] = value
    assert spectral_norm_bound(matrix) == math.inf
    assert certificate([torch.eye(4), matrix]) == math.inf
    with pytest.raises(ValueError, match="not finite"):
        project_spectral(matrix, 1.0)
    with pytest.raises(ValueError, match="not finite"):
        project_spectral_(matrix, 1.0)


@pytest.mark.parametrize("bound", [1e-6, 1e-3, 1.0, 37.0])
@pytest.mark.parametrize("name", NASTY)
def test_projection_of_nasty_matrices_is_certified_after_rounding(name: str, bound: float) -> None:
    matrix = NASTY[name]
    projected = project_spectral(matrix, bound)
    assert projected.dtype == torch.float32 and projected.shape == matrix.shape
    assert spectral_norm_bound(projected) <= bound and norm_of(projected) <= bound
    expected = nearest(matrix, bound)
    np.testing.assert_allclose(
        projected.double().numpy(), expected, rtol=0, atol=1e-5 * float(np.linalg.norm(expected, 2))
    )
    assert torch.equal(project_spectral(projected, bound), projected), "idempotent to the bit"


@pytest.mark.parametrize("bound", [1e-38, 1e-42, 1e-45, 1e-60])
def test_projection_holds_below_float32_normal_range(bound: float) -> None:
    projected = project_spectral(torch.randn(8, 8, generator=rng_of(3)) * 1e-36, bound)
    assert spectral_norm_bound(projected) <= bound


def test_a_matrix_inside_the_ball_is_returned_as_it_is() -> None:
    matrix = torch.randn(9, 5, generator=rng_of(4))
    kept = project_spectral(matrix, norm_of(matrix) * 1.00001)
    assert torch.equal(kept, matrix) and kept.data_ptr() != matrix.data_ptr()


@settings(max_examples=60, deadline=None)
@given(SEEDS, SIZES, SIZES, BOUNDS, st.floats(0.1, 100))
def test_projection_satisfies_the_variational_inequality(
    seed: int, rows: int, columns: int, bound: float, size: float
) -> None:
    # P is the nearest point of a convex set to W if and only if <W - P, X - P> <= 0 for all X in the set.
    generator = rng_of(seed)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * (bound * size)
    projected = project_spectral(matrix, bound)
    away = matrix - projected
    # The slack shrinks P by 1.5e-6 of the bound inside the ball.
    tolerance = 1e-5 * bound * (float(away.abs().sum()) + float(torch.linalg.matrix_norm(away, "nuc")))
    candidates = [in_ball(rows, columns, bound, generator) for _ in range(20)]
    candidates += [in_ball(rows, columns, bound, generator, rank) for rank in (1, 2, 12)]
    left, _, right = torch.linalg.svd(away, full_matrices=False)
    candidates.append(bound * left @ right)  # the maximiser of <W - P, X> over the ball
    for candidate in candidates:
        assert norm_of(candidate) <= bound * (1 + 1e-9)
        assert float((away * (candidate - projected)).sum()) <= tolerance
        assert float((matrix - projected).norm()) <= float((matrix - candidate).norm()) + 1e-5 * bound * rows * columns


@settings(max_examples=60, deadline=None)
@given(SEEDS, SIZES, SIZES, BOUNDS, st.floats(1e-6, 10))
def test_projection_is_non_expansive(seed: int, rows: int, columns: int, bound: float, step: float) -> None:
    generator = rng_of(seed)
    one = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * bound
    two = one + torch.randn(rows, columns, generator=generator, dtype=torch.float64) * (bound * step)
    moved = float((project_spectral(one, bound) - project_spectral(two, bound)).norm())
    # One of the two may be inside and kept as it is, the other gets the certificate's slack.
    assert moved <= float((one - two).norm()) * (1 + 1e-9) + 4e-6 * bound * math.sqrt(min(rows, columns))


@pytest.mark.parametrize("bound", [1e-30, 1e-8, 1e-3, 1.0, 37.0, 1e4])
@pytest.mark.parametrize("name", NASTY)
def test_fast_projection_agrees_with_the_exact_one(name: str, bound: float) -> None:
    fast = NASTY[name].clone()
    project_spectral_(fast, bound)
    assert norm_of(fast) <= bound * (1 + 1e-4)
    singular = np.linalg.svd(NASTY[name].double().numpy(), compute_uv=False)
    noise = 1e-12 * singular[0]
    if bound > noise or singular[-1] > noise:  # else the projection is made of float64's own rounding
        expected = nearest(NASTY[name], bound)
        assert np.linalg.norm(fast.double().numpy() - expected) <= 1e-3 * np.linalg.norm(expected)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(1, 40), st.integers(1, 40), st.floats(-2, 2), st.floats(-6, 6))
def test_fast_projection_of_random_matrices(
    seed: int, rows: int, columns: int, log_size: float, log_bound: float
) -> None:
    bound = 10.0**log_bound
    matrix = torch.randn(rows, columns, generator=rng_of(seed))
    matrix *= bound * 10.0**log_size / norm_of(matrix)
    fast = matrix.clone()
    project_spectral_(fast, bound)
    assert norm_of(fast) <= bound * (1 + 1e-4)
    expected = nearest(matrix, bound)
    assert np.linalg.norm(fast.double().numpy() - expected) <= 1e-3 * np.linalg.norm(expected)
    if norm_of(matrix) <= bound * 0.999:
        assert torch.equal(fast, matrix), "inside the ball nothing is touched"


@given(SEEDS, st.integers(2, 30), st.integers(2, 30), st.floats(0.5, 3.0), st.floats(0.001, 0.1))
@settings(deadline=None)
def test_a_retreating_projection_cuts_inside_the_ball_and_leaves_the_inside_alone(
    seed: int, rows: int, columns: int, bound: float, retreat: float
) -> None:
    generator = rng_of(seed)
    inside = in_ball(rows, columns, 0.999 * bound, generator).float()
    untouched = inside.clone()
    project_spectral_(untouched, bound, retreat)
    assert torch.equal(untouched, inside)

    outside = torch.randn(rows, columns, generator=generator)
    outside *= 1.5 * bound / norm_of(outside)
    cut = outside.clone()
    project_spectral_(cut, bound, retreat)
    expected = nearest(outside, bound * (1 - retreat))
    assert norm_of(cut) <= bound * (1 - retreat) * (1 + 1e-4)
    assert np.abs(cut.numpy() - expected).max() <= 1e-3 * bound


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(1, 6), st.lists(st.floats(0, 1), min_size=1, max_size=6), st.sampled_from([0.5, 1.0, 4.0]))
def test_t1_weighted_means_of_admissible_networks_are_admissible(
    seed: int, depth: int, raw: list[float], bound: float
) -> None:
    total = sum(raw)
    weights = [w / total for w in raw] if total > 0 else [1.0 / len(raw)] * len(raw)
    generator = rng_of(seed)
    widths = [int(w) * 2 for w in torch.randint(1, 6, (depth + 1,), generator=generator)]
    means: list[np.ndarray] = []
    for columns, rows in itertools.pairwise(widths):
        # Extreme points of the ball, of full rank, and points anywhere in it.
        layers = [in_ball(rows, columns, bound, generator, rank=12 if k % 2 else None) for k in range(len(weights))]
        means.append(np.sum([w * layer.numpy() for w, layer in zip(weights, layers, strict=True)], axis=0))
        assert np.linalg.norm(means[-1], 2) <= bound * (1 + 1e-12)
    assert certificate([torch.from_numpy(m) for m in means]) <= bound**depth * (1 + 1e-5)


def test_without_common_layer_bounds_a_mean_can_break_the_certificate() -> None:
    # privacy.md, section 1: why sites share the bound of every layer and not only the product.
    one, two = (torch.eye(2) * 13.0, torch.eye(2) / 13.0), (torch.eye(2) / 13.0, torch.eye(2) * 13.0)
    assert certificate(one) == pytest.approx(1.0, rel=1e-5) == certificate(two)
    mean = [(a + b) / 2 for a, b in zip(one, two, strict=True)]
    assert certificate(mean) > 6.7


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.lists(st.integers(1, 8), min_size=2, max_size=5), st.floats(0.1, 30), st.floats(0.2, 6))
def test_a_fresh_network_is_certified_and_shares_its_bound_evenly(
    seed: int, halves: list[int], lipschitz: float, scale: float
) -> None:
    widths = [2 * half for half in halves]
    output_scale = torch.ones(widths[-1])
    output_scale[0] = scale
    network = LipschitzMLP(widths, lipschitz, output_scale, rng_of(seed))
    assert network.certificate() <= lipschitz * (1 + 1e-5)
    factor = max(1.0, float(output_scale.max()))
    shares = [bound for bound in network.bounds if bound is not None]
    assert len(shares) == len(widths) - 1 and len(set(shares)) == 1
    assert math.prod(shares) * factor == pytest.approx(lipschitz)
    for layer, bound in zip(network.linears, shares, strict=True):
        assert norm_of(layer.weight) <= bound
        assert not layer.bias.any()


def trained_looking(seed: int, widths: list[int], lipschitz: float | None, scale: float = 1.0) -> LipschitzMLP:
    """A network after a few rough optimiser steps, biases included, projected as training does."""
    output_scale = torch.ones(widths[-1])
    output_scale[widths[-1] // 2 :] = scale
    network = LipschitzMLP(widths, lipschitz, output_scale, rng_of(seed))
    generator = rng_of(seed + 1)
    optimiser = torch.optim.Adam(network.parameters(), lr=0.05)
    x = torch.randn(64, widths[0], generator=generator)
    y = 10 * torch.randn(64, widths[-1], generator=generator)
    for _ in range(15):
        optimiser.zero_grad()
        (network(x) - y).square().mean().backward()
        optimiser.step()
        network.project()
    network.project(exact=True)
    return network


def steepest_pair(network: LipschitzMLP, starts: int = 64, steps: int = 80) -> float:
    """Largest ‖g(x) - g(y)‖/‖x - y‖ that gradient ascent over pairs finds; in float64."""
    network = network.double()
    dimension = network.linears[0].in_features
    generator = rng_of(9)
    base = (2 * torch.randn(starts, dimension, generator=generator, dtype=torch.float64)).requires_grad_()
    shift = torch.randn(starts, dimension, generator=generator, dtype=torch.float64).requires_grad_()
    optimiser = torch.optim.Adam([base, shift], lr=0.1)
    best = 0.0
    for _ in range(steps):
        optimiser.zero_grad()
        # A fixed distance keeps the quotient far from rounding.
        direction = 0.1 * shift / shift.norm(dim=-1, keepdim=True)
        quotient = (network(base + direction) - network(base)).norm(dim=-1) / direction.norm(dim=-1)
        best = max(best, float(quotient.detach().max()))
        (-quotient.sum()).backward()
        optimiser.step()
    return best


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("lipschitz", "scale"), [(1.0, 1.0), (8.0, 1.0), (20.0, 5.0)])
def test_no_pair_of_inputs_violates_the_certificate(seed: int, lipschitz: float, scale: float) -> None:
    network = trained_looking(seed, [6, 16, 16, 10], lipschitz, scale)
    value = network.certificate()
    assert value <= lipschitz * (1 + 1e-5)
    found = steepest_pair(network)
    assert found <= value
    assert found >= 0.3 * value, "the search is worth its name"


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_a_linear_network_reaches_its_certificate(scale: float) -> None:
    network = trained_looking(0, [5, 8], 3.0 * scale)
    network.output_scale.fill_(scale)
    assert steepest_pair(network, steps=300) == pytest.approx(network.certificate(), rel=1e-3)


def test_the_certificate_counts_the_output_scale_and_a_scale_below_one_does_not_lower_it() -> None:
    weights = [torch.eye(2) * 2, torch.eye(2) * 3]
    assert certificate(weights, 5.0) == pytest.approx(30.0, rel=1e-5)
    assert certificate(weights, 0.1) == certificate(weights) == pytest.approx(6.0, rel=1e-5)


@pytest.mark.parametrize("exact", [True, False])
def test_projection_after_a_step_restores_every_layer(exact: bool) -> None:
    network = LipschitzMLP([4, 8, 8, 6], 2.0, generator=rng_of(5))
    with torch.no_grad():
        for layer in network.linears:
            layer.weight += 0.5 * torch.randn(layer.weight.shape, generator=rng_of(6))
    assert network.certificate() > 2.0
    network.project(exact=exact)
    assert network.certificate() <= 2.0 * (1 + (1e-5 if exact else 3e-4))


def test_an_unconstrained_network_has_no_bounds_and_tells_what_it_is() -> None:
    network = LipschitzMLP([4, 8, 6], None, generator=rng_of(7))
    assert network.bounds == [None, None]
    before = network.certificate()
    with torch.no_grad():
        for layer in network.linears:
            layer.weight *= 10
    network.project()
    network.project(exact=True)
    assert network.certificate() == pytest.approx(100 * before)


def test_odd_hidden_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="hidden widths must be even"):
        LipschitzMLP([4, 7, 6], 1.0)


def test_the_network_is_what_its_formula_says() -> None:
    network = trained_looking(3, [3, 4, 6, 5], None, scale=2.0)
    x = torch.randn(10, 3, generator=rng_of(8))
    h = x.numpy()
    for position, layer in enumerate(network.linears):
        h = h @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        if position < 2:
            half = h.shape[1] // 2
            h = np.hstack([np.maximum(h[:, :half], h[:, half:]), np.minimum(h[:, :half], h[:, half:])])
    np.testing.assert_allclose(network(x).detach().numpy(), h * [1, 1, 2, 2, 2], rtol=1e-4, atol=1e-4)
