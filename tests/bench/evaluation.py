"""Seconds that every part of an evaluation takes, on as many synthetic and real rows as asked for."""

from __future__ import annotations

import argparse
import time

import numpy as np

from common.encoding.number import from_unit, to_unit
from common.evaluation.metrics import evaluate
from common.table import Table, read_table
from tests.bench.inputs import load_inputs

JITTER = 0.05  # standard deviation of the noise on a number's unit scale


def run(arguments: argparse.Namespace) -> None:
    inputs = load_inputs(arguments.data)
    rng = np.random.default_rng(0)
    if arguments.cohort:
        synthetic, _ = read_table(arguments.cohort, inputs.schema)
        source = str(arguments.cohort)
    else:
        synthetic, source = _noisy(inputs.test, arguments.rows, rng), "noisy copies of test rows"
    synthetic, real = (_drawn(table, arguments.rows, rng) for table in (synthetic, inputs.pooled))
    print(f"{len(synthetic)} synthetic rows ({source}), {len(real)} real ones, {len(inputs.test)} held out,", end=" ")
    print(f"{len(inputs.schema.columns)} columns")
    if len(inputs.pooled) < arguments.rows:
        print(f"real rows drawn with replacement from {len(inputs.pooled)}: their times mean something, no score does")
    started = time.perf_counter()
    found = evaluate(
        synthetic,
        real,
        inputs.test,
        0,
        groups=arguments.groups,
        on_part=lambda part, seconds: print(f"{part:<15}{seconds:8.1f} s", flush=True),
    )
    print(f"{'everything':<15}{time.perf_counter() - started:8.1f} s")
    for part, rows in found["sampled"].items():
        print(f"{part} looked at some of the rows: {rows}")


def _drawn(table: Table, rows: int, rng: np.random.Generator) -> Table:
    return Table(table.schema, table.values[rng.choice(len(table), rows, replace=rows > len(table))])


def _noisy(table: Table, rows: int, rng: np.random.Generator) -> Table:
    drawn = _drawn(table, rows, rng)
    for j, column in enumerate(table.schema.columns):
        if column.is_numeric:
            unit = to_unit(drawn.values[:, j], column) + rng.normal(0, JITTER, rows)
            values = from_unit(unit, column)
            drawn.values[:, j] = values if column.kind == "number" else np.round(values)
    return drawn
