import math

import numpy as np
import pytest

from common.encoding import encode_column
from common.encoding.boolean import BooleanEncoding
from common.schema import parse_schema


@pytest.mark.parametrize("required", [True, False])
def test_round_trip(required: bool) -> None:
    field = {"name": "x", "type": "boolean", "constraints": {"required": required}}
    encoding = encode_column(parse_schema({"fields": [field]}).columns[0])
    assert isinstance(encoding, BooleanEncoding)
    values = np.array([0.0, 1.0, 1.0, 0.0] + [math.nan] * (not required))
    levels = encoding.levels(values)
    assert levels[:, 0].tolist() == [0, 1, 1, 0] + [2] * (not required)
    np.testing.assert_array_equal(encoding.decode(levels, np.full(len(values), 0.5)), values)
    assert encoding.inputs(values)[:4, :2].tolist() == [[1, 0], [0, 1], [0, 1], [1, 0]]
    assert encoding.blocks[0].size == encoding.input_width == (2 if required else 3)
    assert encoding.diameter == pytest.approx(math.sqrt(2))
