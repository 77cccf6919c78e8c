"""The privacy statement: for every site and adversary, what is claimed, under which theorem and which assumptions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common.privacy.accountant import Adversary, Guarantee, account, account_lines, excluded
from common.privacy.channel import latent_noise_multiplier
from common.privacy.events import (
    BoundedInfluence,
    ChannelRelease,
    Event,
    GaussianStatistics,
    GaussianUpdate,
    SampledGaussianSteps,
    UnboundedInfluence,
    UnnoisedAggregates,
)
from common.privacy.influence import influence
from common.privacy.statement_schema import INFINITE, SCHEMA_VERSION
from common.study import Protocol, Study

ADVERSARIES: Mapping[Adversary, str] = {
    "public": "sees the released files and nothing else",
    "member": "another hospital: sees in addition every global decoder",
    "coordinator": "sees in addition every message a site sends",
}
TRAINING = (BoundedInfluence, UnboundedInfluence, GaussianUpdate, SampledGaussianSteps)
EXCLUDES = "every ε here is of the model and cohort alone, excluding this evaluation and the decision to release"
CONDITION = (
    "holds only given the encoder and decoder, which may depend on the patient in ways that nothing here covers; it is"
    " added to no other number"
)
ASSUMPTIONS = (
    "every adversary knows the study, the software and all other patients",
    "one patient is one row; a patient treated in several of the hospitals is not covered by the per-site statement",
    "each site trusts its own software, machine, random numbers and key holders, and nobody else",
)


def privacy_statement(
    protocol: Protocol,
    events: Mapping[str, Sequence[Event]],
    patients: Mapping[str, int],
    *,
    gates: Sequence[str] = (),
) -> dict[str, Any]:
    """The document behind privacy.json (`statement_schema` is its format): one entry a site and adversary.

    `events` are the spends of each site, composed by the accountant: those of training, and a channel release behind
    them if there was one. Without noise the ε of an update is infinite: T2 bounds how far a site can move the global
    decoder, which is sensitivity and not differential privacy. The ε of an entry is its largest unconditional line.

    `gates` are those that decide about the release on un-noised numbers of patients: a query that no ε covers.
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
        "excludes": _excludes(itertools.chain(*events.values()), gates),
        "entries": entries,
    }


def _excludes(events: Iterable[Event], gates: Sequence[str]) -> str | None:
    """What every ε of the document leaves out; None if it leaves out nothing."""
    found = [*excluded(events), *([f"gates on un-noised numbers, no epsilon: {', '.join(gates)}"] if gates else [])]
    return f"{'; '.join(found)}; {EXCLUDES}" if found else None


def seed_text(seed: int | None) -> str:
    """The seed in words."""
    return "none" if seed is None else str(seed)


def largest_epsilon(statement: Mapping[str, Any]) -> float | str:
    """The largest ε over sites and adversaries; "infinity" if there is one."""
    values = [entry["epsilon"] for entry in statement["entries"]]
    return INFINITE if INFINITE in values else max(values)


def epsilon_in_words(statement: Mapping[str, Any]) -> str:
    """What the first page says about ε: never without unit, δ, relation and adversary, "as if" for a seeded run.

    A finite number for some patients, or under a condition, never stands without what holds for the others.
    """
    largest = largest_lines(statement)
    as_if = " as if, because the random numbers come from a seed" if "seed" in statement["randomness"].split() else ""
    at_delta = f"at δ = {statement['entries'][0]['delta']:g}{as_if}"
    scope = "one patient of any one site, replace-one, against public, member and coordinator alike"
    always = {population: value for (population, conditional), value in largest.items() if not conditional}
    if set(always) == {"every patient"}:
        value = always["every patient"]
        if value == INFINITE:
            text = f"ε is infinite, for one patient, against every adversary: {_why_infinite(statement)}."
        else:
            text = f"ε = {value:.3g} {at_delta}: for {scope}."
    else:
        why = f" ({_why_infinite(statement)})"
        parts = [
            f"{_epsilon(value)} for {population}"
            f"{' of a site that fixed no roles' if population == 'every patient' else ''}"
            f"{why if value == INFINITE else ''}"
            for population, value in always.items()
        ]
        text = f"{', '.join(parts)}; {at_delta}: for {scope}."
    given = [value for (_, conditional), value in largest.items() if conditional]
    if given:
        worst = INFINITE if INFINITE in given else max(given)
        text += (
            f" The released rows alone, conditional on the encoder and decoder and added to nothing: {_epsilon(worst)}"
            f" {at_delta}, for {scope}."
        )
    excludes = statement.get("excludes")
    return f"{text} Not included: {excludes}." if excludes else text


def largest_lines(statement: Mapping[str, Any]) -> dict[tuple[str, bool], float | str]:
    """The largest ε over sites and adversaries of every kind of line, by (applies_to, conditional)."""
    found: dict[tuple[str, bool], float | str] = {}
    for line in (line for entry in statement["entries"] for line in entry["lines"]):
        key, value = (line["applies_to"], line["conditional"]), line["epsilon"]
        before = found.get(key, 0.0)
        found[key] = INFINITE if INFINITE in (before, value) else max(before, value)
    return found


def _epsilon(value: float | str) -> str:
    return "ε is infinite" if isinstance(value, str) else f"ε = {value:.3g}"


def _why_infinite(statement: Mapping[str, Any]) -> str:
    """Why the largest unconditional ε is infinite, from the entries that are."""
    infinite = [entry for entry in statement["entries"] if entry["epsilon"] == INFINITE]
    trained = [entry for entry in infinite if entry["exposure"]["rounds"] > 0]
    if any(entry["exposure"].get("noise_multiplier", 0.0) == 0.0 for entry in trained):
        return "the updates carry no noise"
    if any(line["conditional"] for entry in infinite for line in entry["lines"]):
        return "the released rows come through an encoder or decoder that no accounted mechanism covers"
    if trained:
        return "there is too little noise for a finite bound"
    silent = sorted({entry["site"] for entry in infinite})
    return f"no number is stated for a site that joined and sent nothing ({', '.join(silent)})"


def _guarantee(events: Sequence[Event], delta: float, adversary: Adversary) -> dict[str, Any]:
    """ε, accountant and basis of a site, and its lines. One that sent nothing is given no number: its ε is infinite."""
    if not events:
        stated = {"epsilon": INFINITE, "accountant": "none", "basis": "the site joined and sent no update"}
        return {**stated, "lines": [_line("every patient", stated)]}
    lines = account_lines(events, delta, adversary=adversary)
    return {
        **_stated(account(events, delta, adversary=adversary), events),
        "lines": [
            _line(found.applies_to, _stated(found, events), None if found.unconditional else CONDITION)
            for found in lines
        ],
    }


def _stated(found: Guarantee, events: Sequence[Event]) -> dict[str, Any]:
    epsilon = found.epsilon if math.isfinite(found.epsilon) else INFINITE
    basis = "; ".join(found.basis) or "these patients took part in nothing that was sent"
    if any(isinstance(event, BoundedInfluence) for event in events) and all(
        isinstance(event, BoundedInfluence | GaussianStatistics | UnnoisedAggregates) for event in events
    ):
        basis = (
            "T2 (bounded influence) only: the projected updates carry no noise, so no finite epsilon holds for them,"
            " for the decoder made of them, or for rows sampled from it. How much an attacker can see in practice is a"
            " matter of measurement, not of this statement."
        )
    elif any(isinstance(event, UnboundedInfluence) for event in events) and not _releases(events):
        basis = "none: updates were neither projected nor noised (non-private reference)"
    return {"epsilon": epsilon, "accountant": found.accountant, "basis": basis}


def _line(applies_to: str, stated: Mapping[str, Any], condition: str | None = None) -> dict[str, Any]:
    return {"applies_to": applies_to, "conditional": condition is not None, **stated, "condition": condition}


def _releases(events: Sequence[Event]) -> list[ChannelRelease]:
    return [event for event in events if isinstance(event, ChannelRelease)]


def _exposure(events: Sequence[Event], study: Study, weight: float) -> dict[str, Any]:
    """What the site sent, in declared constants: its updates, and the rows it released if any."""
    releases = _releases(events)
    training = [event for event in events if isinstance(event, TRAINING)]
    trained = "fit patient" if any(release.role == "release" for release in releases) else "patient"
    found = _training_exposure(training, study, weight, trained)
    if releases:
        found["released_rows"] = sum(release.rows for release in releases)
        found["released_in_words"] = " ".join(_release_in_words(release) for release in releases)
    evaluated = [_evaluation_in_words(e) for e in events if isinstance(e, GaussianStatistics | UnnoisedAggregates)]
    if evaluated:
        found["evaluated_in_words"] = " ".join(evaluated)
    return found


def _evaluation_in_words(event: GaussianStatistics | UnnoisedAggregates) -> str:
    if isinstance(event, UnnoisedAggregates):
        return f"Un-noised aggregates, which no ε covers: {event.statistics}."
    return (
        f"Noised statistics ({event.statistics}): a Gaussian mechanism with noise multiplier"
        f" {event.noise_multiplier:.4g} under replace-one."
    )


def _release_in_words(event: ChannelRelease) -> str:
    """One channel release with its constants; which theorem holds follows from what was noised."""
    among = "release patients, who took no part in training" if event.role == "release" else "patients"
    multiplier = latent_noise_multiplier(event.latent_noise, event.sensitivity)
    if not event.all_coordinates_noised:
        t4 = "T4 is not applied, since categories are sampled by softmax"
    elif event.observation_noise > 0:
        t4 = (
            f"T4 applies as well, with observation noise σ_x = {event.observation_noise:.4g} in every output coordinate"
        )
    else:
        t4 = "T4 adds nothing without observation noise"
    return (
        f"{event.rows} rows, each of one patient drawn independently from {event.patients} {among}"
        f" (role {event.role!r}), encoded, noised and decoded: sensitivity Δ = {event.sensitivity:.4g}, latent noise"
        f" σ_z = {event.latent_noise:.4g}, noise multiplier σ_z/Δ = {multiplier:.4g}, by T3 for a row and T5 for all of"
        f" them; {t4}."
    )


def _training_exposure(events: Sequence[Event], study: Study, weight: float, trained: str) -> dict[str, Any]:
    """Rounds, radius, weight, and T2's bound for one round; in dpsgd the steps as well.

    `weight` is the site's share of all declared patients, for events that do not carry it; `trained`: who took part.
    """
    if not events:
        return {"rounds": 0, "update_norm": 0.0, "weight": 0.0, "largest_move_of_decoder_per_round": 0.0}
    noised = [event for event in events if isinstance(event, SampledGaussianSteps)]
    if len(noised) == len(events):
        return _dpsgd_exposure(noised, study, weight, trained)
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


def _dpsgd_exposure(
    events: Sequence[SampledGaussianSteps], study: Study, weight: float, trained: str
) -> dict[str, Any]:
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
            f" {trained} took part independently with probability {probability:.4g}, the gradient of his loss was"
            f" clipped to norm {clip:g}, and the sum carried Gaussian noise of standard deviation"
            f" {multiplier * clip:.4g} in every coordinate (noise multiplier {multiplier:.4g})."
        ),
    }
