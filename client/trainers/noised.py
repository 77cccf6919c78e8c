"""Opacus's optimiser with noise that privacy may rest on."""

from __future__ import annotations

import torch
from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping

from common.privacy.noise import RandomNumbers


class NoisedOptimiser(DPOptimizerFastGradientClipping):
    """Adds N(0, (noise_multiplier · max_grad_norm)² I) to the clipped sum in `grad`, divides, and steps.

    Opacus draws its noise from a `torch.Generator`, a Mersenne Twister whose state follows from its outputs; its
    `secure_mode` wants torchcsprng, which no longer exists. Here every number comes from `random`: the operating
    system's CSPRNG in production. Division is by the *expected* batch size, whatever the realised one was.
    """

    def __init__(
        self,
        optimiser: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        gradient_clip: float,
        expected_batch: float,
        random: RandomNumbers,
    ) -> None:
        # Opacus annotates the divisor as an integer and only ever divides by it.
        super().__init__(
            optimiser,
            noise_multiplier=noise_multiplier,
            max_grad_norm=gradient_clip,
            expected_batch_size=expected_batch,  # pyright: ignore[reportArgumentType]
        )
        self._random = random

    def add_noise(self) -> None:
        """`summed_grad` plus noise becomes `grad`; one draw for all parameters, used once."""
        parameters = self.params
        stddev = self.noise_multiplier * self.max_grad_norm
        sizes = [parameter.numel() for parameter in parameters]
        noise = torch.from_numpy(stddev * self._random.normal(sum(sizes))).to(torch.float32)
        noise = noise.to(parameters[0].device)
        for parameter, part in zip(parameters, noise.split(sizes), strict=True):
            # Opacus keeps the sum as an attribute of the parameter, which PyTorch's types do not know.
            parameter.grad = parameter.summed_grad + part.view_as(parameter)  # pyright: ignore[reportAttributeAccessIssue]
            parameter.summed_grad = None  # pyright: ignore[reportAttributeAccessIssue]
