"""Synthetic rows a second on one core, and peak memory, which must not grow with the number of rows."""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import torch

from common.encoding import TableEncoding
from common.generation import sample_prior
from server.checkpoint import build_decoder
from server.cohort import write_cohort
from tests.bench.inputs import protocol_for


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    protocol = protocol_for(arguments.data, arguments.overrides)
    encoding = TableEncoding(protocol.schema)
    decoder = build_decoder(protocol, 0)
    for _ in sample_prior(decoder, encoding, 10_000, 0):
        pass
    started = time.perf_counter()
    rows = sum(len(table) for table in sample_prior(decoder, encoding, arguments.rows, 0))
    seconds = time.perf_counter() - started
    print(
        f"sampled and decoded {rows} rows of {len(encoding.columns)} columns: {rows / seconds:,.0f} rows/s on one core"
    )
    print(f"peak memory {_peak():.0f} MB")
    with tempfile.TemporaryDirectory() as scratch:
        paths = Path(scratch, "cohort.csv"), Path(scratch, "cohort.parquet")
        started = time.perf_counter()
        write_cohort(sample_prior(decoder, encoding, arguments.rows, 0), protocol.schema, *paths)
        seconds = time.perf_counter() - started
        sizes = " and ".join(f"{path.stat().st_size / 1e6:.1f} MB" for path in paths)
    print(f"with CSV and Parquet on disk ({sizes}): {rows / seconds:,.0f} rows/s, peak memory {_peak():.0f} MB")


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
