"""`cohortium release` and `approve-override` on a finished simulation, as people type them."""

import json
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from common.errors import CohortiumError
from common.keys import create_key
from server.cli import app
from server.cohort import write_cohort
from server.gating import GateError
from server.release import release_simulation
from server.run_inputs import RunInputs
from server.simulation import SimulationResult
from tests.server.test_gating import REASON, in_quarantine, run
from tests.server.test_release import PATIENTS, make_table


def command(*arguments: object, code: int = 0) -> tuple[str, str]:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    error = done.exception if isinstance(done.exception, CohortiumError) else None
    assert (int(error.exit_code) if error else done.exit_code) == code, (done.output, done.exception)
    return done.output, str(error)


@pytest.fixture
def held(tmp_path: Path) -> SimulationResult:
    """A simulation in quarantine, with the sites' files that it ran on."""
    result = run(tmp_path, min_patients=101)
    sites = tmp_path / "sites"
    sites.mkdir()
    for number, (site, rows) in enumerate(PATIENTS.items()):
        table = make_table(result.protocol, rows, number)
        write_cohort([table], result.protocol.schema, sites / f"{site}.csv", tmp_path / "unused.parquet")
    RunInputs(sites, None).save(result.files)
    with pytest.raises(GateError):
        release_simulation(result, None, thorough=False)
    return result


@pytest.fixture
def key(tmp_path: Path) -> Path:
    create_key(tmp_path / "second.pem", Ed25519PrivateKey.generate())
    return tmp_path / "second.pem"


def test_approve_on_a_copy_release_and_verify(held: SimulationResult, key: Path, tmp_path: Path) -> None:
    out, copy, approval = held.files.out, tmp_path / "copy", tmp_path / "approval.json"
    shutil.copytree(held.files.quarantine, copy)
    shown, _ = command("release", out, "--json", code=12)
    assert json.loads(shown)["passed"] is False
    shown, _ = command("approve-override", copy, "--key", key, "--by", "Dr. B", "--reason", REASON, "--out", approval)
    assert "FAILED min_patients: found 100, limit 101" in shown and "cohort.csv" in shown
    _, error = command("release", out, "--override", "Quite another reason than before", "--second", approval, code=11)
    assert "another reason" in error
    in_quarantine(held.files)
    shown, _ = command("release", out, "--override", f"  {REASON} ", "--second", approval)
    assert "OVERRIDDEN" in shown
    shown, _ = command("verify", out)
    assert REASON in shown and "second signature: Dr. B" in shown
    shown, _ = command("verify", out, "--json")
    assert json.loads(shown)["verification"]["gates"]["override"]["reason"] == REASON


def test_what_is_wrong_with_the_command_line(held: SimulationResult, key: Path, tmp_path: Path) -> None:
    out, quarantine = held.files.out, held.files.quarantine
    approve = ("approve-override", quarantine, "--key", key, "--by", "B")
    for arguments, code, words in (
        (("release", out, "--override", REASON), 2, "expected both or neither"),
        (("release", out, "--override", "ok", "--second", key), 2, "says too little"),
        (("release", out, "--override", REASON, "--second", key), 11, "not JSON"),
        (("release", out, "--override", REASON, "--second", quarantine / "gates.json"), 11, "not the approval"),
        (("release", out, "--consortium", tmp_path), 2, "this run is a simulation"),
        (("release", out, "--audit", key), 2, "not JSON"),
        (("release", tmp_path), 2, "not the folder of a run"),
        (("release", out, "--sites", tmp_path / "nowhere"), 4, "not there any more"),
        ((*approve, "--reason", "ok", "--out", tmp_path / "a"), 2, "says too little"),
        ((*approve, "--reason", REASON, "--out", key), 7, "never written over"),
        ((*approve, "--reason", REASON, "--out", quarantine / "a"), 2, "outside of quarantine"),
        (
            ("approve-override", quarantine, "--key", tmp_path / "none", "--by", "B", "--reason", REASON),
            2,
            "no such key",
        ),
        (("approve-override", out, "--key", key, "--by", "B", "--reason", REASON), 11, "no candidate in quarantine"),
    ):
        _, error = command(*arguments, code=code)
        assert words in error, (arguments, error)
    key.chmod(0o644)
    assert "0644" in command(*approve, "--reason", REASON, "--out", tmp_path / "a", code=2)[1]
    assert not (tmp_path / "a").exists() and not (quarantine / "a").exists()
    in_quarantine(held.files)


def test_other_patients_than_those_it_ran_on_are_refused(held: SimulationResult, tmp_path: Path) -> None:
    site = tmp_path / "sites" / "anna.csv"
    site.write_text(site.read_text() + "50,f,true\n")
    assert "anna changed or went" in command("release", held.files.out, code=4)[1]
    in_quarantine(held.files)
    held.files.inputs.unlink()
    assert "--sites" in command("release", held.files.out, code=2)[1]
