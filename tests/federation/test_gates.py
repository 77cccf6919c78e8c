"""A simulated study whose gate fails, as a coordinator meets it: quarantine, a second person, release, verify."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.keys import create_key
from tests.federation.simulated import COHORTIUM, PATIENCE, Finished, Inputs, finish

pytestmark = pytest.mark.federation

REASON = "A rehearsal on made-up patients, which nobody can be harmed by"


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two rounds, more patients wanted than there are, and an audit that nobody gave."""
    inputs = Inputs.lay_out(tmp_path_factory.mktemp("held"), rounds=2, min_sites=4)
    result = finish(inputs, inputs.start("--json", "--set", "gates.min_patients=5000", "--set", "gates.audit=true"))
    assert result.code == 12, result.explanation
    return result


def cohortium(*arguments: object, code: int = 0) -> "subprocess.CompletedProcess[str]":
    command = [str(COHORTIUM), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == code, done.stderr
    return done


def test_the_failed_gates_are_named_and_the_candidate_is_kept_apart(held: Finished) -> None:
    document = json.loads(held.stdout)
    failed = {gate["name"]: gate for gate in document["gates"] if not gate["passed"]}
    assert set(failed) == {"min_patients", "audit"} and document["passed"] is False
    assert (failed["min_patients"]["found"], failed["min_patients"]["limit"]) == (800, 5000)
    assert "cohortium audit" in failed["audit"]["fix"]
    assert "min_patients: found 800, limit 5000" in held.stderr and "nothing was released" in held.stderr
    out = held.inputs.out
    assert json.loads((out / "quarantine" / "gates.json").read_text()) == document
    assert (out / "quarantine" / "cohort.csv").exists() and not (out / "cohort.csv").exists()
    assert not list(out.rglob("manifest.dsse.json"))
    for place in (out, out / "quarantine"):
        assert "not a release" in cohortium("verify", place, code=11).stderr


def test_a_second_person_lets_it_go(held: Finished, tmp_path: Path) -> None:
    out, key, approval = held.inputs.out, tmp_path / "second.pem", tmp_path / "approval.json"
    create_key(key, Ed25519PrivateKey.generate())
    copy = tmp_path / "copy"
    shutil.copytree(out / "quarantine", copy)
    cohortium("approve-override", copy, "--key", key, "--by", "Dr. B", "--reason", REASON, "--out", approval)
    cohortium("release", out, "--override", REASON, "--second", approval)
    shown = cohortium("verify", out).stdout
    assert "OVERRIDDEN" in shown and REASON in shown and "Dr. B" in shown
    statement = json.loads((out / "privacy.json").read_text())
    assert "audit" in statement["excludes"]
    cohortium("bundle-release", out, "--out", tmp_path / "release.tar.zst")
    assert REASON in cohortium("verify", tmp_path / "release.tar.zst", "--key", out / "simulation-key.pub").stdout
