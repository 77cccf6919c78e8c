"""What a training step costs, with and without the spectral projection, in one process on one thread."""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time

import torch

from client.trainers.base import RoundInputs
from client.trainers.local import train_locally
from common.encoding import TableEncoding
from server.checkpoint import build_decoder
from tests.bench.inputs import load_inputs, protocol_for


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    inputs = load_inputs(arguments.data)
    protocol = protocol_for(arguments.data, arguments.overrides)
    encoding = TableEncoding(protocol.schema)
    data = encoding.encode(inputs.pooled)
    start = build_decoder(protocol, 0).arrays()
    round_inputs = RoundInputs(protocol.study, encoding, data, start, 1, {}, 0, torch.device("cpu"))
    timings: dict[bool, list[float]] = {True: [], False: []}
    train_locally(round_inputs, constrained=True)
    # In turn, so that a drift of the machine's speed hits both alike.
    steps = 0
    for _ in range(3):
        for constrained in (True, False):
            started = time.perf_counter()
            steps = train_locally(round_inputs, constrained=constrained).steps
            timings[constrained].append((time.perf_counter() - started) / steps * 1e3)
    with_projection, without = (sorted(timings[kind])[1] for kind in (True, False))
    print(f"{steps} steps of {protocol.study.training.batch_size} rows, {encoding.input_width} inputs")
    print(
        f"constrained {with_projection:.2f} ms a step, unconstrained {without:.2f} ms: {with_projection / without:.2f}x"
    )
    profile = cProfile.Profile()
    profile.runcall(train_locally, round_inputs, constrained=True)
    pstats.Stats(profile).sort_stats("tottime").print_stats(12)
