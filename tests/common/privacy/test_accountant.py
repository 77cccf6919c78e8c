import dataclasses
import itertools
import math
from typing import Any, cast

import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ExitCode, StudyError
from common.privacy.accountant import (
    SEEN_BY,
    Adversary,
    BudgetError,
    Guarantee,
    account,
    account_lines,
    check_delta,
    prospective,
)
from common.privacy.channel import cohort_epsilon, cohort_epsilon_rdp
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
from common.privacy.gaussian import gaussian_epsilon

DELTA = 1e-5
ADVERSARIES: tuple[Adversary, ...] = ("public", "member", "coordinator")
STATISTICS = GaussianStatistics(0, 2.0, 1.0, "histograms")
FIT_STATISTICS = dataclasses.replace(STATISTICS, role="fit")
STEPS = SampledGaussianSteps(1, 30, 0.05, 2.0)


def release(noise: float = 2.0, **changes: Any) -> ChannelRelease:
    event = ChannelRelease(
        round=9,
        rows=50,
        patients=100,
        sensitivity=1.0,
        latent_noise=noise,
        observation_noise=0.0,
        decoder_lipschitz=8.0,
        all_coordinates_noised=False,
    )
    return dataclasses.replace(event, **changes)


def epsilon(*events: Event, delta: float = DELTA) -> float:
    return account(events, delta).epsilon


# Cheap to account: Gaussian events alone need no grid.
gaussian_events: st.SearchStrategy[Event] = st.one_of(
    st.builds(GaussianUpdate, st.integers(1, 60), st.just(1.0), st.floats(0.5, 50), st.just(0.1)),
    st.builds(GaussianStatistics, st.integers(0, 1), st.floats(0.5, 50), st.just(1.0), st.just("moments")),
)


def test_update_noise_of_one_as_the_design_says() -> None:
    updates = [GaussianUpdate(r, 1.0, 1.0, 0.2) for r in range(1, 41)]
    one, forty = account(updates[:1], DELTA), account(updates, DELTA)
    assert one.epsilon == pytest.approx(9.9973, abs=5e-5) and forty.epsilon == pytest.approx(133, abs=0.5)
    assert forty.accountant == "analytic Gaussian" and forty.unconditional
    assert forty.epsilon == pytest.approx(gaussian_epsilon(DELTA, 0.5 / math.sqrt(40)), rel=1e-9)


def test_dpsgd_to_the_digits_of_the_design_and_independent_of_rounds() -> None:
    whole = account([SampledGaussianSteps(1, 100, 0.1, 1.0)], DELTA)
    assert whole.epsilon == pytest.approx(10.5164, abs=5e-5) and whole.accountant == "PLD"
    rounds = [SampledGaussianSteps(r, 10, 0.1, 1.0) for r in range(1, 11)]
    assert account(rounds, DELTA).epsilon == whole.epsilon
    # The independent recomputation from what a ledger holds, to 1e-6.
    step = PoissonSampledDpEvent(0.1, GaussianDpEvent(1.0))
    pld = PLDAccountant(NeighboringRelation.REPLACE_ONE).compose(SelfComposedDpEvent(step, 100))
    assert whole.epsilon == pytest.approx(pld.get_epsilon(DELTA), abs=1e-6)


def test_a_release_is_the_smaller_of_its_bounds() -> None:
    guarantee = account([release(role="release", networks_accounted=True)], DELTA)
    assert guarantee.epsilon == cohort_epsilon(50, 100, 2.0, DELTA) <= cohort_epsilon_rdp(50, 100, 2.0, DELTA)
    assert guarantee.accountant == "PLD" and any("T5" in line for line in guarantee.basis)


def test_observation_noise_counts_only_on_all_coordinates() -> None:
    plain, noised = release(), release(observation_noise=16.0, all_coordinates_noised=True)
    partly = release(observation_noise=16.0)
    bound = [account_lines([event], DELTA)[-1] for event in (plain, noised, partly)]
    assert bound[0].epsilon == bound[2].epsilon > bound[1].epsilon
    assert any("T4" in line and "1.4142" in line for line in bound[1].basis)
    assert not any("T4" in line for line in bound[2].basis)


@pytest.mark.parametrize("event", [BoundedInfluence(1, 1.0, 0.5), UnboundedInfluence(1, 0.5)])
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_influence_without_noise_is_infinite_and_absorbs(event: Event, adversary: Adversary) -> None:
    guarantee = account([STATISTICS, event, STEPS], DELTA, adversary=adversary)
    assert guarantee.epsilon == math.inf and guarantee.accountant == "none" and guarantee.unconditional
    assert account([STATISTICS], DELTA, other_studies=[[event]]).epsilon == math.inf


@pytest.mark.parametrize(
    "event",
    [
        GaussianUpdate(1, 1.0, 0.0, 0.5),
        SampledGaussianSteps(1, 5, 0.1, 0.0),
        GaussianStatistics(1, 0.0, 1.0, "none"),
        release(0.0, networks_accounted=True),
    ],
)
def test_no_noise_is_infinite(event: Event) -> None:
    assert epsilon(event) == epsilon(STATISTICS, event) == math.inf


def test_nothing_sent_costs_nothing() -> None:
    guarantee = account([], DELTA)
    assert guarantee.epsilon == 0 and guarantee.basis == ()
    assert guarantee.unit == "one patient" and guarantee.relation.startswith("replacing the content")


def test_mixed_events_compose_into_one_bound() -> None:
    single = [epsilon(STATISTICS), epsilon(STEPS), epsilon(release(networks_accounted=True))]
    together = account([STATISTICS, STEPS, release(networks_accounted=True)], DELTA)
    assert max(single) < together.epsilon <= sum(single) * 1.2 and together.accountant == "PLD"
    assert len(together.basis) == 3
    # Sampling can only help: the unsampled Gaussians of the same shifts are an upper bound, and exact.
    inverse = 1 / 2.0**2 + 30 * 1 / 1.0**2 + 50 * 1 / 2.0**2
    assert together.epsilon < gaussian_epsilon(DELTA, inverse**-0.5)


def test_the_order_of_events_does_not_matter() -> None:
    events = [STATISTICS, STEPS, release(networks_accounted=True), GaussianUpdate(2, 1.0, 9.0, 0.1)]
    assert len({epsilon(*order) for order in itertools.permutations(events)}) == 1


@given(st.permutations([GaussianUpdate(r, 1.0, 1.1**r, 0.1) for r in range(1, 8)]))
def test_the_order_of_rounds_does_not_matter(events: list[Event]) -> None:
    assert epsilon(*events) == epsilon(*sorted(events, key=lambda event: event.round))


@given(st.lists(gaussian_events, max_size=6), gaussian_events, st.floats(1e-9, 1e-3), st.floats(1, 100))
@settings(deadline=None)
def test_more_events_or_less_delta_never_cost_less(
    events: list[Event], more: Event, delta: float, factor: float
) -> None:
    less = epsilon(*events, delta=delta)
    assert epsilon(*events, more, delta=delta) >= less >= epsilon(*events, delta=delta * factor)


@given(st.floats(1.5, 5), st.floats(1.05, 2), st.integers(1, 40), st.floats(0.01, 0.4))
@settings(deadline=None, max_examples=3)
def test_sampled_steps_are_monotone(noise: float, factor: float, steps: int, rate: float) -> None:
    base = epsilon(SampledGaussianSteps(1, steps, rate, noise))
    assert epsilon(SampledGaussianSteps(1, steps, rate, noise * factor)) <= base
    assert epsilon(SampledGaussianSteps(1, 2 * steps, rate, noise)) >= base
    assert epsilon(SampledGaussianSteps(1, steps, 2 * rate, noise)) >= base


def test_a_conditional_release_makes_the_unconditional_line_infinite_and_has_its_own() -> None:
    whole, conditional = account_lines([STATISTICS, release()], DELTA)
    assert whole.epsilon == math.inf and whole.unconditional and whole.applies_to == "every patient"
    assert any("scope i" in line for line in whole.basis)
    assert not conditional.unconditional and conditional.basis[0].startswith("conditional on the encoder and decoder")
    # Nothing else is in it: it equals the release alone.
    assert conditional.epsilon == cohort_epsilon(50, 100, 2.0, DELTA)
    assert account([STATISTICS, release()], DELTA).epsilon == math.inf


def test_conditional_releases_compose_with_each_other() -> None:
    conditional = account_lines([release(), release(round=10)], DELTA)[-1]
    assert conditional.epsilon == cohort_epsilon(100, 100, 2.0, DELTA)


def test_roles_give_two_lines_and_the_site_the_larger() -> None:
    events = [BoundedInfluence(1, 1.0, 0.5), release(role="release")]
    fit, released = account_lines(events, DELTA)
    assert (fit.applies_to, fit.epsilon) == ("fit patients", math.inf)
    assert (released.applies_to, released.epsilon) == ("release patients", cohort_epsilon(50, 100, 2.0, DELTA))
    assert fit.unconditional and released.unconditional
    assert account(events, DELTA).epsilon == math.inf


def test_roles_with_accounted_networks_are_finite_for_both() -> None:
    fit, released = account_lines([FIT_STATISTICS, release(role="release", networks_accounted=True)], DELTA)
    assert fit.epsilon == epsilon(STATISTICS) and released.epsilon == cohort_epsilon(50, 100, 2.0, DELTA)
    whole = account([FIT_STATISTICS, release(role="release", networks_accounted=True)], DELTA)
    assert whole.epsilon == max(fit.epsilon, released.epsilon)
    assert any("T5" in line for line in whole.basis) and any("section 5" in line for line in whole.basis)


def test_noise_on_updates_does_not_cover_a_private_encoder() -> None:
    # The rows carry what the encoder learned, whatever noise the decoder's updates had.
    events = [GaussianUpdate(1, 1.0, 20.0, 0.5), release(role="release")]
    assert account_lines(events, DELTA)[0].epsilon == math.inf


def test_statistics_of_all_slots_count_for_release_patients_too() -> None:
    channel = release(role="release", networks_accounted=True)
    fit, released = account_lines([STATISTICS, channel], DELTA)
    assert fit.epsilon == epsilon(STATISTICS)
    assert released.epsilon == epsilon(STATISTICS, release(networks_accounted=True)) > fit.epsilon


def test_unnoised_aggregates_are_named_and_change_no_number() -> None:
    aggregates = UnnoisedAggregates(9, "counts of everybody")
    found = account([STATISTICS, aggregates], DELTA)
    assert found.epsilon == epsilon(STATISTICS) and not account([STATISTICS], DELTA).excludes
    assert found.excludes == ("un-noised aggregates, no epsilon: counts of everybody",)
    assert account([STATISTICS], DELTA, other_studies=[[aggregates]]).excludes == found.excludes
    assert account_lines([aggregates], DELTA)[0].epsilon == 0.0


def test_a_release_of_all_slots_beside_one_of_release_slots() -> None:
    fit, released, conditional = account_lines([release(role="release"), release(round=10)], DELTA)
    assert fit.epsilon == released.epsilon == math.inf and not conditional.unconditional
    accounted = release(round=10, networks_accounted=True)
    fit, released = account_lines([release(role="release", networks_accounted=True), accounted], DELTA)
    assert fit.epsilon == epsilon(accounted) and released.epsilon == cohort_epsilon(100, 100, 2.0, DELTA)


def test_studies_of_a_site_compose() -> None:
    other = [GaussianStatistics(0, 3.0, 1.0, "moments")]
    assert account([STATISTICS], DELTA, other_studies=[other]).epsilon == epsilon(STATISTICS, *other)
    # A patient may be a fit patient here and a release patient there: the worst of all combinations counts.
    roles = [FIT_STATISTICS, release(role="release", networks_accounted=True)]
    total = account(roles, DELTA, other_studies=[roles]).epsilon
    assert total == max(
        epsilon(STATISTICS, STATISTICS),
        epsilon(STATISTICS, release(networks_accounted=True)),
        cohort_epsilon(100, 100, 2.0, DELTA),
    )
    many = account(roles, DELTA, other_studies=[roles] * 7).epsilon
    assert many >= epsilon(*[STATISTICS] * 8)


@pytest.mark.parametrize("events", [[STATISTICS, STEPS], [release()], [BoundedInfluence(1, 1.0, 0.5)]])
def test_whoever_sees_more_is_promised_no_more(events: list[Event]) -> None:
    public, member, coordinator = (account(events, DELTA, adversary=adversary).epsilon for adversary in ADVERSARIES)
    assert public <= member <= coordinator


def test_every_event_type_has_a_rule() -> None:
    assert set(SEEN_BY) == set(EVENTS.values())
    for seen in SEEN_BY.values():
        assert "coordinator" in seen and ("member" in seen or "public" not in seen)


@dataclasses.dataclass(frozen=True)
class Laplace(GaussianStatistics):
    """A subclass is another mechanism, whatever it inherits."""


@pytest.mark.parametrize("event", [Laplace(1, 1.0, 1.0, "x"), cast(Event, object())])
def test_unknown_events_are_refused_by_name(event: Event) -> None:
    with pytest.raises(BudgetError, match=rf"no rule for the privacy event {type(event).__name__}; known: Bounded"):
        account([BoundedInfluence(1, 1.0, 0.5), event], DELTA)
    with pytest.raises(BudgetError, match="no rule"):
        prospective([], [event], DELTA, math.inf)
    with pytest.raises(BudgetError, match="no rule"):
        account([], DELTA, other_studies=[[event]])


def test_unknown_adversaries_are_refused() -> None:
    with pytest.raises(BudgetError, match="unknown adversary 'insurer'; known: public, member, coordinator"):
        account([], DELTA, adversary=cast(Adversary, "insurer"))


@given(st.lists(gaussian_events, max_size=4), st.lists(gaussian_events, min_size=1, max_size=4), st.floats(0.1, 100))
@settings(deadline=None)
def test_the_filter_refuses_exactly_what_exceeds(spent: list[Event], planned: list[Event], budget: float) -> None:
    whole = account([*spent, *planned], DELTA)
    if whole.epsilon > budget:
        with pytest.raises(BudgetError):
            prospective(spent, planned, DELTA, budget)
    else:
        assert prospective(spent, planned, DELTA, budget) == whole
    assert prospective(spent, planned, DELTA, whole.epsilon) == whole
    with pytest.raises(BudgetError):
        prospective(spent, planned, DELTA, math.nextafter(whole.epsilon, 0))


def test_a_refusal_has_the_numbers() -> None:
    with pytest.raises(BudgetError) as refusal:
        prospective([STATISTICS], [GaussianUpdate(1, 1.0, 1.0, 0.5)], DELTA, 5.0)
    whole, spent = epsilon(STATISTICS, GaussianUpdate(1, 1.0, 1.0, 0.5)), epsilon(STATISTICS)
    for part in (f"epsilon = {whole:.4g}", "budget of 5", f"spent so far: {spent:.4g}", "1 events", "coordinator"):
        assert part in refusal.value.message
    assert refusal.value.exit_code is ExitCode.SITE and refusal.value.fix


def test_infinity_needs_an_infinite_budget() -> None:
    update = BoundedInfluence(1, 1.0, 0.5)
    with pytest.raises(BudgetError, match="epsilon = infinity"):
        prospective([], [update], DELTA, 1e9)
    assert prospective([], [update], DELTA, math.inf).epsilon == math.inf


def test_other_studies_count_against_the_budget() -> None:
    alone = epsilon(STATISTICS)
    assert prospective([], [STATISTICS], DELTA, alone).epsilon == alone
    with pytest.raises(BudgetError, match=f"spent so far: {alone:.4g}"):
        prospective([], [STATISTICS], DELTA, alone, other_studies=iter([[STATISTICS]]))


@pytest.mark.parametrize("budget", [0.0, -1.0, math.nan])
def test_a_budget_that_allows_nothing_is_refused(budget: float) -> None:
    with pytest.raises(BudgetError, match="allows nothing"):
        prospective([], [], DELTA, budget)


def test_delta_against_patients() -> None:
    assert check_delta(1e-5, 1000, "a") is None
    warning = check_delta(1e-5, 10_000, "a")
    assert warning is not None and "delta * n = 0.1 for the 10000 patients of site 'a'" in warning
    with pytest.raises(StudyError, match=r"delta \* n = 0.2 for the 20000 patients of site 'north'") as refusal:
        check_delta(1e-5, 20_000, "north")
    assert "5e-06" in refusal.value.fix
    with pytest.raises(ValueError, match="at least 1 patient"):
        check_delta(1e-5, 0, "a")


@given(st.integers(1, 10**6), st.floats(1e-12, 0.5))
def test_delta_is_refused_exactly_above_a_tenth_of_a_patient(patients: int, delta: float) -> None:
    if delta > 1 / (10 * patients):
        with pytest.raises(StudyError):
            check_delta(delta, patients, "a")
    else:
        assert (check_delta(delta, patients, "a") is None) == (delta <= patients**-1.5)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_an_impossible_delta_is_refused(delta: float) -> None:
    for refused in (lambda: account([], delta), lambda: account_lines([], delta), lambda: check_delta(delta, 10, "a")):
        with pytest.raises(StudyError, match="not between 0 and 1"):
            refused()


def test_guarantees_are_frozen() -> None:
    guarantee: Guarantee = account([], DELTA)
    with pytest.raises(dataclasses.FrozenInstanceError):
        guarantee.epsilon = 0.0  # type: ignore[misc]
