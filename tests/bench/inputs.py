"""The tables and the study that every benchmark starts from."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.schema import Schema
from common.study import Protocol, load_protocol
from common.table import Table, read_table


@dataclass(frozen=True)
class Inputs:
    """A benchmark folder, read: `schema.json`, `sites/*.csv`, `test.csv`."""

    folder: Path
    schema: Schema
    sites: dict[str, Table]
    test: Table

    @property
    def pooled(self) -> Table:
        return Table(self.schema, np.vstack([table.values for table in self.sites.values()]))


def protocol_for(folder: Path, overrides: Sequence[str]) -> Protocol:
    """The default study over the folder's schema, with overrides."""
    with tempfile.TemporaryDirectory() as scratch:
        study = write_study(folder, Path(scratch))
        return load_protocol(study, overrides)


def write_study(folder: Path, directory: Path) -> Path:
    path = directory / "study.toml"
    schema = json.dumps(str((folder / "schema.json").resolve()))
    path.write_text(f'[study]\nname = "bench {folder.name}"\nschema = {schema}\n', encoding="utf-8")
    return path


def load_inputs(folder: Path) -> Inputs:
    schema = protocol_for(folder, ()).schema
    sites = {path.stem: read_table(path, schema)[0] for path in sorted((folder / "sites").glob("*.csv"))}
    return Inputs(folder, schema, sites, read_table(folder / "test.csv", schema)[0])


def simulate(folder: Path, out: Path, overrides: Sequence[str], *, test: bool = True) -> dict[str, Any]:
    """One `cohortium simulate` as a user runs it; its `--json` summary."""
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(sys.executable).with_name("cohortium")
        command = [str(program), "simulate", str(write_study(folder, Path(scratch)))]
        command += ["--sites", str(folder / "sites"), "--out", str(out), "--json", "--quiet"]
        command += ["--test", str(folder / "test.csv")] if test else []
        for override in overrides:
            command += ["--set", override]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout)
