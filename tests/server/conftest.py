import json
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore.task_identity import TaskIdentity

import server.compare
from server.compare import (
    Inputs,
    run_comparison,
)
from server.compare_records import Comparison
from tests.server.comparison import PATIENTS, SCHEMA, STUDY, Compare, Runs, csv, plan
from tests.server.federation import Federation


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "study.toml").write_text(STUDY)
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "sites").mkdir()
    for number, (site, rows) in enumerate(PATIENTS.items()):
        (tmp_path / "sites" / f"{site}.csv").write_text(csv(rows, number))
    (tmp_path / "test.csv").write_text(csv(30, 9))
    return tmp_path


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    found = Runs()
    monkeypatch.setattr(server.compare, "simulate", found.simulate)
    monkeypatch.setattr(server.compare, "release_simulation", found.release)
    return found


@pytest.fixture
def compare(folder: Path, runs: Runs) -> Compare:
    def run(text: str = "", test: bool = True, **options: Any) -> Comparison:
        found = plan(folder, text, **options)
        inputs = Inputs.read(found, folder / "sites", folder / "test.csv" if test else None)
        return run_comparison(found, inputs, folder / "out", quiet=True)

    return run


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower stamps every message with the task it was made in."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def federation() -> Federation:
    return Federation()
