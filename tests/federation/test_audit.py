"""`cohortium audit` through Flower's real simulation runtime: a tiny study in dpsgd mode, whose ε it is set beside."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from common.errors import VerifyError
from common.privacy.ledger import Ledger
from server.audit import MARK, Plan, attack, judge, plan_audit
from server.audit_records import Audit
from server.release import verify_release
from server.run import RunFiles
from tests.server.test_audit_modes import SCHEMA, make_table

pytestmark = pytest.mark.federation

COHORTIUM = Path(sys.executable).with_name("cohortium")
PATIENCE = 400  # seconds until a hanging run is given up
SITES = {"north": 120, "south": 60}
CANARIES = 24
STUDY = """[study]
name = "tiny"
schema = "schema.json"
seed = 7
[model]
latent_dim = 2
hidden = [8]
[training]
mode = "dpsgd"
rounds = 2
local_epochs = 1
batch_size = 32
[privacy]
epsilon = 3.0
[release]
rows = 300
"""


@dataclass(frozen=True)
class Finished:
    """An audit that has ended."""

    out: Path
    stdout: str
    stderr: str
    plan: Plan

    @property
    def document(self) -> dict[str, Any]:
        return json.loads((self.out / "audit.json").read_text())


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("audit")
    (folder / "study.toml").write_text(STUDY)
    (folder / "schema.json").write_text(json.dumps(dict(SCHEMA.descriptor)))
    (folder / "sites").mkdir()
    for seed, (site, rows) in enumerate(SITES.items()):
        lines = [",".join(SCHEMA.names)]
        for row in make_table(rows, seed).values:
            cells = [f"{v:.4f}" for v in row[:4]] + [("false", "true")[int(v)] for v in row[4:10]]
            lines.append(",".join([*cells, *("abcd"[int(v)] for v in row[10:])]))
        (folder / "sites" / f"{site}.csv").write_text("\n".join(lines) + "\n")
    arguments = ["audit", "study.toml", "--sites", "sites", "--out", "out", "--canaries", str(CANARIES), "--json"]
    done = subprocess.run(
        [str(COHORTIUM), *arguments], cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    plan = plan_audit(folder / "study.toml", folder / "sites", canaries=CANARIES)
    return Finished(folder / "out", done.stdout, done.stderr, plan)


def test_the_audit_is_printed_and_on_disk(audited: Finished) -> None:
    assert json.loads(audited.stdout) == audited.document
    found = Audit.model_validate(audited.document)
    assert (found.canaries.site, found.canaries.number, found.canaries.patients) == ("north", CANARIES, 120)
    assert "a twin of the study with 24 canaries at north" in audited.stderr
    for line in found.lines:
        assert isinstance(line.claim, float) and 2.9 < line.claim <= 3.0  # what the twin's ledger accounts for
        assert 0 <= line.strongest.epsilon <= line.strongest.reachable


def test_the_numbers_are_those_of_the_twin_s_files(audited: Finished) -> None:
    """The seed draws the same canaries again; attacking what lies on disk gives the same lines."""
    claims: dict[Any, float | str] = {line["adversary"]: line["claim"] for line in audited.document["lines"]}
    again = judge(audited.plan, attack(audited.plan, RunFiles(audited.out / "twin")), claims)
    assert again.model_dump(mode="json") == audited.document


def test_the_twin_is_kept_apart_and_is_no_release(audited: Finished) -> None:
    twin = audited.out / "twin"
    assert sorted(path.name for path in audited.out.iterdir()) == ["audit.json", "twin"]  # no planted table is left
    assert "NOT" in MARK and "Nothing here belongs in a release" in (twin / MARK).read_text()
    assert not (twin / "manifest.dsse.json").exists() and not (twin / ".work").exists()
    with pytest.raises(VerifyError, match="no readable manifest"):
        verify_release(twin, None)
    assert len(list((twin / "messages").iterdir())) == 2
    with Ledger(twin / "ledgers" / "north.sqlite", "north") as ledger:
        assert [entry.study for entry in ledger.entries()] == [audited.document["twin_digest"]] * 2
    assert audited.document["twin_digest"] != audited.document["study_digest"] == audited.plan.protocol.digest
