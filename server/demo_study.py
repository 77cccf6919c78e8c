"""`cohortium demo`: lay out the OPT trial as four hospitals, with the study the README shows."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.study import Protocol, load_protocol
from server.demo_data import write_demo_sites

STUDY_PATH = Path(__file__).with_name("demo") / "study.toml"


@dataclass(frozen=True)
class DemoRun:
    """Where the demo's inputs lie while it runs."""

    protocol: Protocol
    sites: Path
    test: Path


@contextmanager
def prepare_demo(overrides: Iterable[str] = ()) -> Iterator[DemoRun]:
    """Write the sites, the held-out patients and the schema into a temporary folder, removed afterwards."""
    protocol = load_protocol(STUDY_PATH, overrides)
    with tempfile.TemporaryDirectory(prefix="cohortium-demo-") as folder:
        directory = Path(folder)
        write_demo_sites(directory)
        yield DemoRun(protocol, directory / "sites", directory / "test.csv")
