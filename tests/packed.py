"""Arrays as messages carry them, also such as no honest party would send."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ConfigRecord
from safetensors.numpy import load, save

from common.records import CONTENT


def pack(arrays: Mapping[str, np.ndarray]) -> ConfigRecord:
    return ConfigRecord({CONTENT: save({name: np.ascontiguousarray(array) for name, array in arrays.items()})})


def unpack(record: ConfigRecord) -> dict[str, np.ndarray]:
    content: Any = record[CONTENT]
    return {name: array.copy() for name, array in load(content).items()}
