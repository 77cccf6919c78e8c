"""Where a simulation read its patients, so that its release can be attempted again: paths and digests, never a row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.digest import sha256_of_file
from common.errors import DataError, UsageError
from common.files import write_atomic
from common.gates import read_gates
from common.study import Protocol
from common.table import Table, read_table
from server.demo_study import prepare_demo
from server.run import RunFiles
from server.simulation import SimulationResult, load_sites

NAME_THEM = "name the directory with the sites' files again with --sites"


@dataclass(frozen=True)
class RunInputs:
    """The sites' directory and the held-out patients; those of the demo are made anew."""

    sites: Path
    test: Path | None
    demo: bool = False

    def save(self, files: RunFiles) -> None:
        """Write inputs.json, with the SHA-256 of every site's file."""
        digests = {path.stem: sha256_of_file(path) for path in sorted(self.sites.glob("*.csv"))}
        where = {"sites": None, "test": None} if self.demo else {"sites": str(self.sites), "test": self._test()}
        write_atomic(files.inputs, json.dumps({"demo": self.demo, **where, "sha256": digests}, indent=1))

    def _test(self) -> str | None:
        return None if self.test is None else str(self.test)


@contextmanager
def finished_simulation(
    files: RunFiles, sites: Path | None, test: Path | None
) -> Iterator[tuple[SimulationResult, Table | None]]:
    """A finished simulation and its held-out patients as `release_simulation` takes them, read anew.

    `sites` and `test` take the place of what inputs.json names. `UsageError` if this is not such a run, `DataError` if
    the sites' files are not there any more or are not those it ran on.
    """
    protocol = _protocol(files)
    document = _document(files)
    with _inputs(document, sites, test) as found:
        tables = load_sites(found.sites, protocol)
        changed = [
            name
            for name, digest in document.get("sha256", {}).items()
            if name not in tables or sha256_of_file(found.sites / f"{name}.csv") != digest
        ]
        if changed:
            raise DataError(
                f"{found.sites}: {', '.join(changed)} changed or went since the simulation ran on it",
                fix="put the files back, or run the simulation again",
            )
        held_out = read_table(found.test, protocol.schema)[0] if found.test else None
        real = Table(protocol.schema, np.vstack([table.values for table in tables.values()]))
        patients = {name: len(table) for name, table in tables.items()}
        yield SimulationResult(protocol, files, real, {}, patients), held_out


@contextmanager
def _inputs(document: dict[str, Any], sites: Path | None, test: Path | None) -> Iterator[RunInputs]:
    if document.get("demo") and sites is None:
        with prepare_demo() as made:
            yield RunInputs(made.sites, test or made.test, demo=True)
        return
    where = sites or (Path(document["sites"]) if document.get("sites") else None)
    if where is None:
        raise UsageError("where the sites' files are is not on record", fix=NAME_THEM)
    if not where.is_dir():
        raise DataError(f"{where}: not there any more", fix=NAME_THEM)
    known = Path(document["test"]) if document.get("test") else None
    yield RunInputs(where, test or known)


def _document(files: RunFiles) -> dict[str, Any]:
    try:
        return dict(json.loads(files.inputs.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError):
        raise UsageError(f"{files.inputs}: cannot be read", fix="remove it, and " + NAME_THEM) from None


def _protocol(files: RunFiles) -> Protocol:
    try:
        return Protocol.from_json(json.loads(files.study.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError):
        raise UsageError(
            f"{files.out}: not the folder of a run", fix="name the --out of `cohortium simulate`"
        ) from None


def former_metrics(files: RunFiles) -> dict[str, Any] | None:
    """What an earlier attempt measured on this very cohort, if it did; it need not be measured again."""
    for folder in (files.quarantine, files.out):
        try:
            gates = read_gates(json.loads((folder / files.gates.name).read_bytes()))
            if gates.cohort_sha256 == sha256_of_file(folder / files.cohort_csv.name):
                return dict(json.loads((folder / files.metrics.name).read_bytes()))
        except (OSError, ValueError):
            continue
    return None
