"""Privacy events: frozen values that completely document what a mechanism did; accountants consume nothing else."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class BoundedInfluence:
    """One un-noised update, projected to ‖u‖₂ ≤ `update_norm`, entered the mean with `weight` (privacy.md, T2).

    A statement about sensitivity only: its ε is infinite against anyone who sees the update or a model made of it.
    """

    type: ClassVar[str] = "BoundedInfluence"
    round: int
    update_norm: float
    weight: float


@dataclass(frozen=True)
class UnboundedInfluence:
    """One update without projection or noise: the non-private reference, in simulation only. ε is infinite."""

    type: ClassVar[str] = "UnboundedInfluence"
    round: int
    weight: float


Event = BoundedInfluence | UnboundedInfluence
EVENTS: dict[str, type[BoundedInfluence] | type[UnboundedInfluence]] = {
    event.type: event for event in (BoundedInfluence, UnboundedInfluence)
}


def event_to_json(event: Event) -> dict[str, Any]:
    """Plain JSON data with the event's type."""
    return {"type": event.type, **asdict(event)}


def event_from_json(document: dict[str, Any]) -> Event:
    """Read what `event_to_json` wrote; `ValueError` for a type this version does not know."""
    fields = dict(document)
    name = fields.pop("type", None)
    if name not in EVENTS:
        raise ValueError(f"unknown privacy event {name!r}; known: {', '.join(sorted(EVENTS))}")
    return EVENTS[name](**fields)
