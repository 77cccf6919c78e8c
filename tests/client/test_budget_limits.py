"""ε of one study and of one year: what counts, by which clock, and what is refused with which numbers."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import client.budget
import common.privacy.ledger
from client.budget import YEAR, studies_of_the_year
from common.messages import JoinReply, Status
from common.privacy.events import GaussianUpdate
from common.privacy.ledger_entries import Entry
from common.study import Protocol
from tests.client.hospital import PROTOCOL, ROUNDS, Hospital, join_request, train_request
from tests.client.test_budget import ONE, TWO, noisy

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
ROOM = (ONE + TWO) / 2  # for one study, not for two


class Clock:
    """The machine's clock, as the ledger and the budget read it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = NOW
        monkeypatch.setattr(client.budget, "clock", lambda: self.now)
        monkeypatch.setattr(common.privacy.ledger, "_now", lambda: self.now.isoformat(timespec="seconds"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def run(hospital: Hospital, protocol: Protocol) -> None:
    hospital.joined(protocol)
    for number in range(1, ROUNDS + 1):
        assert hospital.train(train_request(number, protocol), protocol).status is Status.OK


def refused(hospital: Hospital, protocol: Protocol) -> str:
    assert hospital.join(join_request(protocol)) == JoinReply(Status.REFUSED_BY_POLICY, "anna")
    return hospital.reason(Status.REFUSED_BY_POLICY)


@pytest.mark.parametrize("key", ["max_epsilon_per_study", "max_epsilon_per_year"])
def test_a_study_that_alone_would_exceed_a_limit_is_refused(tmp_path: Path, key: str) -> None:
    tight = Hospital(tmp_path / "anna", f"{key} = {ONE * 0.999}")
    reason = refused(tight, noisy())
    assert reason.startswith(key) and f"would reach epsilon = {ONE:.4g}" in reason and f"{ONE * 0.999:.4g}" in reason
    assert "infinity" in refused(tight, PROTOCOL) and tight.spends() == []
    run(Hospital(tmp_path / "berta", f"{key} = {ONE * 1.001}"), noisy())


def test_the_limit_of_a_study_lets_other_studies_run(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path / "anna", f"max_epsilon_per_study = {ONE * 1.001}")
    run(hospital, noisy("first"))
    run(hospital, noisy("second"))
    assert refused(hospital, noisy("long", rounds=2 * ROUNDS)).startswith("max_epsilon_per_study (this study alone)")


def test_a_limit_that_became_stricter_holds_for_the_next_round(hospital: Hospital) -> None:
    protocol = noisy()
    assert hospital.joined(protocol).train(train_request(1, protocol), protocol).status is Status.OK
    for key in ("max_epsilon_per_study", "max_epsilon_per_year"):
        policy = hospital.config.policy.model_copy(update={key: ONE * 0.999})
        stricter = hospital.config.model_copy(update={"policy": policy})
        before, hospital.config = hospital.config, stricter
        assert hospital.train(train_request(2, protocol), protocol).status is Status.REFUSED_BY_POLICY
        hospital.config = before
    assert len(hospital.spends()) == 1


def test_a_year_later_the_budget_of_the_year_is_free_again(tmp_path: Path, clock: Clock) -> None:
    hospital = Hospital(tmp_path / "anna", f"max_epsilon_per_year = {ROOM}")
    run(hospital, noisy("first"))
    second = noisy("second")
    reason = refused(hospital, second)
    assert reason.startswith("max_epsilon_per_year (with all studies of the last 365 days)")
    assert f"would reach epsilon = {TWO:.4g}" in reason and f"spent so far: {ONE:.4g}" in reason
    clock.now = NOW + YEAR
    assert f"{TWO:.4g}" in refused(hospital, second)
    clock.now = NOW + YEAR + timedelta(seconds=1)
    run(hospital, second)


def test_a_study_in_the_middle_counts_whole(tmp_path: Path, clock: Clock) -> None:
    """Its first spend is older than a year, its second is not."""
    hospital = Hospital(tmp_path / "anna", f"max_epsilon_per_year = {ROOM}")
    first = noisy("first")
    assert hospital.joined(first).train(train_request(1, first), first).status is Status.OK
    clock.now += timedelta(days=200)
    for number in (2, 3):
        assert hospital.train(train_request(number, first), first).status is Status.OK
    clock.now += timedelta(days=200)
    assert f"would reach epsilon = {TWO:.4g}" in refused(hospital, noisy("second"))
    clock.now += timedelta(days=200)
    hospital.joined(noisy("second"))


@pytest.mark.parametrize("back", [timedelta(days=400), timedelta(days=20_000)])
def test_a_clock_that_went_backwards_opens_no_hole(tmp_path: Path, clock: Clock, back: timedelta) -> None:
    hospital = Hospital(tmp_path / "anna", f"max_epsilon_per_year = {ROOM}")
    first = noisy("first")
    assert hospital.joined(first).train(train_request(1, first), first).status is Status.OK
    clock.now = NOW - back
    for number in (2, 3):  # dated long ago, after an entry of today
        assert hospital.train(train_request(number, first), first).status is Status.OK
    assert f"{TWO:.4g}" in refused(hospital, noisy("second"))
    clock.now = NOW
    assert f"{TWO:.4g}" in refused(hospital, noisy("second"))


def entry(sequence: int, study: str, recorded_at: str) -> Entry:
    return Entry(sequence, study, sequence, GaussianUpdate(sequence, 1.0, 1.0, 1.0), "", recorded_at, "", "", "")


days = st.integers(-2000, 2000)


@given(st.lists(st.tuples(st.sampled_from("abc"), days), max_size=12), days)
def test_an_entry_is_as_young_as_the_youngest_before_it(dated: list[tuple[str, int]], today: int) -> None:
    entries = [entry(i, study, (NOW + timedelta(days=day)).isoformat()) for i, (study, day) in enumerate(dated)]
    found = studies_of_the_year(entries, NOW + timedelta(days=today))
    expected = {study for i, (study, _) in enumerate(dated) if max(day for _, day in dated[: i + 1]) >= today - 365}
    assert found == expected
    # What the dates alone call recent is always counted, and setting the clock back never counts less.
    assert {study for study, day in dated if day >= today - 365} <= found
    assert found <= studies_of_the_year(entries, NOW + timedelta(days=today - 100))


@pytest.mark.parametrize("text", ["", "yesterday", "2026-13-45", "2026-11-22T11:00:00"])
def test_a_date_that_cannot_be_read_counts_as_young(text: str) -> None:
    assert studies_of_the_year([entry(1, "a", text)], NOW) == {"a"}
