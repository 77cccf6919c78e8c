import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.privacy.events import (
    EVENTS,
    ChannelRelease,
    Event,
    GaussianStatistics,
    GaussianUpdate,
    SampledGaussianSteps,
    event_from_json,
    event_to_json,
)

rounds = st.integers(0, 10**6)
counts = st.integers(1, 10**9)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
noise = st.floats(min_value=0, allow_infinity=False)
accounted: st.SearchStrategy[Event] = st.one_of(
    st.builds(GaussianUpdate, rounds, positive, noise, noise),
    st.builds(SampledGaussianSteps, rounds, counts, st.floats(0, 1, exclude_min=True), noise),
    st.builds(GaussianStatistics, rounds, noise, positive, st.text()),
    st.builds(
        ChannelRelease,
        *(rounds, counts, counts, positive, noise, noise, positive, st.booleans()),
        role=st.sampled_from(["all", "release"]),
        networks_accounted=st.booleans(),
    ),
)
EXAMPLES: list[Event] = [
    GaussianUpdate(1, 1.0, 2.0, 0.5),
    SampledGaussianSteps(1, 20, 0.1, 1.1),
    GaussianStatistics(0, 3.0, 2.0, "histograms"),
    ChannelRelease(41, 1000, 500, 6.0, 1.0, 0.2, 8.0, True),
]


@given(accounted)
def test_round_trip_through_json_text(event: Event) -> None:
    document = json.loads(json.dumps(event_to_json(event), allow_nan=False))
    assert event_from_json(document) == event and type(event_from_json(document)) is type(event)


@pytest.mark.parametrize("event", EXAMPLES)
def test_events_are_frozen_registered_and_of_one_round(event: Event) -> None:
    assert EVENTS[event.type] is type(event) and event.type == type(event).__name__ and event.round >= 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.round = 2  # type: ignore[misc]


def test_a_release_documents_itself_completely() -> None:
    assert event_to_json(EXAMPLES[3]) == {
        "type": "ChannelRelease",
        "round": 41,
        "rows": 1000,
        "patients": 500,
        "sensitivity": 6.0,
        "latent_noise": 1.0,
        "observation_noise": 0.2,
        "decoder_lipschitz": 8.0,
        "all_coordinates_noised": True,
        "role": "all",
        "networks_accounted": False,
    }


@pytest.mark.parametrize(
    ("role", "accounted", "expected"),
    [("all", False, False), ("all", True, True), ("release", False, True), ("release", True, True)],
)
def test_when_a_release_is_unconditional(role: Any, accounted: bool, expected: bool) -> None:
    release = ChannelRelease(1, 1, 1, 1.0, 1.0, 0.0, 1.0, False, role, accounted)
    assert release.unconditional is expected


@pytest.mark.parametrize(
    ("position", "changes"),
    [
        (0, {"round": [-1, 1.5, True, None], "update_norm": [0.0, math.inf], "noise_multiplier": [-1.0, math.nan]}),
        (0, {"weight": [-0.1, math.nan]}),
        (1, {"steps": [0, 1.5, True], "sampling_probability": [0.0, 1.1, math.nan], "noise_multiplier": [-1.0]}),
        (2, {"noise_multiplier": [math.inf, -1.0], "sensitivity": [0.0, -1.0, math.nan]}),
        (3, {"rows": [0, 2.5], "patients": [0, "9"], "sensitivity": [0.0], "latent_noise": [-1.0, math.nan]}),
        (3, {"observation_noise": [-1.0], "decoder_lipschitz": [0.0], "role": ["fit", None]}),
        (3, {"all_coordinates_noised": ["false", 1], "networks_accounted": ["no", 0]}),
    ],
)
def test_values_that_no_mechanism_has_are_refused(position: int, changes: dict[str, list[Any]]) -> None:
    for name, values in changes.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                event_from_json({**event_to_json(EXAMPLES[position]), name: value})
