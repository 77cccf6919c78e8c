"""Opening hours: when this site answers, in its own time zone."""

from __future__ import annotations

import re
from datetime import datetime
from zoneinfo import ZoneInfo

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY = 24 * 60
WEEK = 7 * DAY
EXAMPLE = '"Mon-Fri 08:00-18:00"'
_ENTRY = re.compile(r"\s*(\S+)\s+(\d\d):(\d\d)\s*-\s*(\d\d):(\d\d)\s*", re.ASCII)


def parse_hours(text: str) -> tuple[tuple[int, int], ...]:
    """Intervals (start, length) in minutes of the week from Monday 00:00; `ValueError` saying what is wrong.

    An end at or before its start lies on the next day, so "Fri 22:00-06:00" ends on Saturday morning.
    """
    found = _ENTRY.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not days and hours; write for example {EXAMPLE}")
    days, *numbers = found.groups()
    hour, minute, last_hour, last_minute = map(int, numbers)
    start, end = hour * 60 + minute, last_hour * 60 + last_minute
    if start >= DAY or end > DAY or max(minute, last_minute) > 59:
        raise ValueError(f"{text!r} names no time of day; hours run from 00:00 to 24:00")
    if start == end:
        raise ValueError(f"{text!r} is empty; write 00:00-24:00 for a whole day")
    length = end - start if end > start else end - start + DAY
    return tuple((day * DAY + start, length) for day in _days(days, text))


def is_open(hours: tuple[str, ...], moment: datetime, zone: ZoneInfo) -> bool:
    """Whether `moment`, which knows its time zone, falls into one of the hours by the clock on the wall of `zone`."""
    local = moment.astimezone(zone)
    minute = local.weekday() * DAY + local.hour * 60 + local.minute
    return any((minute - start) % WEEK < length for entry in hours for start, length in parse_hours(entry))


def _days(text: str, entry: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        ends = [name.lower() for name in ((first, last) if dash else (first, first))]
        if not all(name in DAYS for name in ends):
            raise ValueError(f"{entry!r} names an unknown day; days are Mon, Tue, Wed, Thu, Fri, Sat, Sun")
        start, stop = (DAYS.index(name) for name in ends)
        found += [(start + step) % 7 for step in range((stop - start) % 7 + 1)]
    return found
