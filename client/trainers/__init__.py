"""Training modes: one file a mode behind one interface. A new mode is one new file and one line in `MODES`."""

from __future__ import annotations

from client.trainers.base import RoundInputs, RoundResult, Trainer
from client.trainers.constrained import ConstrainedTrainer
from client.trainers.dpsgd import DPSGDTrainer
from client.trainers.unconstrained import UnconstrainedTrainer

MODES: dict[str, Trainer] = {
    "constrained": ConstrainedTrainer(),
    "dpsgd": DPSGDTrainer(),
    "none": UnconstrainedTrainer(),
}

__all__ = ["MODES", "RoundInputs", "RoundResult", "Trainer"]
