from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import StudyError
from common.privacy.accountant import account
from common.privacy.anchor import MARGINALS_SHARE, anchor_event, anchor_events
from common.privacy.gaussian import composed_noise_multiplier, gaussian_epsilon
from tests.common.anchor.anchored import protocol


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 20), st.sampled_from([1e-5, 1e-6, 1e-4]))
def test_both_messages_together_spend_what_the_study_says(epsilon: float, delta: float) -> None:
    """By the analytic Gaussian mechanism, and by the accountant that the ledger uses (replace-one)."""
    study = protocol(epsilon, privacy={"delta": delta}).study
    events = anchor_events(study)
    composed = composed_noise_multiplier([(event.noise_multiplier, 1) for event in events])
    assert gaussian_epsilon(delta, composed) == pytest.approx(epsilon, rel=1e-6)
    found = account(list(events), delta).epsilon
    assert found <= epsilon and found == pytest.approx(epsilon, rel=1e-5)


def test_the_split_is_the_documented_constant() -> None:
    first, second = anchor_events(protocol(3.0).study)
    ratio = second.noise_multiplier**2 / first.noise_multiplier**2
    assert ratio == pytest.approx(MARGINALS_SHARE / (1 - MARGINALS_SHARE))
    assert math.isclose(first.sensitivity, 1.0) and first.round != second.round


def test_the_ledger_keeps_them_apart_from_rounds_release_and_evaluation() -> None:
    study = protocol(3.0, rounds=7, evaluation={"method": "accounted"}).study
    from common.privacy.evaluation_release import evaluation_round

    numbers = [event.round for event in anchor_events(study)]
    assert len({*range(1, 9), evaluation_round(study), *numbers}) == 8 + 1 + 2


def test_a_study_without_anchor_spends_nothing_on_it() -> None:
    study = protocol(None, rounds=3).study
    assert anchor_events(study) == ()
    with pytest.raises(StudyError, match="no anchor"):
        anchor_event(study, "moments")
