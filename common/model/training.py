"""Training of encoder and decoder on one table: a round at a site, or a whole training on rows that no patient gave.

Encoder and optimiser stay where the training is, the decoder comes from elsewhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from common.encoding import EncodedTable, TableEncoding
from common.errors import CohortiumError
from common.model.vae import Decoder, Encoder, negative_elbo
from common.study import Study

ADAM_BETAS = (0.9, 0.99)
FINAL_RATE = 0.05  # the cosine schedule ends at this share of the peak learning rate


class NonFiniteLossError(CohortiumError):
    """Training diverged; a round is answered with a code and nothing is spent."""


@dataclass(frozen=True)
class RoundInputs:
    """One round at one site. `seed` seeds every random choice; it comes from the operating system in production."""

    study: Study
    encoding: TableEncoding
    data: EncodedTable
    decoder: Mapping[str, Tensor]
    round: int
    state: Mapping[str, Tensor]
    seed: int
    device: torch.device


@dataclass(frozen=True)
class LocalResult:
    """The trained networks, what the site keeps for the next round, and the last epoch's mean loss a row (nats)."""

    decoder: Decoder
    encoder: Encoder
    state: dict[str, Tensor]
    loss: float
    steps: int
    seconds: float


def learning_rate(study_round: int, step: int, steps: int, rounds: int, peak: float) -> float:
    """Cosine from `peak` to `FINAL_RATE` · peak over the whole study; a function of the schedule alone."""
    progress = (study_round - 1 + step / max(1, steps)) / rounds
    return peak * (FINAL_RATE + (1.0 - FINAL_RATE) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))))


def train_locally(inputs: RoundInputs, *, constrained: bool) -> LocalResult:
    """Run `local_epochs` passes of Adam on the ELBO; every step ends with the spectral projection if `constrained`.

    `NonFiniteLossError` if the loss or a weight is not finite in the end.
    """
    study, device = inputs.study, inputs.device
    generator = torch.Generator(device=device).manual_seed(inputs.seed)
    start = torch.Generator().manual_seed(inputs.seed)
    fresh = not inputs.state
    encoder = Encoder(inputs.encoding, study.model, start, constrained=constrained, initialise=fresh).to(device)
    decoder = Decoder(inputs.encoding, study.model, constrained=constrained, initialise=False).to(device)
    decoder.load_arrays(inputs.decoder)
    # One optimiser for both; its moments go on from round to round although the server has replaced the decoder's
    # weights: a fresh start for the decoder measured no better.
    parameters = named_parameters(encoder, decoder)
    optimiser = torch.optim.Adam(parameters.values(), betas=ADAM_BETAS, fused=True)
    if inputs.state:
        restore_state(encoder, parameters, optimiser, inputs.state)

    data = inputs.data.to(device)
    epochs, rounds = study.training.local_epochs, study.training.rounds
    steps = epochs * math.ceil(len(data) / study.training.batch_size)
    started = time.perf_counter()
    step, loss_sum, rows = 0, torch.zeros((), device=device), 0
    try:
        for epoch in range(epochs):
            for batch in _batches(len(data), study.training.batch_size, generator, device):
                rate = learning_rate(inputs.round, step, steps, rounds, study.training.learning_rate)
                losses = negative_elbo(
                    encoder, decoder, data.inputs[batch], data.levels[batch], study.training.kl_weight, generator
                )
                optimiser.param_groups[0]["lr"] = rate
                optimiser.zero_grad(set_to_none=True)
                losses.mean().backward()
                optimiser.step()
                if constrained:
                    encoder.network.project()
                    decoder.network.project()
                step += 1
                if epoch == epochs - 1:
                    loss_sum += losses.detach().sum()
                    rows += len(batch)
        if constrained:
            encoder.network.project(exact=True)
            decoder.network.project(exact=True)
    except (ValueError, torch.linalg.LinAlgError):  # pyright: ignore[reportPrivateImportUsage]
        # the projection of weights that are not finite
        loss_sum.fill_(torch.nan)
    mean_loss = float(loss_sum) / max(1, rows)  # waits for the device
    if not math.isfinite(mean_loss) or not all(torch.isfinite(value).all() for value in parameters.values()):
        raise NonFiniteLossError(
            f"the loss is no longer finite in round {inputs.round}", fix="lower learning_rate or check the data"
        )
    seconds = time.perf_counter() - started
    return LocalResult(decoder, encoder, capture_state(encoder, parameters, optimiser), mean_loss, step, seconds)


def _batches(rows: int, batch_size: int, generator: torch.Generator, device: torch.device) -> Iterator[Tensor]:
    """A fresh permutation cut into batches of nearly equal size, so that no step rests on two or three patients."""
    order = torch.randperm(rows, generator=generator, device=device)
    return iter(order.tensor_split(math.ceil(rows / batch_size)))


def named_parameters(encoder: Encoder, decoder: Decoder) -> dict[str, torch.nn.Parameter]:
    """All trained parameters of both networks by name."""
    named = {f"encoder.{name}": parameter for name, parameter in encoder.named_parameters()}
    return named | {f"decoder.{name}": parameter for name, parameter in decoder.named_parameters()}


def capture_state(
    encoder: Encoder, parameters: Mapping[str, torch.nn.Parameter], optimiser: torch.optim.Adam
) -> dict[str, Tensor]:
    """The encoder and Adam's moments of both networks, as CPU tensors by name."""
    state = {f"encoder.{name}": parameter.detach().cpu() for name, parameter in encoder.named_parameters()}
    for name, parameter in parameters.items():
        for key, value in optimiser.state[parameter].items():
            state[f"adam.{key}.{name}"] = value.detach().cpu()
    return state


@torch.no_grad()
def restore_state(
    encoder: Encoder,
    parameters: Mapping[str, torch.nn.Parameter],
    optimiser: torch.optim.Adam,
    state: Mapping[str, Tensor],
) -> None:
    """Take over what `capture_state` kept: the encoder, and Adam's moments of both networks."""
    for name, parameter in encoder.named_parameters():
        parameter.copy_(state[f"encoder.{name}"])
    for name, parameter in parameters.items():
        if f"adam.step.{name}" not in state:
            continue  # Adam keeps nothing of a parameter without gradient: the head's base if no column is numeric
        optimiser.state[parameter] = {
            key: state[f"adam.{key}.{name}"].to(parameter.device) for key in ("step", "exp_avg", "exp_avg_sq")
        }


def load_encoder(encoding: TableEncoding, study: Study, state: Mapping[str, Tensor]) -> Encoder:
    """The encoder that `capture_state` kept, on the CPU."""
    encoder = Encoder(encoding, study.model, initialise=False)
    encoder.load_state_dict({name: state[f"encoder.{name}"] for name, _ in encoder.named_parameters()})
    return encoder


def difference(trained: Decoder, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """u = trained decoder - global decoder, by name, on the CPU in float32."""
    return {name: value - start[name] for name, value in trained.arrays().items()}
