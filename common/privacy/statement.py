"""The privacy statement: for every site and adversary, what is claimed, under which theorem and which assumptions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from common.privacy.accountant import Adversary, account
from common.privacy.events import BoundedInfluence, Event, GaussianUpdate, SampledGaussianSteps, UnboundedInfluence
from common.privacy.update import influence
from common.study import Protocol, Study

SCHEMA_VERSION = 1
INFINITE = "infinity"
ADVERSARIES: Mapping[Adversary, str] = {
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

    `events` are the spends of each site, composed by the accountant. Without noise every ε is infinite: T2 bounds how
    far a site can move the global decoder, which is sensitivity and not differential privacy.
    """
    study = protocol.study
    entries = [
        {
            "site": site,
            "patients": patients[site],
            "adversary": adversary,
            "adversary_sees": sees,
            "delta": study.privacy.delta,
            "conditional": False,
            **_guarantee(spent, study.privacy.delta, adversary),
            "exposure": _exposure(spent, study, patients[site] / sum(patients.values())),
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


def largest_epsilon(statement: Mapping[str, Any]) -> float | str:
    """The largest ε over sites and adversaries; "infinity" if there is one."""
    values = [entry["epsilon"] for entry in statement["entries"]]
    return INFINITE if INFINITE in values else max(values)


def epsilon_in_words(statement: Mapping[str, Any]) -> str:
    """What the first page says about ε: never without unit, δ, relation and adversary, "as if" for a seeded run."""
    value = largest_epsilon(statement)
    delta = statement["entries"][0]["delta"]
    if value == INFINITE:
        return "ε is infinite, for one patient, against every adversary: the updates carry no noise."
    as_if = " as if, because the random numbers come from a seed" if "seed" in statement["randomness"].split() else ""
    return (
        f"ε = {value:.3g} at δ = {delta:g}{as_if}: for one patient of any one site, replace-one, against public, member"
        " and coordinator alike."
    )


def _guarantee(events: Sequence[Event], delta: float, adversary: Adversary) -> dict[str, Any]:
    """ε, accountant and basis. A site that sent nothing is given no number: its ε is stated as infinite."""
    if not events or any(isinstance(event, BoundedInfluence | UnboundedInfluence) for event in events):
        return {"epsilon": INFINITE, "accountant": "none", "basis": _basis(events)}
    found = account(events, delta, adversary=adversary)
    epsilon = found.epsilon if math.isfinite(found.epsilon) else INFINITE
    return {"epsilon": epsilon, "accountant": found.accountant, "basis": "; ".join(found.basis)}


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


def _exposure(events: Sequence[Event], study: Study, weight: float) -> dict[str, Any]:
    """What the site sent, in declared constants: rounds, radius, weight, and T2's bound for one round.

    `weight` is the site's share of all declared patients, for events that do not carry it.
    """
    if not events:
        return {"rounds": 0, "update_norm": 0.0, "weight": 0.0, "largest_move_of_decoder_per_round": 0.0}
    noised = [event for event in events if isinstance(event, SampledGaussianSteps)]
    if len(noised) == len(events):
        return _dpsgd_exposure(noised, study, weight)
    bounded = [event for event in events if isinstance(event, BoundedInfluence | GaussianUpdate)]
    if len(bounded) != len(events):
        return {"rounds": len(events), "update_norm": INFINITE, "largest_move_of_decoder_per_round": INFINITE}
    return {
        "rounds": len(bounded),
        "update_norm": max(event.update_norm for event in bounded),
        "weight": max(event.weight for event in bounded),
        "largest_move_of_decoder_per_round": max(influence(event.weight, event.update_norm) for event in bounded),
        "noise_multiplier": min(
            event.noise_multiplier if isinstance(event, GaussianUpdate) else 0.0 for event in bounded
        ),
    }


def _dpsgd_exposure(events: Sequence[SampledGaussianSteps], study: Study, weight: float) -> dict[str, Any]:
    steps = sum(event.steps for event in events)
    probability = max(event.sampling_probability for event in events)
    multiplier = min(event.noise_multiplier for event in events)
    clip, radius = study.training.gradient_clip, study.training.update_norm
    return {
        "rounds": len(events),
        "update_norm": radius,
        "weight": weight,
        "largest_move_of_decoder_per_round": influence(weight, radius),
        "steps": steps,
        "sampling_probability": probability,
        "noise_multiplier": multiplier,
        "gradient_clip": clip,
        "in_words": (
            f"{steps} steps of DP-SGD in {len(events)} rounds, on encoder and decoder together: in each step every"
            f" patient took part independently with probability {probability:.4g}, the gradient of his loss was clipped"
            f" to norm {clip:g}, and the sum carried Gaussian noise of standard deviation {multiplier * clip:.4g} in"
            f" every coordinate (noise multiplier {multiplier:.4g})."
        ),
    }
