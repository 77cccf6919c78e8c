"""Gradients of single rows, clipped and summed."""

import math

import pytest
import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from client.trainers.clipping import RowGradients, row_gradients
from common.encoding import TableEncoding
from common.model.training import named_parameters
from common.model.vae import Decoder, Encoder, negative_elbo
from common.table import Table
from tests.client.noised import (
    SCHEMA,
    flat,
    make_study,
    make_table,
)


@pytest.fixture(scope="module")
def networks() -> tuple[Encoder, Decoder, TableEncoding]:
    encoding, study = TableEncoding(SCHEMA), make_study()
    generator = torch.Generator().manual_seed(3)
    encoder, decoder = Encoder(encoding, study.model, generator), Decoder(encoding, study.model, generator)
    with torch.no_grad():
        for parameter in named_parameters(encoder, decoder).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return encoder, decoder, encoding


Networks = tuple[Encoder, Decoder, TableEncoding]


def slow_gradients(networks: Networks, table: Table) -> list[dict[str, Tensor]]:
    """One backward pass a row, with PyTorch's ordinary gradients."""
    encoder, decoder, encoding = networks
    data, parameters, found = encoding.encode(table), named_parameters(encoder, decoder), []
    for row in range(len(data)):
        losses = negative_elbo(
            encoder, decoder, data.inputs, data.levels, 0.5, generator=torch.Generator().manual_seed(1)
        )
        gradients = torch.autograd.grad(losses[row], list(parameters.values()))
        found.append(dict(zip(parameters, gradients, strict=True)))
    return found


def fast_gradients(networks: Networks, table: Table) -> RowGradients:
    encoder, decoder, encoding = networks
    data = encoding.encode(table)
    return row_gradients(encoder, decoder, data.inputs, data.levels, 0.5, torch.Generator().manual_seed(1))


def test_gradients_of_rows_equal_a_slow_loop(networks: Networks) -> None:
    table = make_table(9)
    slow, fast = slow_gradients(networks, table), fast_gradients(networks, table)
    assert torch.allclose(fast.norms(), torch.stack([flat(g).norm() for g in slow]), rtol=1e-5)
    for row, wanted in enumerate(slow):
        affine = {name: (a[[row]], b[[row]]) for name, (a, b) in fast.affine.items()}
        single = RowGradients(affine, {name: rows[[row]] for name, rows in fast.vectors.items()}).clipped_sum(1e9)
        assert single.keys() == wanted.keys()
        assert all(torch.allclose(single[name], wanted[name], rtol=1e-4, atol=1e-5) for name in wanted)


@pytest.mark.parametrize("quantile", [0.0, 0.5, 1.0])
def test_the_clipped_sum_equals_that_of_opacus(networks: Networks, quantile: float) -> None:
    table = make_table(40)
    slow, fast = slow_gradients(networks, table), fast_gradients(networks, table)
    clip = float(fast.norms().quantile(quantile)) * 1.01
    parameters = named_parameters(networks[0], networks[1])
    copies = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}
    opacus = DPOptimizer(
        torch.optim.SGD(copies.values()), noise_multiplier=0.0, max_grad_norm=clip, expected_batch_size=1
    )
    for name, parameter in copies.items():
        parameter.grad_sample = torch.stack([row[name] for row in slow])  # pyright: ignore[reportAttributeAccessIssue]
    opacus.clip_and_accumulate()
    wanted = {name: parameter.summed_grad for name, parameter in copies.items()}  # pyright: ignore[reportAttributeAccessIssue]
    error = (flat(fast.clipped_sum(clip)) - flat(wanted)).norm()
    assert float(error) < 1e-4 * clip


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e6, 1e14, 1e17, 1e37, math.inf, math.nan])
@pytest.mark.parametrize("clip", [1e-4, 1.0, 50.0])
def test_no_row_moves_the_sum_by_more_than_the_clip(scale: float, clip: float) -> None:
    generator = torch.Generator().manual_seed(0)

    def rows(width: int, factor: float) -> Tensor:
        calm = torch.randn(6, width, generator=generator)
        calm[2] *= factor
        return calm

    inverse = 1.0 / scale if scale else 1.0
    for inputs, outputs, base in ((scale, 1, 1), (1, scale, 1), (1, 1, scale), (scale, inverse, 1)):
        gradients = RowGradients({"layer": (rows(5, inputs), rows(4, outputs))}, {"base": rows(3, base)})
        whole = gradients.clipped_sum(clip)
        assert all(torch.isfinite(array).all() for array in whole.values())
        others = torch.zeros_like(flat(whole))
        for row in range(6):
            single = flat(
                RowGradients(
                    {name: (a[[row]], b[[row]]) for name, (a, b) in gradients.affine.items()},
                    {name: values[[row]] for name, values in gradients.vectors.items()},
                ).clipped_sum(clip)
            )
            assert float(single.norm()) <= clip
            others += single
        assert torch.allclose(flat(whole), others, rtol=1e-4, atol=1e-6 * clip)


def test_a_parameter_whose_gradients_would_be_missed_is_refused(networks: Networks) -> None:
    encoder, decoder, encoding = networks
    data = encoding.encode(make_table(3))

    class Extra(Encoder):
        def __init__(self) -> None:
            super().__init__(encoding, make_study().model)
            self.scale = nn.Parameter(torch.ones(1))

    with pytest.raises(TypeError, match=r"single patients for encoder\.scale"):
        row_gradients(Extra(), decoder, data.inputs, data.levels, 1.0)

    class Twice(Encoder):
        def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
            super().forward(inputs)
            return super().forward(inputs)

    with pytest.raises(TypeError, match="map every row once"):
        row_gradients(Twice(encoding, make_study().model), decoder, data.inputs, data.levels, 1.0)
    assert not encoder.network.linears[0]._forward_hooks and not decoder.network.linears[0]._forward_hooks
