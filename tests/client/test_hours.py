"""Opening hours: the parser, the clock on the wall, and a site that is closed."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

import client.admission
from client.hours import is_open, parse_hours
from client.site import load_site
from common.errors import SiteError
from common.messages import JoinReply, ReleaseReply, Status, TrainReply
from tests.client.hospital import PROTOCOL, Hospital, join_request, release_request, train_request

BERLIN = ZoneInfo("Europe/Berlin")
NAMES = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MONDAY = datetime(2026, 11, 23, tzinfo=UTC)


@given(
    st.integers(0, 6),
    st.integers(0, 6),
    st.integers(0, 1439),
    st.integers(1, 1440),
    st.integers(0, 7 * 1440 - 1),
    st.booleans(),
)
def test_hours_are_open_exactly_from_start_to_end(
    first: int, last: int, start: int, end: int, minute: int, lower: bool
) -> None:
    if start == end:
        end = start + 1
    text = f"{NAMES[first]}-{NAMES[last]} {start // 60:02}:{start % 60:02}-{end // 60:02}:{end % 60:02}"
    days, day = set[int](), first
    while True:
        days.add(day)
        if day == last:
            break
        day = (day + 1) % 7
    today, clock = divmod(minute, 1440)
    if end > start:
        expected = today in days and start <= clock < end
    else:  # over midnight
        expected = (today in days and clock >= start) or ((today - 1) % 7 in days and clock < end)
    moment = MONDAY + timedelta(minutes=minute, seconds=59)
    assert is_open((text.lower() if lower else text,), moment, ZoneInfo("UTC")) is expected


@given(st.text(max_size=30) | st.text(alphabet="MonFri-0123456789: ,", max_size=24))
def test_any_text_is_hours_or_a_clear_error(text: str) -> None:
    try:
        intervals = parse_hours(text)
    except ValueError as error:
        assert repr(text) in str(error)
    else:
        assert intervals and all(0 <= start < 7 * 1440 and 0 < length <= 1440 for start, length in intervals)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("always", "is not days and hours"),
        ("Mon-Fri", "is not days and hours"),
        ("Mon-Fri 8:00-18:00", "is not days and hours"),
        ("Mon 08:00 18:00", "is not days and hours"),
        ("Montag 08:00-18:00", "unknown day"),
        ("Mon-Fry 08:00-18:00", "unknown day"),
        ("Mon, 08:00-18:00", "unknown day"),
        ("Mon 24:00-08:00", "no time of day"),
        ("Mon 08:00-24:01", "no time of day"),
        ("Mon 08:60-10:00", "no time of day"),
        ("Mon 08:00-08:00", "is empty"),
    ],
)
def test_what_is_not_hours_is_named(tmp_path: Path, entry: str, expected: str) -> None:
    with pytest.raises(SiteError, match=r"\[policy\] opening_hours") as caught:
        hospital_with(tmp_path, f'opening_hours = ["Sat 10:00-12:00", "{entry}"]\ntimezone = "UTC"')
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ('opening_hours = ["Mon 08:00-18:00"]', "go together"),
        ('timezone = "UTC"', "go together"),
        ('opening_hours = ["Mon 08:00-18:00"]\ntimezone = "Europe/Bonn"', "is no time zone"),
        ('opening_hours = ["Mon 08:00-18:00"]\ntimezone = "../../etc/passwd"', "is no time zone"),
        ('opening_hours = ["Mon 08:00-18:00"]\ntimezone = ""', "is no time zone"),
    ],
)
def test_hours_need_their_time_zone(tmp_path: Path, policy: str, expected: str) -> None:
    with pytest.raises(SiteError) as caught:
        hospital_with(tmp_path, policy)
    assert expected in str(caught.value)


def hospital_with(folder: Path, policy: str) -> Hospital:
    return Hospital(folder / "anna", policy)


def test_the_clock_on_the_wall_counts_in_summer_and_winter() -> None:
    hours = ("Mon-Fri 08:00-18:00", "Sat 10:00-12:00")
    for moment, expected in (
        (datetime(2026, 7, 1, 5, 59, tzinfo=UTC), False),
        (datetime(2026, 7, 1, 6, 0, tzinfo=UTC), True),  # 08:00 in summer
        (datetime(2026, 12, 1, 6, 59, tzinfo=UTC), False),
        (datetime(2026, 12, 1, 7, 0, tzinfo=UTC), True),  # 08:00 in winter
        (datetime(2026, 12, 1, 17, 0, tzinfo=UTC), False),
        (datetime(2026, 12, 5, 10, 30, tzinfo=UTC), True),  # a Saturday
        (datetime(2026, 12, 6, 10, 30, tzinfo=UTC), False),
    ):
        assert is_open(hours, moment, BERLIN) is expected


def test_a_closed_site_says_so_to_every_message_and_opens_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital = hospital_with(tmp_path, 'opening_hours = ["Mon-Fri 08:00-18:00"]\ntimezone = "Europe/Berlin"')
    now = [datetime(2026, 11, 22, 12, tzinfo=UTC)]  # a Sunday
    monkeypatch.setattr(client.admission, "clock", lambda: now[0])
    assert hospital.join(join_request()) == JoinReply(Status.CLOSED_NOW, "anna")
    assert hospital.reason(Status.CLOSED_NOW) == "outside opening_hours = Mon-Fri 08:00-18:00 (Europe/Berlin)"
    assert not (hospital.state / "studies").exists()
    now[0] = datetime(2026, 11, 23, 12, tzinfo=UTC)
    assert hospital.joined().train(train_request(1)).status is Status.OK
    now[0] = datetime(2026, 11, 23, 17, tzinfo=UTC)
    assert hospital.train(train_request(2)) == TrainReply(Status.CLOSED_NOW, "anna", PROTOCOL.digest, 2)
    assert hospital.train(train_request(1)).status is Status.CLOSED_NOW  # not even what was answered before
    closed = ReleaseReply(Status.CLOSED_NOW, "anna", PROTOCOL.digest)
    assert hospital.release(release_request(PROTOCOL, 5), PROTOCOL, 5) == closed
    assert [number for number, _ in hospital.spends()] == [1]
    now[0] = datetime(2026, 11, 24, 7, tzinfo=UTC)
    assert hospital.train(train_request(2)).status is Status.OK


def test_without_hours_a_site_is_always_open(tmp_path: Path) -> None:
    policy = load_site(hospital_with(tmp_path, "").folder / "site.toml").policy
    assert all(policy.open_at(MONDAY + timedelta(hours=hour)) for hour in range(7 * 24))
