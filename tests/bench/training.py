"""What a training step costs, with and without the spectral projection, in one process on one thread."""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time

import torch

from client.trainers.base import RoundInputs
from common.encoding import TableEncoding
from common.model import lipschitz
from common.model.training import train_locally
from server.checkpoint import build_decoder
from tests.bench.inputs import load_inputs, protocol_for

# label: constrained, retreat of the fast projection
VARIANTS = {"constrained": (True, lipschitz.RETREAT), "nearest point": (True, 0.0), "unconstrained": (False, 0.0)}


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    inputs = load_inputs(arguments.data)
    protocol = protocol_for(arguments.data, arguments.overrides)
    encoding = TableEncoding(protocol.schema)
    data = encoding.encode(inputs.pooled)
    start = build_decoder(protocol, 0).arrays()
    round_inputs = RoundInputs(protocol.study, encoding, data, start, 1, {}, 0, torch.device("cpu"))
    train_locally(round_inputs, constrained=True)
    timings: dict[str, list[float]] = {label: [] for label in VARIANTS}
    decompositions: dict[str, int] = {}
    steps = 0
    # In turn, so that a drift of the machine's speed hits all alike.
    for _ in range(3):
        for label, (constrained, retreat) in VARIANTS.items():
            with _CountedDecompositions(retreat) as counted:
                started = time.perf_counter()
                steps = train_locally(round_inputs, constrained=constrained).steps
                timings[label].append((time.perf_counter() - started) / steps * 1e3)
            decompositions[label] = counted.calls
    print(f"{steps} steps of {protocol.study.training.batch_size} rows, {encoding.input_width} inputs, round 1")
    for label, values in timings.items():
        ratio = statistics.median(values) / statistics.median(timings["unconstrained"])
        print(
            f"  {label}: {statistics.median(values):.2f} ms a step, {ratio:.2f}x unconstrained,"
            f" {decompositions[label] / steps:.2f} eigendecompositions a step"
        )
    profile = cProfile.Profile()
    profile.runcall(train_locally, round_inputs, constrained=True)
    pstats.Stats(profile).sort_stats("tottime").print_stats(12)


class _CountedDecompositions:
    """Counts eigendecompositions, and sets how far the fast projection retreats, inside a `with` block."""

    def __init__(self, retreat: float) -> None:
        self.retreat = retreat
        self.calls = 0

    def __enter__(self) -> _CountedDecompositions:
        self._eigh, self._retreat = torch.linalg.eigh, lipschitz.RETREAT

        def counted(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            self.calls += 1
            return self._eigh(matrix)

        torch.linalg.eigh = counted
        lipschitz.RETREAT = self.retreat
        return self

    def __exit__(self, *_: object) -> None:
        torch.linalg.eigh, lipschitz.RETREAT = self._eigh, self._retreat
