"""Gradients of every patient's loss, clipped one by one and summed, without ever being written out.

The gradient of a row's loss with respect to an affine layer's weight is the outer product b aᵀ of the row's gradient b
at the layer's output and its input a; so its norm is ‖b‖ ‖a‖, and the clipped sum over rows is one matrix product
(Goodfellow 2015; Bu, Wang, Zha, Karypis 2023, "book-keeping"). One forward and one backward pass give all a and b. This
is what Opacus's `DPOptimizer` computes from materialised gradients of every row, at a fraction of time and memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.model.training import named_parameters
from common.model.vae import Decoder, Encoder, negative_elbo

# Larger than the float32 rounding of scaling a row, so that no clipped row exceeds the norm that the noise covers.
ROUNDING = 1e-6
# Beyond these (input of a layer; norm of a gradient over the clipping norm) a scaled row could fall below float32's
# normal range, where rounding is coarse. No encoded patient comes near; a row that does contributes nothing.
LARGEST_INPUT, LARGEST_EXCESS = 1e15, 1e30


@dataclass(frozen=True)
class RowGradients:
    """Gradients of n losses with respect to all trained parameters, in factors.

    `affine` maps the name of a layer to inputs a (n, in) and output gradients b (n, out): row i's gradient is b_i a_iᵀ
    for the weight and b_i for the bias. `vectors` maps the name of a parameter vector to its gradients (n, size).
    """

    affine: Mapping[str, tuple[Tensor, Tensor]]
    vectors: Mapping[str, Tensor]

    def norms(self) -> Tensor:
        """Euclidean norm of every row's gradient over all parameters, float64 (n,)."""
        squares = [_square(gradients) * (_square(inputs) + 1.0) for inputs, gradients in self.affine.values()]
        squares += [_square(gradients) for gradients in self.vectors.values()]
        return torch.stack(squares).sum(dim=0).sqrt()

    def clipped_sum(self, clip: float) -> dict[str, Tensor]:
        """Σ_i g_i min(1, clip / ‖g_i‖) by name of parameter; a row whose gradient is not finite contributes nothing."""
        norms = self.norms()
        usable = norms <= LARGEST_EXCESS * clip  # false for NaN
        for inputs, _ in self.affine.values():
            usable &= _square(inputs) <= LARGEST_INPUT**2
        if not bool(usable.all()):
            affine = {name: (inputs[usable], gradients[usable]) for name, (inputs, gradients) in self.affine.items()}
            return RowGradients(affine, {name: rows[usable] for name, rows in self.vectors.items()}).clipped_sum(clip)
        factors = (clip * (1.0 - ROUNDING) / norms).clamp(max=1.0).to(torch.float32)
        total: dict[str, Tensor] = {}
        for name, (inputs, gradients) in self.affine.items():
            scaled = gradients * factors[:, None]
            total[f"{name}.weight"] = scaled.mT @ inputs
            total[f"{name}.bias"] = scaled.sum(dim=0)
        for name, gradients in self.vectors.items():
            total[name] = factors @ gradients
        return total


def row_gradients(
    encoder: Encoder,
    decoder: Decoder,
    inputs: Tensor,
    levels: Tensor,
    kl_weight: float,
    generator: torch.Generator | None = None,
) -> RowGradients:
    """Gradients of every row's -ELBO (nats); `inputs` (n, input width) and `levels` (n, blocks), n at least 1.

    `TypeError` if a trained parameter is neither in an affine layer that is used once nor the observation head's base:
    its gradients would be missed, and with them the guarantee.
    """
    networks: tuple[tuple[str, nn.Module], ...] = (("encoder", encoder), ("decoder", decoder))
    layers = {
        f"{prefix}.{name}": layer
        for prefix, network in networks
        for name, layer in network.named_modules()
        if type(layer) is nn.Linear and layer.bias is not None
    }
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    # A copy of the base for every row makes its gradient a gradient of every row.
    base = decoder.head.base.detach().expand(len(inputs), -1).requires_grad_()
    handles = [layer.register_forward_hook(_recorder(name, seen)) for name, layer in layers.items()]
    try:
        losses = negative_elbo(encoder, decoder, inputs, levels, kl_weight, generator, base)
    finally:
        for handle in handles:
            handle.remove()
    covered = {f"{name}.{part}" for name in seen for part in ("weight", "bias")} | {"decoder.head.base"}
    missing = sorted(set(named_parameters(encoder, decoder)) ^ covered)
    if missing:
        raise TypeError(f"dpsgd cannot clip the gradients of single patients for {', '.join(missing)}")
    outputs = [output for _, output in seen.values()]
    *gradients, base_gradient = torch.autograd.grad(losses.sum(), [*outputs, base], materialize_grads=True)
    affine = {name: (seen[name][0], gradient) for name, gradient in zip(seen, gradients, strict=True)}
    return RowGradients(affine, {"decoder.head.base": base_gradient})


def _recorder(name: str, seen: dict[str, tuple[Tensor, Tensor]]) -> Any:
    def record(_layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        if name in seen or output.ndim != 2:
            raise TypeError(f"dpsgd needs {name} to map every row once")
        seen[name] = (arguments[0].detach(), output)

    return record


def _square(rows: Tensor) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square()
