"""The interface of a training mode: what a round gives it, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol as Interface

from torch import Tensor

from common.model.training import NonFiniteLossError, RoundInputs
from common.privacy.events import Event
from common.study import Study

__all__ = ["NonFiniteLossError", "RoundInputs", "RoundResult", "Trainer"]


@dataclass(frozen=True)
class RoundResult:
    """`update` may leave the site once its event is durable; `state` and `diagnostics` never leave it."""

    update: Mapping[str, Tensor]
    state: Mapping[str, Tensor]
    diagnostics: Mapping[str, float]


class Trainer(Interface):
    """A training mode."""

    def train(self, inputs: RoundInputs) -> RoundResult:
        """Train one round; `NonFiniteLossError` if the loss stops being finite."""
        ...

    def event(self, study: Study, number: int, weight: float, patients: int) -> Event:
        """What a round of this mode spends: a function of declared constants alone, the site's patients among them."""
        ...
