"""`cohortium compare` through Flower's real simulation runtime: a tiny study, every mode once, and Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.privacy.ledger import Ledger
from server.compare_records import Comparison
from server.release import verify_release
from tests.signals import interruptible

pytestmark = pytest.mark.federation

COHORTIUM = Path(sys.executable).with_name("cohortium")
PATIENCE = 400  # seconds until a hanging run is given up
SITES = {"north": 80, "south": 60}
SCHEMA = {
    "cohortium:target": "dead",
    "fields": [
        {"name": "age", "type": "number", "constraints": {"minimum": 18, "maximum": 100, "required": True}},
        {"name": "stage", "type": "string", "constraints": {"enum": ["I", "II", "III"]}},
        {"name": "dead", "type": "boolean", "constraints": {"required": True}},
    ],
}
STUDY = """[study]
name = "tiny"
schema = "schema.json"
seed = 7
[model]
latent_dim = 2
hidden = [8]
[training]
rounds = {rounds}
local_epochs = 1
batch_size = 32
[release]
rows = 200
"""


def patients(seed: int, rows: int) -> str:
    random = np.random.default_rng(seed)
    lines = ["age,stage,dead"]
    for severity in random.normal(size=rows):
        stage = ("I", "II", "III")[int(np.digitize(severity, (-0.5, 0.8)))]
        lines.append(
            f"{np.clip(60 + 12 * severity, 18, 100):.1f},{stage},{'true' if random.random() < 0.5 else 'false'}"
        )
    return "\n".join(lines) + "\n"


def lay_out(folder: Path, rounds: int) -> None:
    (folder / "sites").mkdir()
    for number, (name, rows) in enumerate(SITES.items()):
        (folder / "sites" / f"{name}.csv").write_text(patients(number, rows))
    (folder / "test.csv").write_text(patients(9, 60))
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    (folder / "study.toml").write_text(STUDY.format(rounds=rounds))


def start(folder: Path, *options: str) -> "subprocess.Popen[str]":
    command = [str(COHORTIUM), "compare", "study.toml", "--sites", "sites", "--out", "out", "--epsilon", "3", *options]
    # A process group of its own, as a shell gives every job: Ctrl-C reaches this group and no other.
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=folder,
        preexec_fn=interruptible,
    )


@dataclass(frozen=True)
class Finished:
    folder: Path
    code: int
    stdout: str
    stderr: str

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def document(self) -> dict[str, Any]:
        return json.loads((self.out / "compare.json").read_text())


def finish(folder: Path, process: "subprocess.Popen[str]") -> Finished:
    try:
        stdout, stderr = process.communicate(timeout=PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return Finished(folder, process.returncode, stdout, stderr)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("compare")
    lay_out(folder, rounds=2)
    found = finish(folder, start(folder, "--test", "test.csv", "--json", "--set", "training.rounds=2"))
    assert found.code == 0, found.stderr
    return found


def test_the_comparison_is_printed_and_on_disk(compared: Finished) -> None:
    assert json.loads(compared.stdout) == compared.document
    assert [record["run"] for record in compared.document["runs"]] == ["constrained", "dpsgd ε = 3", "non-private"]
    assert Comparison.model_validate(compared.document).has_utility
    assert "run 2 of 3: dpsgd ε = 3" in compared.stderr


def test_every_number_is_that_of_the_run_s_own_files(compared: Finished) -> None:
    for record in compared.document["runs"]:
        folder, result = compared.out / record["folder"], record["result"]
        statement = json.loads((folder / "privacy.json").read_text())
        metrics = json.loads((folder / "metrics.json").read_text())
        study = json.loads((folder / "study.json").read_text())["study"]
        epsilons = {entry["epsilon"] for entry in statement["entries"]}
        if record["mode"] == "dpsgd":
            assert result["privacy"]["epsilon"] == max(epsilons) and 2.9 < max(epsilons) <= 3.0
        else:
            assert result["privacy"]["epsilon"] == "infinity" and epsilons == {"infinity"}
        assert result["privacy"]["delta"] == statement["entries"][0]["delta"]
        assert result["fidelity"]["ks"] == metrics["fidelity"]["ks_mean"]
        for kind in ("tstr", "trtr"):
            for name in ("gradient_boosting", "logistic_regression"):
                assert result["utility"][kind][name] == metrics["utility"][kind][name]
        assert (study["training"]["mode"], statement["study_digest"]) == (record["mode"], record["study_digest"])
        assert study["study"]["seed"] == 7 and study["training"]["rounds"] == 2


def test_every_run_is_a_whole_release_with_its_ledgers(compared: Finished) -> None:
    for record in compared.document["runs"]:
        folder = compared.out / record["folder"]
        released = {subject["name"] for subject in verify_release(folder, None)["subject"]}
        assert {"cohort.csv", "privacy.json", "report.html"} <= released
        for site in SITES:
            with Ledger(folder / "ledgers" / f"{site}.sqlite", site) as ledger:
                assert ledger.verify()[0] == 2
        assert not (folder / ".work").exists()


def test_the_page_points_at_the_reports(compared: Finished) -> None:
    page = (compared.out / "compare.html").read_text()
    links = re.findall(r'<a href="([^"]+)"', page)
    assert len(links) == 3 and all((compared.out / link).exists() for link in links)
    assert "constrained: no finite ε for the weights" in page and "non-private reference: no finite ε" in page


def test_ctrl_c_keeps_the_finished_runs(tmp_path: Path) -> None:
    lay_out(tmp_path, rounds=2)
    process = start(tmp_path, "--dpsgd", "training.rounds=5000")
    rounds = tmp_path / "out" / "runs" / "dpsgd-eps3" / "rounds.jsonl"
    deadline = time.monotonic() + PATIENCE
    while not (rounds.exists() and rounds.read_text().endswith("\n")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    found = finish(tmp_path, process)
    text = " ".join(found.stderr.split())
    assert found.code == 130 and found.stdout == "" and "Traceback" not in text
    assert "run 2 of 3 (dpsgd ε = 3): stopped by Ctrl-C after" in text and "constrained. No comparison" in text
    assert sorted(path.name for path in found.out.iterdir()) == ["runs"]
    assert sorted(path.name for path in (found.out / "runs").iterdir()) == ["constrained", "dpsgd-eps3"]
    assert (found.out / "runs" / "constrained" / "manifest.dsse.json").exists()
