"""The constrained mode: spectral projection at every step, and the update projected onto ‖u‖₂ ≤ C (privacy.md, T2)."""

from __future__ import annotations

from client.trainers.base import RoundInputs, RoundResult
from client.trainers.local import difference, train_locally
from common.privacy.events import BoundedInfluence
from common.privacy.update import project_update, update_norm
from common.study import TrainingSection


class ConstrainedTrainer:
    """Lipschitz-constrained VAE; what leaves is one norm-projected decoder update a round, without noise."""

    def train(self, inputs: RoundInputs) -> RoundResult:
        """Train one round and project the update."""
        local = train_locally(inputs, constrained=True)
        update = difference(local.decoder, inputs.decoder)
        radius = inputs.study.training.update_norm
        projected = project_update(update, radius)
        return RoundResult(
            update=projected,
            state=local.state,
            diagnostics={
                "loss": local.loss,
                "update_norm_before": update_norm(update),
                "update_norm": update_norm(projected),
                "encoder_certificate": local.encoder.network.certificate(),
                "steps": float(local.steps),
                "training_seconds": local.seconds,
            },
        )

    def event(self, training: TrainingSection, number: int, weight: float) -> BoundedInfluence:
        """The exposure of one round."""
        return BoundedInfluence(round=number, update_norm=training.update_norm, weight=weight)
