import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.privacy.events import EVENTS, BoundedInfluence, Event, UnboundedInfluence, event_from_json, event_to_json

finite = st.floats(allow_nan=False, allow_infinity=False)
events: st.SearchStrategy[Event] = st.one_of(
    st.builds(BoundedInfluence, st.integers(1, 10**6), finite, finite),
    st.builds(UnboundedInfluence, st.integers(1, 10**6), finite),
)


@given(events)
def test_round_trip_through_json_text(event: Event) -> None:
    document = json.loads(json.dumps(event_to_json(event), allow_nan=False))
    assert event_from_json(document) == event and type(event_from_json(document)) is type(event)


def test_an_event_documents_itself_completely() -> None:
    assert event_to_json(BoundedInfluence(3, 0.5, 0.25)) == {
        "type": "BoundedInfluence",
        "round": 3,
        "update_norm": 0.5,
        "weight": 0.25,
    }
    assert event_to_json(UnboundedInfluence(1, 1.0)) == {"type": "UnboundedInfluence", "round": 1, "weight": 1.0}


@pytest.mark.parametrize("event", [BoundedInfluence(1, 1.0, 0.5), UnboundedInfluence(1, 0.5)])
def test_events_are_frozen_and_registered_under_their_type(event: Event) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.round = 2  # type: ignore[misc]
    assert EVENTS[event.type] is type(event) and event.type == type(event).__name__


@pytest.mark.parametrize("document", [{}, {"type": "Gaussian", "round": 1}, {"type": None}])
def test_unknown_types_are_refused_by_name(document: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"unknown privacy event .*; known: .*BoundedInfluence.*UnboundedInfluence"):
        event_from_json(document)


@pytest.mark.parametrize("change", [{"extra": 1}, {"weight": ...}])
def test_other_fields_are_refused(change: dict[str, Any]) -> None:
    document = {**event_to_json(BoundedInfluence(1, 1.0, 0.5)), **change}
    document = {key: value for key, value in document.items() if value is not ...}
    with pytest.raises(TypeError):
        event_from_json(document)
