"""The README's picture: eight columns of the demo, real patients beside the released cohort."""

from __future__ import annotations

import argparse

import numpy as np

from common.table import Table, read_table
from server.demo_study import prepare_demo
from server.figures import marginals_figure

COLUMNS = (
    "age_years",
    "bmi",
    "crp",
    "visit3_bleeding_on_probing_pct",
    "race",
    "education",
    "previous_preterm_birth",
    "preterm_birth",
)


def run(arguments: argparse.Namespace) -> None:
    with prepare_demo() as demo:
        schema = demo.protocol.schema
        sites = [read_table(path, schema)[0].values for path in sorted(demo.sites.glob("*.csv"))]
    cohort, _ = read_table(arguments.demo / "cohort.csv", schema)
    figure = marginals_figure(cohort, Table(schema, np.vstack(sites)), [schema[name] for name in COLUMNS])
    figure.savefig(arguments.png, dpi=110)
