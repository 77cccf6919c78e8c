"""The constrained mode: spectral projection at every step, and the update projected onto ‖u‖₂ ≤ C (privacy.md, T2)."""

from __future__ import annotations

from client.trainers.base import RoundInputs, RoundResult
from common.model.training import difference, train_locally
from common.privacy.events import BoundedInfluence, GaussianUpdate
from common.privacy.noise import add_noise
from common.privacy.update import project_update, update_norm
from common.study import Study

NOISE_STREAM = 0x6E6F697365


class ConstrainedTrainer:
    """Lipschitz-constrained VAE; one norm-projected decoder update a round leaves, with Gaussian noise if declared."""

    def train(self, inputs: RoundInputs) -> RoundResult:
        """Train one round and project the update."""
        local = train_locally(inputs, constrained=True)
        update = difference(local.decoder, inputs.decoder)
        radius = inputs.study.training.update_norm
        projected = project_update(update, radius)
        sent, noise = projected, inputs.study.privacy.update_noise
        if noise > 0:
            # In a seeded simulation the noise must differ from the numbers that training drew from the same seed.
            seed = None if inputs.study.study.seed is None else inputs.seed ^ NOISE_STREAM
            sent = add_noise(projected, noise * radius, seed)
        return RoundResult(
            update=sent,
            state=local.state,
            diagnostics={
                "loss": local.loss,
                "update_norm_before": update_norm(update),
                "update_norm": update_norm(projected),
                "steps": float(local.steps),
                "training_seconds": local.seconds,
            },
        )

    def event(self, study: Study, number: int, weight: float, patients: int) -> BoundedInfluence | GaussianUpdate:
        """The exposure of one round; with update noise, a Gaussian mechanism."""
        radius, noise = study.training.update_norm, study.privacy.update_noise
        if noise > 0:
            return GaussianUpdate(round=number, update_norm=radius, noise_multiplier=noise, weight=weight)
        return BoundedInfluence(round=number, update_norm=radius, weight=weight)
