import datetime
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from common.encoding import encode_column
from common.encoding.date import DateEncoding
from common.schema import Column, parse_schema

LAST = float(np.nextafter(1.0, 0.0))
EPOCH = datetime.date(1970, 1, 1)


def date_column(first: datetime.date, last: datetime.date, required: bool = False) -> Column:
    constraints = {"minimum": first.isoformat(), "maximum": last.isoformat(), "required": required}
    return parse_schema({"fields": [{"name": "d", "type": "date", "constraints": constraints}]}).columns[0]


@settings(max_examples=60, deadline=None)
@given(
    st.dates(datetime.date(1850, 1, 1), datetime.date(2100, 1, 1)),
    st.integers(1, 60_000),
    st.lists(st.floats(0, 1), min_size=1, max_size=10),
    st.floats(0, LAST),
)
def test_every_decoded_date_is_a_day_inside_the_bounds(
    first: datetime.date, days: int, shares: list[float], uniform: float
) -> None:
    last = first + datetime.timedelta(days=days)
    encoding = encode_column(date_column(first, last))
    assert isinstance(encoding, DateEncoding)
    start = (first - EPOCH).days
    values = np.array([*(start + math.floor(share * days) for share in shares), start, start + days, math.nan])
    decoded = encoding.decode(encoding.levels(values), np.full(len(values), uniform))
    assert math.isnan(decoded[-1])
    # At most 200 levels: one bin is at most a two-hundredth of the range and a day wider.
    assert (np.abs(decoded - values)[:-1] <= days / 200 + 1).all()
    for day in decoded[:-1]:
        assert day == int(day) and first <= EPOCH + datetime.timedelta(days=int(day)) <= last
    if days < 200:
        np.testing.assert_array_equal(decoded, values)


def test_the_extreme_uniform_stays_on_the_last_day() -> None:
    first, last = datetime.date(1900, 1, 1), datetime.date(2099, 12, 31)
    encoding = encode_column(date_column(first, last, required=True))
    levels = np.array([[0], [encoding.blocks[0].size - 1]])
    decoded = encoding.decode(levels, np.array([0.0, LAST]))
    assert [EPOCH + datetime.timedelta(days=int(day)) for day in decoded] == [first, last]
