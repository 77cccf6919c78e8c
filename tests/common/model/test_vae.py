import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from common.encoding import TableEncoding
from common.errors import CertificateError
from common.model.vae import LOG_VARIANCE_RANGE, Decoder, Encoder, negative_elbo
from common.schema import parse_schema
from common.study import ModelSection
from common.table import Table

SCHEMA = parse_schema(
    {
        "fields": [
            {"name": "age", "type": "number", "constraints": {"minimum": 0, "maximum": 100}},
            {"name": "ward", "type": "string", "constraints": {"enum": ["a", "b", "c"], "required": True}},
            {"name": "died", "type": "boolean"},
        ]
    }
)
ENCODING = TableEncoding(SCHEMA)
ROWS = ENCODING.encode(
    Table(SCHEMA, np.array([[40.0, 0, 1], [np.nan, 1, 0], [90.0, 2, np.nan], [3.0, 0, 0], [55.5, 1, 1]]))
)


def model_of(latent_dim: int = 3, **changes: object) -> ModelSection:
    return ModelSection.model_validate({"latent_dim": latent_dim, "hidden": (8, 6), **changes})


def networks(model: ModelSection, seed: int = 0, *, rough: bool = True) -> tuple[Encoder, Decoder]:
    """Encoder and decoder; `rough` moves every parameter away from its start, base and biases included."""
    generator = torch.Generator().manual_seed(seed)
    encoder, decoder = Encoder(ENCODING, model, generator), Decoder(ENCODING, model, generator)
    if rough:
        with torch.no_grad():
            for parameter in [*encoder.parameters(), *decoder.parameters()]:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        encoder.network.project(exact=True)
        decoder.network.project(exact=True)
    return encoder, decoder


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.floats(0.0, 5.0))
def test_kl_term_against_torch_distributions(seed: int, latent_dim: int, kl_weight: float) -> None:
    encoder, decoder = networks(model_of(latent_dim), seed)

    def loss(weight: float) -> torch.Tensor:
        noise = torch.Generator().manual_seed(7)
        return negative_elbo(encoder, decoder, ROWS.inputs, ROWS.levels, weight, noise)

    mean, log_variance = encoder(ROWS.inputs)
    posterior = torch.distributions.Normal(mean, log_variance.exp().sqrt())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(dim=-1)
    torch.testing.assert_close(loss(kl_weight) - loss(0.0), kl_weight * expected, rtol=1e-4, atol=1e-3)


def test_the_reconstruction_is_that_of_the_reparametrised_latent() -> None:
    encoder, decoder = networks(model_of())
    found = negative_elbo(encoder, decoder, ROWS.inputs, ROWS.levels, 0.0, torch.Generator().manual_seed(5))
    mean, log_variance = encoder(ROWS.inputs)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    latent = mean + noise * log_variance.exp().sqrt()
    torch.testing.assert_close(found, decoder.head.negative_log_likelihood(decoder(latent), ROWS.levels))


@pytest.mark.parametrize("seed", range(4))
def test_elbo_is_below_the_integrated_log_likelihood(seed: int) -> None:
    encoder, decoder = networks(model_of(1), seed)
    grid = np.linspace(-12, 12, 8001)
    step = grid[1] - grid[0]
    theta = decoder(torch.from_numpy(grid[:, None]).float())
    mean, log_variance = encoder(ROWS.inputs)
    for row in range(len(ROWS)):
        levels = ROWS.levels[row : row + 1]
        log_p = -decoder.head.negative_log_likelihood(theta, levels.expand(len(grid), -1)).detach().double().numpy()
        log_prior = norm.logpdf(grid)
        evidence = float(np.logaddexp.reduce(log_p + log_prior)) + math.log(step)
        log_q = norm.logpdf(grid, mean[row].item(), math.exp(0.5 * log_variance[row].item()))
        # ELBO = E_q[log p(x|z) + log p(z) - log q(z)], by quadrature.
        elbo = float((np.exp(log_q) * (log_p + log_prior - log_q)).sum() * step)
        assert elbo <= evidence + 1e-6
        draws = 20_000
        samples = negative_elbo(
            encoder,
            decoder,
            ROWS.inputs[row : row + 1].expand(draws, -1),
            levels.expand(draws, -1),
            1.0,
            torch.Generator().manual_seed(seed),
        ).detach()
        error = float(samples.std()) / math.sqrt(draws)
        assert -float(samples.mean()) == pytest.approx(elbo, abs=6 * error + 1e-3)
        assert -float(samples.mean()) <= evidence + 6 * error + 1e-3


def test_log_variance_is_clamped_and_the_loss_stays_finite() -> None:
    encoder, decoder = networks(model_of())
    with torch.no_grad():
        encoder.network.linears[-1].bias[3:] = 1e4
        encoder.network.linears[-1].bias[3] = -1e4
    _, log_variance = encoder(ROWS.inputs)
    assert (log_variance[:, 0] == LOG_VARIANCE_RANGE[0]).all() and (log_variance[:, 1:] == LOG_VARIANCE_RANGE[1]).all()
    loss = negative_elbo(encoder, decoder, ROWS.inputs, ROWS.levels, 1.0, torch.Generator().manual_seed(0))
    assert torch.isfinite(loss).all()


def test_a_step_of_training_lowers_the_loss_and_moves_every_parameter() -> None:
    encoder, decoder = networks(model_of(), rough=False)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=1e-2)
    before = [p.detach().clone() for p in parameters]
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = negative_elbo(encoder, decoder, ROWS.inputs, ROWS.levels, 1.0, torch.Generator().manual_seed(0)).mean()
        loss.backward()
        optimiser.step()
        encoder.network.project()
        decoder.network.project()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(not torch.equal(a, b.detach()) for a, b in zip(before, parameters, strict=True))


def test_arrays_round_trip_and_are_copies() -> None:
    _, decoder = networks(model_of(), 1)
    _, other = networks(model_of(), 2)
    arrays = decoder.arrays()
    assert set(arrays) == {name for name, _ in decoder.named_parameters()}
    assert all(a.dtype == torch.float32 and a.device.type == "cpu" and not a.requires_grad for a in arrays.values())
    latent = torch.randn(5, 3, generator=torch.Generator().manual_seed(3))
    assert not torch.equal(decoder(latent), other(latent))
    other.load_arrays(arrays)
    assert torch.equal(decoder(latent), other(latent)) and torch.equal(decoder.head.base, other.head.base)
    assert all(torch.equal(a, b) for a, b in zip(arrays.values(), other.arrays().values(), strict=True))
    for array in arrays.values():
        array += 1
    assert torch.equal(decoder(latent), other(latent)), "the network does not share memory with a message"


@pytest.mark.parametrize(("bound", "scale"), [(5.0, 5.0), (20.0, 5.0), (1.0, 1.0)])
def test_certificates_of_fresh_networks(bound: float, scale: float) -> None:
    encoder, decoder = networks(model_of(decoder_lipschitz=bound, logit_scale=scale, encoder_lipschitz=2.0))
    assert decoder.require_certificate(bound * (1 + 1e-5)) == decoder.certificate()
    assert encoder.network.certificate() <= 2.0 * (1 + 1e-5)
    # An independent product, τ included.
    weights = [layer.weight.detach().double().numpy() for layer in decoder.network.linears]
    product = scale * math.prod(np.linalg.norm(w, 2) for w in weights)
    assert product <= decoder.certificate() <= product * (1 + 1e-5)


@pytest.mark.parametrize("bound", [5.0, 7.3, 20.0, 123.456])
def test_a_projected_decoder_passes_its_own_declared_bound(bound: float) -> None:
    for seed in range(5):
        for hidden in ((8,), (8, 6), (8, 8, 8, 8, 8, 8)):
            _, decoder = networks(model_of(decoder_lipschitz=bound, hidden=hidden), seed)
            assert decoder.require_certificate(bound) <= bound


@pytest.mark.parametrize("value", [1.5, math.nan, math.inf])
def test_a_tampered_decoder_is_refused(value: float) -> None:
    model = model_of()
    _, decoder = networks(model)
    bound = decoder.certificate()
    arrays = decoder.arrays()
    name = next(name for name, array in arrays.items() if array.dim() == 2)
    arrays[name] = arrays[name] * value
    decoder.load_arrays(arrays)
    with pytest.raises(CertificateError, match="Lipschitz certificate"):
        decoder.require_certificate(bound)


def test_the_unconstrained_reference_has_no_bound() -> None:
    decoder = Decoder(ENCODING, model_of(), constrained=False)
    encoder = Encoder(ENCODING, model_of(), constrained=False)
    assert set(decoder.network.bounds) == set(encoder.network.bounds) == {None}


def test_the_same_seed_builds_the_same_network() -> None:
    one, two, other = (networks(model_of(), seed, rough=False) for seed in (1, 1, 2))
    for a, b, c in zip(one, two, other, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
        assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_the_same_code_runs_on_cuda() -> None:
    device = torch.device("cuda")
    encoder, decoder = networks(model_of())
    expected = [negative_elbo(encoder, decoder, ROWS.inputs, ROWS.levels, w).isfinite().all() for w in (0.0, 1.0)]
    theta = decoder(torch.zeros(1, 3)).detach()
    encoder, decoder = encoder.to(device), decoder.to(device)
    rows = ROWS.to(device)
    generator = torch.Generator(device).manual_seed(0)
    loss = negative_elbo(encoder, decoder, rows.inputs, rows.levels, 1.0, generator)
    loss.mean().backward()
    assert torch.isfinite(loss).all() and all(expected)
    with torch.no_grad():
        for layer in decoder.network.linears:
            layer.weight *= 3
    decoder.network.project()
    decoder.network.project(exact=True)
    assert decoder.certificate() <= 20.0
    _, again = networks(model_of())
    again = again.to(device)
    torch.testing.assert_close(again(torch.zeros(1, 3, device=device)).cpu(), theta, rtol=1e-4, atol=1e-4)
    levels = again.head.sample(again(torch.randn(10, 3, device=device)), generator)
    assert levels.device.type == "cuda" and levels.shape == (10, len(ENCODING.blocks))
    assert all(array.device.type == "cpu" for array in again.arrays().values())
