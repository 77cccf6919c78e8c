"""What the coordinator states of a deployment without the ledgers, and the bundle that stands for its code."""

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest

import server.app
from client.trainers import MODES
from common.privacy.channel_release import fit_patients
from common.privacy.statement import privacy_statement
from server.bundle import build_bundle
from server.deployed import ledger_problems
from server.spending import planned_events, round_event
from server.witness import Seen
from tests.server.test_launch import PATIENTS, make_protocol


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"privacy": {"update_noise": 2.0}},
        {"training": {"mode": "dpsgd"}, "privacy": {"epsilon": 3.0}},
        {"training": {"mode": "none"}},
        {
            "training": {"mode": "dpsgd"},
            "privacy": {"epsilon": 3.0},
            "release": {"method": "channel", "rows": 90},
            "channel": {"epsilon": 3.0, "release_share": 0.2},
        },
    ],
)
def test_what_the_coordinator_states_is_what_the_sites_record(sections: Any) -> None:
    protocol = make_protocol(**sections)
    study, total = protocol.study, sum(PATIENTS.values())
    for patients in PATIENTS.values():
        theirs = MODES[study.training.mode].event(study, 2, patients / total, fit_patients(study, patients))
        assert round_event(study, 2, patients / total, patients) == theirs
    events = planned_events(protocol, PATIENTS, 3)
    channel = study.release.method == "channel"
    assert {len(found) for found in events.values()} == {4 if channel else 3}
    if channel:
        assert sum(found[-1].rows for found in events.values()) == 90  # type: ignore[union-attr]
    privacy_statement(protocol, events, PATIENTS)


def test_a_ledger_shorter_than_what_was_taken_is_named() -> None:
    rounds = [{"answered": ["anna", "berta"]}, {"answered": ["anna"]}]
    heads = {"anna": Seen("k", 2, "h"), "berta": Seen("k", 1, "h")}
    assert ledger_problems(rounds, heads, heads) == []
    assert ledger_problems(rounds, heads | {"anna": Seen("k", 1, "h")}, heads) == ["anna: 2 updates, a ledger of 1"]
    assert ledger_problems([], heads, [*heads, "clara"]) == ["clara: its ledger was never seen"]


def test_the_bundle_is_reproducible_and_holds_what_runs() -> None:
    first = build_bundle()
    assert first.content == build_bundle().content
    with zipfile.ZipFile(io.BytesIO(first.content)) as archive:
        names = set(archive.namelist())
        assert archive.read("server/app.py") == Path(server.app.__file__).read_bytes()
        listing = archive.read(".info/CONTENT").decode()
    assert {"client/app.py", "common/messages.py", "server/strategy.py", "pyproject.toml"} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]
    assert all(name in listing for name in names if name != ".info/CONTENT")
