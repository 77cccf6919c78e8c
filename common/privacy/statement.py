"""The privacy statement: for every site and adversary, what is claimed, under which theorem and which assumptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common.privacy.events import BoundedInfluence, Event
from common.privacy.update import influence
from common.study import Protocol

SCHEMA_VERSION = 1
INFINITE = "infinity"
ADVERSARIES: Mapping[str, str] = {
    "public": "sees the released files and nothing else",
    "member": "another hospital: sees in addition every global decoder",
    "coordinator": "sees in addition every message a site sends",
}
ASSUMPTIONS = (
    "every adversary knows the study, the software and all other patients",
    "one patient is one row; a patient treated in several of the hospitals is not covered by the per-site statement",
    "each site trusts its own software, machine, random numbers and key holders, and nobody else",
)


def privacy_statement(
    protocol: Protocol, events: Mapping[str, Sequence[Event]], patients: Mapping[str, int]
) -> dict[str, Any]:
    """The document behind privacy.json: one entry a site and adversary.

    `events` are the spends of each site. Neither mode of this version adds noise, so every ε is infinite: T2 bounds how
    far a site can move the global decoder, which is sensitivity and not differential privacy.
    """
    study = protocol.study
    entries = [
        {
            "site": site,
            "patients": patients[site],
            "adversary": adversary,
            "adversary_sees": sees,
            "epsilon": INFINITE,
            "delta": study.privacy.delta,
            "conditional": False,
            "basis": _basis(spent),
            "exposure": _exposure(spent),
        }
        for site, spent in sorted(events.items())
        for adversary, sees in ADVERSARIES.items()
    ]
    seeded = study.study.seed is not None
    return {
        "schema_version": SCHEMA_VERSION,
        "study": study.study.name,
        "study_digest": protocol.digest,
        "mode": study.training.mode,
        "unit": "one patient (one row)",
        "neighbouring_relation": "replacing the content of one patient slot at one site; patient numbers are public",
        "randomness": (
            f"fixed seed {seed_text(study.study.seed)}: a simulation, no statement about real patients"
            if seeded
            else "seeded from the operating system's cryptographic generator"
        ),
        "assumptions": list(ASSUMPTIONS),
        "entries": entries,
    }


def seed_text(seed: int | None) -> str:
    """The seed in words."""
    return "none" if seed is None else str(seed)


def _basis(events: Sequence[Event]) -> str:
    if not events:
        return "the site joined and sent no update"
    if all(isinstance(event, BoundedInfluence) for event in events):
        return (
            "T2 (bounded influence) only: the projected updates carry no noise, so no finite epsilon holds for them,"
            " for the decoder made of them, or for rows sampled from it. How much an attacker can see in practice is a"
            " matter of measurement, not of this statement."
        )
    return "none: updates were neither projected nor noised (non-private reference)"


def _exposure(events: Sequence[Event]) -> dict[str, Any]:
    """What the site sent, in declared constants: rounds, radius, weight, and T2's bound for one round."""
    if not events:
        return {"rounds": 0, "update_norm": 0.0, "weight": 0.0, "largest_move_of_decoder_per_round": 0.0}
    bounded = [event for event in events if isinstance(event, BoundedInfluence)]
    if len(bounded) != len(events):
        return {"rounds": len(events), "update_norm": INFINITE, "largest_move_of_decoder_per_round": INFINITE}
    return {
        "rounds": len(bounded),
        "update_norm": max(event.update_norm for event in bounded),
        "weight": max(event.weight for event in bounded),
        "largest_move_of_decoder_per_round": max(influence(event.weight, event.update_norm) for event in bounded),
    }
