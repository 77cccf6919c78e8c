"""What all sites sent together, and how far a generator's rows are from it: the only thing the coordinator knows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from common.anchor.cells import TableCells
from common.anchor.features import FeatureMap
from common.anchor.marginals import MarginalStatistics
from common.anchor.moments import moment_sensitivity, moment_vector, unpack
from common.errors import OutputError
from common.files import write_atomic
from common.privacy.anchor import STEPS, Step, anchor_event
from common.study import Protocol
from server.anchor.repair import repair_marginals, repair_moments

# A declared range of which this share of bins holds `WIDE_MASS` of the noised patients is too wide to say much.
WIDE_SHARE, WIDE_MASS = 0.1, 0.95


@dataclass(frozen=True)
class Pooled:
    """The sum of one step's messages, (values,), and the patients (public numbers) of each site that sent one."""

    values: NDArray[np.float64]
    patients: Mapping[str, int]

    @property
    def total(self) -> int:
        """Patients behind the sum."""
        return sum(self.patients.values())


class Statistics:
    """Both steps of a study. What is made of the first is fixed once it is there, since sites encode with it."""

    def __init__(self, protocol: Protocol, first: Pooled, second: Pooled | None = None) -> None:
        self.protocol, self.first, self.second = protocol, first, second
        self.cells = TableCells(protocol.schema, protocol.target)
        self.counts = MarginalStatistics(self.cells)

    def noise(self, step: Step) -> float:
        """Standard deviation in every value of a step's sum: every site added its own noise."""
        pooled, sensitivity = self._of(step)
        multiplier = anchor_event(self.protocol.study, step).noise_multiplier
        return multiplier * sensitivity * math.sqrt(len(pooled.patients))

    @cached_property
    def marginals(self) -> list[NDArray[np.float64]]:
        """Probabilities of every column's cells."""
        return repair_marginals(self.counts, self.first.values, self.noise("marginals"), self.first.total)

    @cached_property
    def features(self) -> FeatureMap:
        """How rows are encoded for the second step."""
        return FeatureMap(self.cells, self.marginals)

    @cached_property
    def moments(self) -> NDArray[np.float64]:
        """Mean second moments (features, features), shrunk."""
        pooled, _ = self._of("moments")
        matrix = unpack(pooled.values, self.features.size)
        # Half the variance off the diagonal, where the vector holds √2 times the entry.
        return repair_moments(self.features, matrix, self.noise("moments") / math.sqrt(2.0), pooled.total)

    def distance(self, levels: NDArray[np.int64]) -> float:
        """How far encoded rows (rows, blocks) are from the noised statistics, per patient and in units of sensitivity.

        The root of ‖v₁ − w₁‖²/Δ₁² + ‖v₂ − w₂‖²/Δ₂² less what noise alone adds to it, at least 0: an unbiased
        comparison of generators, since the noise in w is the same for all.
        """
        found = 0.0
        vectors = (self.counts.vector(levels), moment_vector(self.features, levels))
        for step, vector in zip(STEPS, vectors, strict=True):
            pooled, sensitivity = self._of(step)
            noise = self.noise(step) / pooled.total
            squared = float(np.square(vector / len(levels) - pooled.values / pooled.total).sum())
            found += (squared - len(vector) * noise**2) / sensitivity**2
        return math.sqrt(max(found, 0.0))

    def wide_columns(self) -> list[str]:
        """Numeric columns whose declared range is mostly empty, as far as the noised counts say."""
        found = []
        for column, marginal in zip(self.cells.columns, self.marginals, strict=True):
            known = np.sort(marginal[: column.known])[::-1]
            if column.numeric and column.known > 1 / WIDE_SHARE:
                fullest = known[: max(1, int(WIDE_SHARE * column.known))].sum()
                if fullest >= WIDE_MASS * known.sum():
                    found.append(column.name)
        return found

    def _of(self, step: Step) -> tuple[Pooled, float]:
        if step == "marginals":
            return self.first, self.counts.sensitivity
        if self.second is None:
            raise ValueError("the second step has not been answered")
        return self.second, moment_sensitivity(self.features.radius)

    def save(self, path: Path) -> None:
        """Write durably what the sites sent."""
        steps = {"first": self.first} | ({"second": self.second} if self.second else {})
        header = {"study": self.protocol.digest, "patients": {name: dict(p.patients) for name, p in steps.items()}}
        arrays = {name: pooled.values for name, pooled in steps.items()}
        write_atomic(path, save(arrays, metadata={"cohortium": json.dumps(header)}))


def load_statistics(path: Path, protocol: Protocol) -> Statistics | None:
    """What `save` wrote, None if there is nothing; `OutputError` if it is damaged or of another study."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            header = json.loads((file.metadata() or {})["cohortium"])
            if header["study"] != protocol.digest:
                raise KeyError("study")
            steps = {
                name: Pooled(file.get_tensor(name), {str(site): int(n) for site, n in patients.items()})
                for name, patients in header["patients"].items()
            }
        return Statistics(protocol, steps["first"], steps.get("second"))
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, OSError):
        raise OutputError(
            f"{path}: the statistics of the anchor are damaged or of another study",
            fix="restore the file; the sites answer a second time only with what they have answered before",
        ) from None
