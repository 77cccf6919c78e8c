"""`cohortium audit` up to the federation and behind it: bad input, the twin, and what is judged and printed."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.console import results
from common.errors import CohortiumError, DataError, ExitCode, FederationError, UsageError, VerifyError
from common.evaluation.audit import epsilon_bound
from common.evaluation.canary_scores import SEEN_BY
from common.table import read_table
from server.audit import (
    MARK,
    NO_EVIDENCE,
    TWIN,
    Plan,
    attack,
    judge,
    plan_audit,
    require_unrefuted,
    run_audit,
)
from server.audit_commands import audit_notes, audit_table
from server.audit_records import Audit
from server.run import RunFiles
from server.simulation import StoppedError
from tests.server.test_audit_modes import SCHEMA, make_table
from tests.server.test_cli import Command, cohortium

__all__ = ["cohortium"]  # a fixture

PATIENTS = {"anna": 200, "berta": 80}
STUDY = """[study]
name = "audited"
schema = "schema.json"
[training]
rounds = 2
"""
DPSGD = ('training.mode="dpsgd"', "privacy.epsilon=1.0")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "study.toml").write_text(STUDY)
    (tmp_path / "schema.json").write_text(json.dumps(dict(SCHEMA.descriptor)))
    (tmp_path / "sites").mkdir()
    for seed, (site, rows) in enumerate(PATIENTS.items()):
        values = make_table(rows, seed).values
        lines = [",".join(SCHEMA.names)]
        for row in values:
            cells = [f"{v:.4f}" for v in row[:4]] + [("false", "true")[int(v)] for v in row[4:10]]
            lines.append(",".join([*cells, *("abcd"[int(v)] for v in row[10:])]))
        (tmp_path / "sites" / f"{site}.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def plan(folder: Path, **options: Any) -> Plan:
    settings: dict[str, Any] = {"canaries": 40} | options
    return plan_audit(folder / "study.toml", folder / "sites", **settings)


def perfect(plan: Plan, wrong: int = 0) -> dict[str, np.ndarray]:
    """Scores of attackers who are right about every canary but the last `wrong`, of which they are least sure."""
    sure = np.arange(len(plan.canaries), 0, -1.0)
    guesses = plan.canaries.coins * np.where(np.arange(len(plan.canaries)) < len(plan.canaries) - wrong, 1, -1)
    return dict.fromkeys(SEEN_BY, sure * guesses)


NONE: dict[Any, float | str] = dict.fromkeys(("public", "member", "coordinator"), "infinity")


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--canaries", 60], ExitCode.DATA, ["60canarieswouldreplace30%ofthesite's200patients", "--canaries50orfewer"]),
        (["--canaries", 3], ExitCode.DATA, ["3canaries:expectedatleast10"]),
        (["--site", "carla"], ExitCode.USAGE, ["--site'carla'", "onlyanna,berta"]),
        (["--site", "berta", "--canaries", 40], ExitCode.DATA, ["replace50%ofthesite's80patients", "160patients"]),
        (["--set", "training.ruonds=3", "--canaries", 40], ExitCode.STUDY, ["didyoumean'rounds'?"]),
        (["--set", "training.min_sites=3", "--canaries", 40], ExitCode.FEDERATION, ["2site(s)"]),
        (["--set", "training.mode=dpsgd", "--canaries", 40], ExitCode.STUDY, ["epsilonismissing"]),
    ],
)
def test_bad_input_is_one_error_before_anything_runs(
    cohortium: Command, folder: Path, options: list[object], code: ExitCode, words: list[str]
) -> None:
    out = folder / "out"
    found = cohortium("audit", folder / "study.toml", "--sites", folder / "sites", "--out", out, *options)
    assert found.code == code and all(word in found.flat for word in words), found.err
    assert found.err.count("error:") == 1 and not out.exists()


def test_an_output_directory_in_use_is_refused(cohortium: Command, folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "mine").write_text("x")
    options = ("--sites", folder / "sites", "--out", folder / "out", "--canaries", 40)
    found = cohortium("audit", folder / "study.toml", *options)
    assert found.code == ExitCode.OUTPUT and [p.name for p in (folder / "out").iterdir()] == ["mine"]


def test_the_largest_site_is_audited_unless_another_is_named(folder: Path) -> None:
    assert plan(folder).site == "anna"
    assert plan(folder, site="berta", canaries=20).site == "berta"
    with pytest.raises(UsageError):
        plan(folder, site="Anna")


def test_the_twin_is_the_study_under_another_name(folder: Path) -> None:
    found = plan(folder, overrides=["study.seed=3"])
    before, after = found.protocol.study.document(), found.twin.study.document()
    assert after["study"].pop("name") == before["study"].pop("name") + " audit twin"
    assert before == after and found.twin.digest != found.protocol.digest
    long = plan(folder, overrides=[f"study.name={'x' * 80}"])
    assert len(long.twin.study.study.name) == 80


def test_slots_and_coins_do_not_depend_on_the_patients(folder: Path) -> None:
    before = plan(folder, overrides=["study.seed=3"]).canaries
    rows = (folder / "sites" / "anna.csv").read_text().splitlines()
    (folder / "sites" / "anna.csv").write_text("\n".join([rows[0], *reversed(rows[1:])]) + "\n")
    after = plan(folder, overrides=["study.seed=3"]).canaries
    assert np.array_equal(before.slots, after.slots) and np.array_equal(before.coins, after.coins)


def test_the_twin_runs_on_planted_tables_that_are_gone_afterwards(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the federation is handed, byte for byte; stopped there, so that nothing half-finished may stay."""
    found, out, seen = plan(folder), folder / "out", {}

    def stop(protocol: Any, directory: Path, tables: Any, files: RunFiles, on_round: Any, record: str) -> None:
        seen["sites"] = sorted(path.name for path in directory.iterdir())
        seen["anna"] = read_table(directory / "anna.csv", SCHEMA, out_of_bounds="refuse")[0].values
        seen["berta"] = (directory / "berta.csv").read_bytes()
        seen["mode"] = directory.stat().st_mode & 0o777
        seen["protocol"], seen["record"] = protocol, record
        raise StoppedError("stopped")

    monkeypatch.setattr("server.audit.simulate", stop)
    with pytest.raises(StoppedError):
        run_audit(found, out, quiet=True)
    assert seen["sites"] == ["anna.csv", "berta.csv"] and seen["mode"] == 0o700
    assert seen["berta"] == (folder / "sites" / "berta.csv").read_bytes()
    assert np.array_equal(seen["anna"], found.canaries.plant(found.tables["anna"]).values, equal_nan=True)
    assert seen["protocol"] == found.twin and seen["record"] == "anna"
    assert [path.name for path in out.iterdir()] == [TWIN]
    assert [path.name for path in (out / TWIN).iterdir()] == [MARK]


def test_a_site_that_never_answered_cannot_be_audited(folder: Path) -> None:
    with pytest.raises(FederationError, match="answered no round of the twin"):
        attack(plan(folder), RunFiles(folder / "out"))


def test_the_bounds_of_all_lines_hold_together(folder: Path) -> None:
    found = plan(folder)
    audit = judge(found, perfect(found), NONE)
    assert [(line.adversary, line.score) for line in audit.lines] == [(who, name) for name, who in SEEN_BY.items()]
    assert sum(g.level for line in audit.lines for g in line.declared) == pytest.approx(0.05)
    for line in audit.lines:
        assert [g.guesses for g in line.declared] == [40, 20, 8]
        expected = epsilon_bound(40, 40, 40, delta=1e-5, level=0.05 / 15)
        assert line.strongest.epsilon == line.strongest.reachable == expected.epsilon > 1.8
        assert line.claim == "infinity" and not line.refuted
    assert Audit.model_validate(json.loads(json.dumps(audit.model_dump(mode="json")))) == audit
    require_unrefuted(audit)


def test_a_bound_above_the_claim_is_an_error_and_one_below_is_not(folder: Path) -> None:
    found = plan(folder, overrides=DPSGD)
    reach = epsilon_bound(40, 40, 40, delta=1e-5, level=0.05 / 15).epsilon
    require_unrefuted(judge(found, perfect(found), dict.fromkeys(NONE, reach * 1.0001)))
    claims: dict[Any, float | str] = {**NONE, "member": reach * 0.9999}
    refuted = judge(found, perfect(found), claims)
    assert [line.score for line in refuted.refuted] == ["reconstruction"]
    with pytest.raises(VerifyError, match=r"member, reconstruction: at least 1\.\d+, claimed") as caught:
        require_unrefuted(refuted)
    assert caught.value.exit_code is ExitCode.VERIFY and "95%" in str(caught.value)


def test_guesses_at_random_show_nothing(folder: Path) -> None:
    found = plan(folder)
    random = np.random.default_rng(0)
    scores = {name: random.normal(size=40) for name in SEEN_BY}
    for line in judge(found, scores, NONE).lines:
        assert line.strongest.epsilon < 0.5 and line.strongest.reachable > 1.8


@pytest.mark.parametrize("seeded", [True, False])
def test_the_screen_says_what_the_numbers_are(folder: Path, seeded: bool, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(folder, overrides=[*DPSGD, *(["study.seed=1"] if seeded else [])])
    claims: dict[Any, float | str] = {**NONE, "public": 1.0, "coordinator": math.pi}
    audit = judge(found, perfect(found, wrong=4), claims)
    results.print(audit_table(audit))
    table = capsys.readouterr().out
    assert "none" in table and "1 REFUTED" in table and "3.14" in table
    assert all(name in table for name in (*SEEN_BY, "public", "member", "coordinator", "40 canaries"))
    notes = audit_notes(audit, folder / "out")
    assert NO_EVIDENCE in notes and "No lower bound is evidence of privacy" in notes
    assert "40 of 200 patients of 'anna' were replaced" in notes and "one patient (one row)" in notes
    assert "δ = 1e-05" in notes and "95% confidence" in notes and "in a deployment it would be a query" in notes
    assert ("come from the study's seed" in notes) is seeded and audit.canaries.seeded is seeded


def test_no_message_quotes_a_patient(folder: Path) -> None:
    (folder / "sites" / "anna.csv").write_text((folder / "sites" / "anna.csv").read_text().replace("true", "Zq7731", 1))
    with pytest.raises(DataError) as caught:
        plan(folder)
    assert "Zq7731" not in str(caught.value) and isinstance(caught.value, CohortiumError)
