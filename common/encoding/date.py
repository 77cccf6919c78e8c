"""Dates: whole days since 1970-01-01 between the declared first and last day."""

from __future__ import annotations

from common.encoding.integer import IntegerEncoding


class DateEncoding(IntegerEncoding):
    """An integer column whose unit is the day."""
