"""The non-private reference: the same networks and schedule without any constraint. Simulation only."""

from __future__ import annotations

from client.trainers.base import RoundInputs, RoundResult
from common.model.training import difference, train_locally
from common.privacy.events import UnboundedInfluence
from common.privacy.update import update_norm
from common.study import Study


class UnconstrainedTrainer:
    """No spectral projection, no norm projection: what the constraint is compared with."""

    def train(self, inputs: RoundInputs) -> RoundResult:
        """Train one round."""
        local = train_locally(inputs, constrained=False)
        update = difference(local.decoder, inputs.decoder)
        return RoundResult(
            update=update,
            state=local.state,
            diagnostics={
                "loss": local.loss,
                "update_norm": update_norm(update),
                "steps": float(local.steps),
                "training_seconds": local.seconds,
            },
        )

    def event(self, study: Study, number: int, weight: float, patients: int) -> UnboundedInfluence:
        """The exposure of one round."""
        return UnboundedInfluence(round=number, weight=weight)
