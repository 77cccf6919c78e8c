"""The dpsgd mode: differentially private SGD on encoder and decoder together (privacy.md, section 3, dpsgd).

Whatever leaves `DPSGDTrainer.train`, and whatever it keeps, is a function of noised sums of clipped gradients: the
spectral projection after every step, Adam's moments, the update's projection onto ‖u‖₂ ≤ C and the check for weights
that are not finite are post-processing. No loss and no realised batch size is computed into a result.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from client.trainers.base import NonFiniteLossError, RoundInputs, RoundResult
from client.trainers.clipping import row_gradients
from common.errors import DataError
from common.model.training import (
    ADAM_BETAS,
    capture_state,
    difference,
    learning_rate,
    named_parameters,
    restore_state,
)
from common.model.vae import Decoder, Encoder
from common.privacy.dpsgd import dpsgd_schedule
from common.privacy.events import SampledGaussianSteps
from common.privacy.noise import RandomNumbers
from common.privacy.update import project_update, update_norm
from common.study import Study

PATIENTS = "dpsgd.patients"
# In a seeded simulation the sample and the noise must differ from the numbers that the networks draw from the seed.
PRIVACY_STREAM = 0x6470736764
# A Poisson sample is worked through in pieces of this many rows, so that memory does not grow with the batch.
LARGEST_PIECE = 1024


class DPSGDTrainer:
    """Lipschitz-constrained VAE trained by DP-SGD; one norm-projected decoder update a round leaves."""

    def train(self, inputs: RoundInputs) -> RoundResult:
        """Take this round's share of the schedule and project the update.

        `DataError` if the table has not as many patients as in the rounds before: the noise was calibrated to those.
        """
        # Opacus takes seconds to import, which the other modes need not wait for.
        from client.trainers.noised import NoisedOptimiser

        study, device, patients = inputs.study, inputs.device, len(inputs.data)
        training = study.training
        if inputs.state and int(inputs.state[PATIENTS]) != patients:
            raise DataError(
                f"the table has {patients} patients and had {int(inputs.state[PATIENTS])} in earlier rounds of this"
                " study, to which the noise is calibrated",
                fix="restore the table that the study began with, or start a new study",
            )
        schedule = dpsgd_schedule(study, patients)
        random = RandomNumbers(None if study.study.seed is None else inputs.seed ^ PRIVACY_STREAM)
        start = torch.Generator().manual_seed(inputs.seed)
        generator = torch.Generator(device=device).manual_seed(inputs.seed)
        encoder = Encoder(inputs.encoding, study.model, start, initialise=not inputs.state).to(device)
        decoder = Decoder(inputs.encoding, study.model, initialise=False).to(device)
        decoder.load_arrays(inputs.decoder)
        parameters = named_parameters(encoder, decoder)
        adam = torch.optim.Adam(parameters.values(), betas=ADAM_BETAS, fused=True)
        if inputs.state:
            restore_state(encoder, parameters, adam, inputs.state)
        optimiser = NoisedOptimiser(
            adam,
            noise_multiplier=schedule.noise_multiplier,
            gradient_clip=training.gradient_clip,
            expected_batch=schedule.expected_batch,
            random=random,
        )

        data = inputs.data.to(device)
        started = time.perf_counter()
        try:
            for step in range(schedule.steps):
                batch = torch.from_numpy(random.sample(patients, schedule.sampling_probability)).to(device)
                total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
                # An empty sample has no piece: its step is noise alone, as the mechanism says.
                for piece in batch.split(LARGEST_PIECE) if len(batch) else ():
                    rows = row_gradients(
                        encoder, decoder, data.inputs[piece], data.levels[piece], training.kl_weight, generator
                    )
                    for name, array in rows.clipped_sum(training.gradient_clip).items():
                        total[name] += array
                rate = learning_rate(inputs.round, step, schedule.steps, training.rounds, training.learning_rate)
                adam.param_groups[0]["lr"] = rate
                optimiser.zero_grad(set_to_none=True)
                for name, parameter in parameters.items():
                    parameter.grad = total[name]
                optimiser.step()
                encoder.network.project()
                decoder.network.project()
            encoder.network.project(exact=True)
            decoder.network.project(exact=True)
        except (ValueError, torch.linalg.LinAlgError):  # pyright: ignore[reportPrivateImportUsage]
            raise _diverged(inputs.round) from None  # the projection of weights that are not finite
        if not all(torch.isfinite(parameter).all() for parameter in parameters.values()):
            raise _diverged(inputs.round)
        update = difference(decoder, inputs.decoder)
        projected = project_update(update, training.update_norm)
        seconds = time.perf_counter() - started
        state: Mapping[str, Tensor] = {**capture_state(encoder, parameters, adam), PATIENTS: torch.tensor(patients)}
        return RoundResult(
            update=projected,
            state=state,
            diagnostics={
                "update_norm_before": update_norm(update),
                "update_norm": update_norm(projected),
                "noise_multiplier": schedule.noise_multiplier,
                "steps": float(schedule.steps),
                "training_seconds": seconds,
            },
        )

    def event(self, study: Study, number: int, weight: float, patients: int) -> SampledGaussianSteps:
        """The steps of one round with the noise calibrated to the whole study."""
        return dpsgd_schedule(study, patients).event(number)


def _diverged(number: int) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"the weights are no longer finite in round {number}", fix="lower learning_rate or gradient_clip"
    )
