import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import StudyError
from common.privacy.accountant import account, account_lines
from common.privacy.channel import cohort_epsilon
from common.privacy.channel_release import (
    channel_event,
    fit_patients,
    latent_scale,
    networks_accounted,
    release_patients,
    role_slots,
)
from common.privacy.dpsgd import dpsgd_schedule
from common.privacy.events import BoundedInfluence, Event, GaussianUpdate
from common.study import Study

DIAMETER = 4.0


def make_study(training: dict[str, Any] | None = None, privacy: dict[str, Any] | None = None, **channel: Any) -> Study:
    return Study.model_validate(
        {
            "study": {"name": "s", "schema": "schema.json"},
            "model": {"latent_dim": 4, "encoder_lipschitz": 2.0},
            "training": {"rounds": 3} | (training or {}),
            "privacy": privacy or {},
            "release": {"method": "channel", "rows": 200},
            "channel": {"epsilon": 1.0, "latent_radius": 3.0} | channel,
        }
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(3, 400), st.floats(0.01, 0.99), st.text("0123456789abcdef", min_size=8, max_size=8))
def test_every_slot_has_one_role_fixed_by_its_number(patients: int, share: float, digest: str) -> None:
    wanted = round(share * patients)
    if not 0 < wanted < patients:
        with pytest.raises(StudyError, match="release_share"):
            role_slots(digest, patients, share)
        return
    fit, release = role_slots(digest, patients, share)
    assert sorted([*fit, *release]) == list(range(patients)) and len(release) == wanted == release_patients(
        patients, share
    )
    assert list(fit) == sorted(fit) and list(release) == sorted(release)
    role_slots.cache_clear()
    assert np.array_equal(role_slots(digest, patients, share)[1], release)


def test_roles_differ_between_studies_and_are_spread_over_the_table() -> None:
    one, two = (role_slots(digest, 1000, 0.3)[1] for digest in ("a" * 64, "b" * 64))
    assert not np.array_equal(one, two)
    for slots in (one, two):
        assert abs(slots.mean() - 500) < 60  # 300 of 1000 at random: standard deviation 14


def test_without_roles_everybody_does_both() -> None:
    fit, release = role_slots("a", 5, 0.0)
    assert list(fit) == list(release) == [0, 1, 2, 3, 4]
    assert fit_patients(make_study(), 5) == 5 and fit_patients(make_study(release_share=0.4), 5) == 3


@pytest.mark.parametrize(("radius", "sensitivity"), [(3.0, 6.0), (100.0, 8.0)])
def test_the_event_says_the_declared_constants(radius: float, sensitivity: float) -> None:
    event = channel_event(make_study(latent_radius=radius), DIAMETER, 100, 50)
    assert (event.round, event.rows, event.patients, event.sensitivity) == (4, 50, 100, sensitivity)
    assert not event.all_coordinates_noised and event.observation_noise == 0
    reached = cohort_epsilon(50, 100, event.latent_noise / sensitivity, 1e-5)
    assert 0.97 < reached <= 1.0


@pytest.mark.parametrize("rows", [1, 40, 200])
def test_any_share_of_the_rows_spends_the_same(rows: int) -> None:
    """The plan at joining stands with all rows of the cohort, the release with the site's own share."""
    event = channel_event(make_study(epsilon=0.5), DIAMETER, 100, rows)
    (line,) = (line for line in account_lines([event], 1e-5) if not line.unconditional)
    assert 0.48 < line.epsilon <= 0.5 and line.applies_to == "every patient"


@pytest.mark.parametrize(
    ("training", "privacy", "encoder", "accounted"),
    [
        ({}, {}, "patients", False),
        ({}, {}, "synthetic", False),
        ({}, {"update_noise": 20.0}, "patients", False),
        ({}, {"update_noise": 20.0}, "synthetic", True),
        ({"mode": "dpsgd"}, {"epsilon": 3.0}, "patients", True),
        ({"mode": "dpsgd"}, {"epsilon": 3.0}, "synthetic", True),
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.25])
def test_labels_and_lines_follow_from_mode_encoder_and_roles(
    training: dict[str, Any], privacy: dict[str, Any], encoder: str, accounted: bool, share: float
) -> None:
    study = make_study(training, privacy, encoder=encoder, release_share=share)
    assert networks_accounted(study) is accounted
    event = channel_event(study, DIAMETER, 400, 100)
    assert (event.role, event.networks_accounted) == ("all" if share == 0 else "release", accounted)
    assert event.patients == (400 if share == 0 else 100)
    rounds: list[Event]
    if study.training.mode == "dpsgd":
        schedule = dpsgd_schedule(study, fit_patients(study, 400))
        rounds = [schedule.event(number) for number in (1, 2, 3)]
    elif study.privacy.update_noise:
        rounds = [GaussianUpdate(number, 1.0, 20.0, 0.5) for number in (1, 2, 3)]
    else:
        rounds = [BoundedInfluence(number, 1.0, 0.5) for number in (1, 2, 3)]
    trained = account(rounds, 1e-5).epsilon
    lines = {(line.applies_to, line.unconditional): line.epsilon for line in account_lines([*rounds, event], 1e-5)}
    total = account([*rounds, event], 1e-5).epsilon
    if share == 0 and accounted:  # scope iii: composes, for everyone
        assert set(lines) == {("every patient", True)}
        assert max(trained, 0.97) < total == lines["every patient", True] <= trained + 1.0
    elif share == 0:  # scope i: a line of its own, added to nothing
        assert set(lines) == {("every patient", True), ("every patient", False)}
        assert total == lines["every patient", True] == math.inf
        assert 0.97 < lines["every patient", False] <= 1.0
    else:  # scope ii
        assert set(lines) == {("fit patients", True), ("release patients", True)}
        assert 0.97 < lines["release patients", True] <= 1.0
        assert lines["fit patients", True] == (trained if accounted else math.inf)
        assert total == max(lines.values())


def test_what_cannot_be_is_refused_with_its_numbers() -> None:
    with pytest.raises(StudyError, match="epsilon is missing"):
        channel_event(make_study(epsilon=None), DIAMETER, 100, 10)
    with pytest.raises(StudyError, match=r"leaves 0 of 2 patients to release"):
        channel_event(make_study(release_share=0.1), DIAMETER, 2, 10)
    with pytest.raises(StudyError, match=r"out of reach for 10 rows of 100 patients"):
        channel_event(make_study(privacy={"delta": 1e-14}), DIAMETER, 100, 10)


@pytest.mark.parametrize(("radius", "noise"), [(10.0, 0.3), (10.0, 5.0), (1.0, 2.0)])
def test_rescaled_codes_have_the_spread_of_the_prior(radius: float, noise: float) -> None:
    """Codes with the largest variance that prior and ball allow, noised and scaled, have variance 1 a coordinate."""
    study = make_study(latent_radius=radius)
    random = np.random.default_rng(0)
    codes = random.standard_normal((200_000, 4))
    codes *= np.minimum(1.0, radius / np.sqrt((codes**2).sum(axis=1).mean()))
    noised = (codes + noise * random.standard_normal(codes.shape)) * latent_scale(study, noise)
    assert noised.var() == pytest.approx(1.0, abs=0.01)
