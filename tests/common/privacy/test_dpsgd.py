import math
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant

from common.errors import StudyError
from common.privacy.accountant import account
from common.privacy.conventions import PoissonGaussian, grid_step
from common.privacy.dpsgd import (
    LARGEST_NOISE_MULTIPLIER,
    SMALLEST_NOISE_MULTIPLIER,
    calibrate_dpsgd,
    dpsgd_schedule,
)
from common.privacy.events import SampledGaussianSteps
from common.privacy.gaussian import composed_noise_multiplier, gaussian_epsilon
from common.privacy.statement import epsilon_in_words, privacy_statement
from common.schema import parse_schema
from common.study import Protocol, Study

SCHEMA = parse_schema({"fields": [{"name": "x", "type": "boolean"}]})
DELTA = 1e-5


def make_study(epsilon: float = 3.0, seed: int | None = None, **training: Any) -> Study:
    return Study.model_validate(
        {
            "study": {"name": "s", "schema": "s.json", "seed": seed},
            "training": {"mode": "dpsgd", "rounds": 10, "local_epochs": 2, "batch_size": 50, **training},
            "privacy": {"epsilon": epsilon, "delta": DELTA},
        }
    )


def library_epsilon(steps: int, probability: float, multiplier: float) -> float:
    """dp_accounting alone; only the grid of the losses is ours, which trades tightness for time."""
    accountant = PLDAccountant(
        neighboring_relation=NeighboringRelation.REPLACE_ONE,
        value_discretization_interval=grid_step([(PoissonGaussian(probability, multiplier), steps)]) or math.nan,
    )
    step = PoissonSampledDpEvent(probability, GaussianDpEvent(multiplier))
    accountant.compose(SelfComposedDpEvent(step, steps))
    return float(accountant.get_epsilon(DELTA))


@pytest.mark.parametrize(("steps", "probability"), [(1120, 0.07), (20, 0.5), (40, 1.0), (3, 1e-3)])
@pytest.mark.parametrize("epsilon", [1.0, 10.0])
def test_the_noise_is_the_least_that_reaches_the_target(steps: int, probability: float, epsilon: float) -> None:
    multiplier = calibrate_dpsgd(steps, probability, epsilon, DELTA)
    reached = account([SampledGaussianSteps(1, steps, probability, multiplier)], DELTA).epsilon
    assert reached <= epsilon
    less = multiplier * 10 ** (-1.001 / 2000)
    if multiplier > SMALLEST_NOISE_MULTIPLIER:
        assert account([SampledGaussianSteps(1, steps, probability, less)], DELTA).epsilon > epsilon
    calibrate_dpsgd.cache_clear()
    assert calibrate_dpsgd(steps, probability, epsilon, DELTA) == multiplier


@pytest.mark.parametrize(("patients", "batch"), [(400, 50), (1000, 64)])
def test_the_epsilon_of_a_study_is_that_of_an_independent_accountant(patients: int, batch: int) -> None:
    study = make_study(batch_size=batch)
    schedule = dpsgd_schedule(study, patients)
    events = [schedule.event(number) for number in range(1, 11)]
    ours = account(events, DELTA)
    theirs = library_epsilon(sum(e.steps for e in events), batch / patients, events[0].noise_multiplier)
    assert ours.epsilon == pytest.approx(theirs, abs=1e-6) and ours.accountant == "PLD"
    assert 0.98 * 3.0 < ours.epsilon <= 3.0 and ours.unconditional


def test_certain_sampling_is_a_plain_gaussian_with_a_shift_of_two_clips() -> None:
    schedule = dpsgd_schedule(make_study(), 30)
    assert (schedule.sampling_probability, schedule.steps, schedule.expected_batch) == (1.0, 1, 30)
    exact = gaussian_epsilon(DELTA, composed_noise_multiplier([(schedule.noise_multiplier / 2, 10)]))
    assert account([schedule.event(n) for n in range(1, 11)], DELTA).epsilon == exact
    assert 0.99 * 3.0 < exact <= 3.0


@pytest.mark.parametrize(
    ("patients", "steps", "probability"), [(1, 1, 1.0), (25, 1, 1.0), (50, 2, 1.0), (100, 4, 0.5), (1010, 40, 5 / 101)]
)
def test_the_schedule_of_a_site(patients: int, steps: int, probability: float) -> None:
    schedule = dpsgd_schedule(make_study(), patients)
    assert schedule.steps == steps and schedule.sampling_probability == pytest.approx(probability)
    assert schedule.expected_batch == pytest.approx(min(50, patients))
    assert schedule.event(7) == SampledGaussianSteps(7, steps, schedule.sampling_probability, schedule.noise_multiplier)


def test_more_rounds_epochs_or_privacy_cost_noise() -> None:
    base = dpsgd_schedule(make_study(), 400).noise_multiplier
    for study in (make_study(rounds=20), make_study(local_epochs=4), make_study(epsilon=1.5)):
        assert dpsgd_schedule(study, 400).noise_multiplier > base


def test_extreme_targets() -> None:
    assert calibrate_dpsgd(1, 1.0, 1e6, DELTA) == SMALLEST_NOISE_MULTIPLIER
    assert calibrate_dpsgd(1, 1.0, 1e-3, DELTA) < LARGEST_NOISE_MULTIPLIER
    with pytest.raises(StudyError, match=r"epsilon = 1e-06 .* out of reach for 1000 steps"):
        calibrate_dpsgd(1000, 1.0, 1e-6, 1e-9)
    for epsilon in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="epsilon must be positive and finite"):
            calibrate_dpsgd(1, 0.5, epsilon, DELTA)
    with pytest.raises(ValueError, match="at least 1 patient"):
        dpsgd_schedule(make_study(), 0)
    with pytest.raises(StudyError, match="epsilon is missing"):
        dpsgd_schedule(Study.model_validate({"study": {"name": "s", "schema": "s.json"}}), 10)


def test_a_study_names_its_target() -> None:
    with pytest.raises(StudyError, match=r"\[privacy\] epsilon is missing"):
        Protocol(study_of(training={"mode": "dpsgd"}), SCHEMA)
    for mode in ("constrained", "none"):
        with pytest.raises(StudyError, match=r"epsilon = 3 needs training.mode = \"dpsgd\""):
            Protocol(study_of(training={"mode": mode}, privacy={"epsilon": 3.0}), SCHEMA)
        with pytest.raises(StudyError, match=r"gradient_clip = 2 needs training.mode = \"dpsgd\""):
            Protocol(study_of(training={"mode": mode, "gradient_clip": 2.0}), SCHEMA)
    protocol = Protocol(make_study(gradient_clip=2.0), SCHEMA)
    assert Protocol.from_json(protocol.to_json()) == protocol


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.inf, math.nan])
def test_a_target_is_positive_and_finite(epsilon: float) -> None:
    with pytest.raises(ValueError, match="epsilon"):
        make_study(epsilon=epsilon)


def study_of(**sections: dict[str, Any]) -> Study:
    return Study.model_validate({"study": {"name": "s", "schema": "s.json"}, **sections})


@pytest.mark.parametrize("seed", [None, 4])
def test_the_statement_gives_a_finite_unconditional_epsilon_and_the_exposure_in_words(seed: int | None) -> None:
    study = make_study(seed=seed, gradient_clip=0.5, update_norm=2.0)
    patients = {"north": 300, "south": 100}
    schedules = {site: dpsgd_schedule(study, n) for site, n in patients.items()}
    events = {site: [schedule.event(n) for n in range(1, 11)] for site, schedule in schedules.items()}
    document = privacy_statement(Protocol(study, SCHEMA), events, patients)
    assert document["mode"] == "dpsgd" and len(document["entries"]) == 6
    for entry in document["entries"]:
        assert 0.98 * 3.0 < entry["epsilon"] <= 3.0 and not entry["conditional"] and entry["accountant"] == "PLD"
        assert "Poisson-sampled Gaussian mechanism under replace-one" in entry["basis"]
    exposure = document["entries"][0]["exposure"]
    multiplier = schedules["north"].noise_multiplier
    assert exposure["steps"] == 120 and exposure["noise_multiplier"] == multiplier and exposure["rounds"] == 10
    assert exposure["largest_move_of_decoder_per_round"] == pytest.approx(2 * 0.75 * 2.0)
    assert f"standard deviation {multiplier * 0.5:.4g}" in exposure["in_words"]
    assert "probability 0.1667" in exposure["in_words"] and "clipped to norm 0.5" in exposure["in_words"]
    assert ("as if" in epsilon_in_words(document)) == (seed is not None)
