"""The accountant: from any list of events to what is guaranteed, per adversary (privacy.md, section 4).

Pure functions of events; events carry declared constants only, and so does every number here. All three adversaries see
every event, and the reason is in `SEEN_BY`. Three populations are told apart (privacy.md, section 2, scope):

- Without roles there is one unconditional line, for every patient. A channel release whose networks are not outputs of
  accounted mechanisms makes it infinite, because its rows carry what the encoder learned from him; the release itself
  is stated on a line of its own, conditional on the encoder and decoder, and added to nothing else.
- With fixed roles (`ChannelRelease.role == "release"`) there are two: release patients, who spend only on releases,
  and fit patients, who spend on training; rows of others cost them nothing if the networks are accounted, and infinity
  if they are not.
- The guarantee of the site is the larger of its unconditional lines.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, get_args

from common.errors import CohortiumError, ExitCode, StudyError
from common.privacy.channel import (
    effective_noise_factor,
    effective_noise_multiplier,
    latent_noise_multiplier,
    one_of_many_pld,
)
from common.privacy.conventions import (
    RELATION,
    UNIT,
    Mechanism,
    OneOfManyGaussian,
    PlainGaussian,
    PoissonGaussian,
    gaussian_pld,
    grid_step,
    pld_epsilon,
    poisson_pld,
    rdp_epsilon,
    replace_multiplier,
    shift,
    simplified,
)
from common.privacy.events import (
    EVENTS,
    BoundedInfluence,
    ChannelRelease,
    Event,
    GaussianStatistics,
    GaussianUpdate,
    SampledGaussianSteps,
    UnboundedInfluence,
    UnnoisedAggregates,
)
from common.privacy.gaussian import SMALLEST_MULTIPLIER, composed_noise_multiplier, gaussian_epsilon
from common.privacy.memory import remembered

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

Adversary = Literal["public", "member", "coordinator"]
Accountant = Literal["analytic Gaussian", "PLD", "RDP", "none"]
Population = Literal["every patient", "fit patients", "release patients"]
Composition = tuple[tuple[Mechanism, int], ...]

_EVERYONE: frozenset[str] = frozenset(get_args(Adversary))
# The public sees the released files, a member in addition every global decoder, the coordinator in addition every
# message. A released cohort or model is post-processing of the last global decoder, and that of every update and
# statistic before it, so the events of the weights reach the public too; channel rows are part of the release itself.
SEEN_BY: Mapping[type[Event], frozenset[str]] = {
    BoundedInfluence: _EVERYONE,
    UnboundedInfluence: _EVERYONE,
    GaussianUpdate: _EVERYONE,
    SampledGaussianSteps: _EVERYONE,
    GaussianStatistics: _EVERYONE,
    UnnoisedAggregates: _EVERYONE,
    ChannelRelease: _EVERYONE,
}

_CONDITION = "conditional on the encoder and decoder: they may depend on the patient, and nothing here covers that"
_DEPENDENT = (
    "channel rows (section 2, scope i): their encoder or decoder may depend on the patient through training that no"
    " accounted mechanism covers, so no unconditional finite epsilon holds"
)
_MOST_ROLE_CHOICES = 64


class BudgetError(CohortiumError):
    """The request would overspend, or its spend cannot be accounted; nothing was sent or changed."""

    exit_code = ExitCode.SITE


@dataclass(frozen=True)
class Guarantee:
    """(ε, δ)-differential privacy of one site against one adversary.

    `epsilon` is an upper bound in nats, infinity where there is none; `accountant` names the one whose valid bound was
    the smallest; `basis` holds the theorems and statements it rests on. If `unconditional` is false the number holds
    only given the encoder and decoder, and must not be added to any other. `excludes` says what the site sent that the
    number does not cover; it must be printed with it.
    """

    epsilon: float
    delta: float
    adversary: Adversary
    accountant: Accountant
    unconditional: bool
    basis: tuple[str, ...]
    applies_to: Population = "every patient"
    unit: str = UNIT
    relation: str = RELATION
    excludes: tuple[str, ...] = ()


@dataclass
class _Spend:
    """What one population spends: mechanisms with counts, the theorems, and why ε is infinite if it is."""

    mechanisms: Counter[Mechanism] = field(default_factory=Counter)
    basis: dict[str, None] = field(default_factory=dict)
    unbounded: bool = False

    def add(self, event: Event) -> None:
        mechanism, count, basis = _read(event)
        self.basis[basis] = None
        if mechanism is None:
            self.unbounded = True
        else:
            self.mechanisms[simplified(mechanism)] += count

    def forbid(self, reason: str) -> None:
        self.basis[reason] = None
        self.unbounded = True

    def plus(self, other: _Spend) -> _Spend:
        return _Spend(
            self.mechanisms + other.mechanisms, {**self.basis, **other.basis}, self.unbounded or other.unbounded
        )

    def guarantee(self, delta: float, adversary: Adversary) -> Guarantee:
        if self.unbounded:
            epsilon, name = math.inf, "none"
        else:
            epsilon, name = _smallest_epsilon(canonical(self.mechanisms), delta)
        return Guarantee(epsilon, delta, adversary, name, True, tuple(self.basis))


@dataclass
class _StudySpend:
    """The unconditional spends of a study by population, and its conditional releases."""

    unconditional: dict[Population, _Spend]
    conditional: _Spend | None


def account(
    events: Sequence[Event],
    delta: float,
    *,
    adversary: Adversary = "coordinator",
    other_studies: Iterable[Sequence[Event]] = (),
) -> Guarantee:
    """What holds for every patient of the site, without conditions: the largest of its unconditional lines.

    `events` are all spends of one site in one study, `other_studies` those of its other studies, which compose with
    them. `delta` is the δ of the whole. `BudgetError` naming an event or adversary this version has no rule for.
    """
    _check_delta_range(delta)
    everything = [tuple(spent) for spent in (events, *other_studies)]
    studies = [_study_spend(spent, adversary) for spent in everything]
    guarantees = [total.guarantee(delta, adversary) for total in _totals(studies)]
    largest = max(guarantees, key=lambda guarantee: guarantee.epsilon)
    # One theorem may decide for fit patients and another for release patients: the statement rests on all of them.
    basis = tuple(dict.fromkeys(itertools.chain(largest.basis, *(guarantee.basis for guarantee in guarantees))))
    return replace(largest, basis=basis, excludes=excluded(itertools.chain(*everything)))


def excluded(events: Iterable[Event]) -> tuple[str, ...]:
    """What was sent that no ε covers, in words (privacy.md, section 0)."""
    found = (event.statistics for event in events if isinstance(event, UnnoisedAggregates))
    return tuple(f"un-noised aggregates, no epsilon: {statistics}" for statistics in dict.fromkeys(found))


def account_lines(
    events: Sequence[Event], delta: float, *, adversary: Adversary = "coordinator"
) -> tuple[Guarantee, ...]:
    """Every line a ledger prints for one study: the unconditional ones by population, then the conditional one if any.

    The conditional line composes the conditional releases with each other and with nothing else.
    """
    _check_delta_range(delta)
    study = _study_spend(events, adversary)
    lines = [
        replace(spend.guarantee(delta, adversary), applies_to=population)
        for population, spend in study.unconditional.items()
    ]
    if study.conditional is not None:
        lines.append(replace(study.conditional.guarantee(delta, adversary), unconditional=False))
    return tuple(lines)


def prospective(
    events_so_far: Sequence[Event],
    planned_events: Sequence[Event],
    delta: float,
    max_epsilon: float,
    *,
    adversary: Adversary = "coordinator",
    other_studies: Iterable[Sequence[Event]] = (),
) -> Guarantee:
    """The filter: the guarantee of everything spent plus everything planned, or `BudgetError` with the numbers.

    `max_epsilon` is the stricter of the study's and the site's; infinity allows everything that can be accounted."""
    if not max_epsilon > 0:
        raise BudgetError(
            f"max_epsilon = {max_epsilon:g} allows nothing to be sent",
            fix="set a positive budget, or infinity to accept statements without a finite epsilon",
        )
    others = [tuple(study) for study in other_studies]
    whole = account((*events_so_far, *planned_events), delta, adversary=adversary, other_studies=others)
    if whole.epsilon > max_epsilon:
        spent = account(events_so_far, delta, adversary=adversary, other_studies=others)
        raise BudgetError(
            f"the whole schedule would reach epsilon = {_number(whole.epsilon)} at delta = {delta:g} against the"
            f" {adversary}, more than the budget of {_number(max_epsilon)}; spent so far: {_number(spent.epsilon)},"
            f" planned: {len(planned_events)} events; basis: {'; '.join(whole.basis)}",
            fix="plan fewer rounds, steps or rows, or more noise, or raise max_epsilon if the site agrees",
        )
    return whole


def check_delta(delta: float, patients: int, site: str) -> str | None:
    """None if δ fits a site of `patients` patients, else a warning (δ > n^-1.5); `StudyError` above 1/(10 n).

    A mechanism that publishes each patient's row with probability δ satisfies δ: δ·n patients may be exposed outright.
    """
    _check_delta_range(delta)
    if patients < 1:
        raise ValueError(f"{site}: a site has at least 1 patient, got {patients}")
    exposed = f"delta * n = {delta * patients:.3g} for the {patients} patients of site {site!r}"
    if delta > 1 / (10 * patients):
        raise StudyError(
            f"[privacy] delta = {delta:g} is too large: {exposed}, and at most 0.1 is accepted",
            fix=f"set delta to at most {1 / (10 * patients):.3g}",
        )
    if delta > patients**-1.5:
        return f"[privacy] delta = {delta:g} is large: {exposed}; {patients**-1.5:.3g} or less is customary"
    return None


def canonical(mechanisms: Mapping[Mechanism, int]) -> Composition:
    """Mechanisms with their counts in one fixed order: the key of the cache, the same for every order of events."""
    return tuple(sorted(mechanisms.items(), key=lambda item: (type(item[0]).__name__, item)))


@remembered
def _smallest_epsilon(composition: Composition, delta: float) -> tuple[float, Accountant]:
    """The smallest valid upper bound on ε, and whose it is."""
    if not composition:
        return 0.0, "none"
    if any(1 / shift(mechanism) < SMALLEST_MULTIPLIER for mechanism, _ in composition):
        return math.inf, "none"
    plain = [(mechanism.noise_multiplier, n) for mechanism, n in composition if isinstance(mechanism, PlainGaussian)]
    multiplier = composed_noise_multiplier(plain)
    if len(plain) == len(composition):
        # Exact, so no other bound can be smaller.
        epsilon = gaussian_epsilon(delta, multiplier)
        return epsilon, "analytic Gaussian" if math.isfinite(epsilon) else "none"
    sampled = [(mechanism, n) for mechanism, n in composition if not isinstance(mechanism, PlainGaussian)]
    merged: Sequence[tuple[Mechanism, int]] = [*sampled, (PlainGaussian(multiplier), 1)] if plain else sampled
    bounds: list[tuple[float, Accountant]] = [
        (_pld_bound(merged, delta), "PLD"),
        (rdp_epsilon(merged, delta), "RDP"),
    ]
    epsilon, name = min(bounds, key=lambda bound: bound[0])
    return (epsilon, name) if math.isfinite(epsilon) else (math.inf, "none")


def _pld_bound(composition: Sequence[tuple[Mechanism, int]], delta: float) -> float:
    step = grid_step(composition)
    if step is None:
        return math.inf
    parts = [_pld(mechanism, count, step) for mechanism, count in composition]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.compose(part)
    return pld_epsilon(whole, delta, sum(count for _, count in composition))


@lru_cache(maxsize=32)
def _pld(mechanism: Mechanism, count: int, step: float) -> PrivacyLossDistribution:
    """The PLD of `count` applications; kept, because totals over studies share their parts."""
    if isinstance(mechanism, PlainGaussian):
        return gaussian_pld(mechanism.noise_multiplier / math.sqrt(count), step)
    if isinstance(mechanism, PoissonGaussian):
        single = poisson_pld(mechanism.sampling_probability, mechanism.add_remove_multiplier, step)
    else:
        single = one_of_many_pld(mechanism.patients, mechanism.noise_multiplier, step, count)
    return single.self_compose(count)


def _read(event: Event) -> tuple[Mechanism | None, int, str]:
    """Mechanism (None: no finite ε), count, and the statement it rests on."""
    match event:
        case BoundedInfluence():
            return None, 1, "T2 (bounded influence): sensitivity only; without noise no finite epsilon holds"
        case UnboundedInfluence():
            return None, 1, "none: updates were neither projected nor noised (non-private reference)"
        case GaussianUpdate():
            multiplier = replace_multiplier(event.noise_multiplier)
            return PlainGaussian(multiplier), 1, "Gaussian mechanism on the projected update (section 3, update_noise)"
        case SampledGaussianSteps():
            steps = PoissonGaussian(event.sampling_probability, event.noise_multiplier)
            return steps, event.steps, "Poisson-sampled Gaussian mechanism under replace-one (section 3, dpsgd)"
        case GaussianStatistics():
            statement = f"Gaussian mechanism on clipped statistics (section 5): {event.statistics}"
            return PlainGaussian(event.noise_multiplier), 1, statement
        case ChannelRelease():
            return _read_channel(event)
        case UnnoisedAggregates():
            raise ValueError("un-noised aggregates have no mechanism")


def _read_channel(event: ChannelRelease) -> tuple[Mechanism, int, str]:
    statement = "T3, T5 (channel of a cohort, one of n patients a row)"
    multiplier = latent_noise_multiplier(event.latent_noise, event.sensitivity)
    if event.all_coordinates_noised and event.observation_noise > 0:
        noise = (event.latent_noise, event.observation_noise, event.decoder_lipschitz)
        multiplier = effective_noise_multiplier(*noise, event.sensitivity)
        statement = f"T4, T5 (channel of a cohort; effective-noise factor {effective_noise_factor(*noise):.4f})"
    return OneOfManyGaussian(event.patients, multiplier), event.rows, statement


def _study_spend(events: Sequence[Event], adversary: Adversary) -> _StudySpend:
    """Refuse what cannot be accounted, then sort the visible events by population."""
    if adversary not in _EVERYONE:
        raise BudgetError(f"unknown adversary {adversary!r}; known: {', '.join(get_args(Adversary))}")
    for event in events:
        if type(event) not in SEEN_BY:
            raise BudgetError(
                f"the accountant has no rule for the privacy event {type(event).__name__}; known: {', '.join(EVENTS)}",
                fix="use the version of Cohortium that made this event, or a newer one",
            )
    visible = [event for event in events if adversary in SEEN_BY[type(event)]]
    releases = [event for event in visible if isinstance(event, ChannelRelease)]
    training, released = _Spend(), _Spend()
    for event in visible:
        # Un-noised aggregates are named in `excludes` and are part of no number.
        if not isinstance(event, ChannelRelease | UnnoisedAggregates):
            training.add(event)
        if isinstance(event, GaussianStatistics) and event.role == "all":
            released.add(event)
    for event in releases:
        if event.role == "release":
            released.add(event)
        elif event.networks_accounted:
            training.add(event)
            released.add(event)
        else:
            released.forbid(_DEPENDENT)
        if not event.networks_accounted:
            training.forbid(_DEPENDENT)
    conditional = None
    if any(not event.unconditional for event in releases):
        conditional = _Spend(basis={_CONDITION: None})
        for event in releases:
            if not event.unconditional:
                conditional.add(event)
    if any(event.role == "release" for event in releases):
        return _StudySpend({"fit patients": training, "release patients": released}, conditional)
    return _StudySpend({"every patient": training}, conditional)


def _totals(studies: Sequence[_StudySpend]) -> list[_Spend]:
    """The total of a patient for every role he may have in each study; an upper bound if there are too many."""
    choices = [list(study.unconditional.values()) for study in studies]
    if math.prod(len(options) for options in choices) > _MOST_ROLE_CHOICES:
        choices = [[_sum(options)] for options in choices]
    return [_sum(chosen) for chosen in itertools.product(*choices)]


def _sum(spends: Iterable[_Spend]) -> _Spend:
    total = _Spend()
    for spend in spends:
        total = total.plus(spend)
    return total


def _check_delta_range(delta: float) -> None:
    if not 0 < delta < 1:
        raise StudyError(f"[privacy] delta = {delta!r} is not between 0 and 1", fix="for example delta = 1e-5")


def _number(epsilon: float) -> str:
    return f"{epsilon:.4g}" if math.isfinite(epsilon) else "infinity"
