"""`cohortium compare`: which runs are planned, what is refused beforehand, and the command line."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from common.errors import CohortiumError, ExitCode, FederationError, StudyError, UsageError
from server.cli import main
from server.compare import (
    DPSGD_SETTINGS,
    check_epsilons,
    planned_change,
)
from tests.server.comparison import PATIENTS, Runs, plan

SECRET = "Zq7731"


# ---------------------------------------------------------------- what is run


def test_the_runs_are_one_constrained_one_dpsgd_an_epsilon_and_one_non_private(folder: Path) -> None:
    found = plan(folder)
    assert [(run.name, run.folder) for run in found.runs] == [
        ("constrained", "constrained"), ("dpsgd ε = 1", "dpsgd-eps1"), ("dpsgd ε = 3", "dpsgd-eps3"),
        ("dpsgd ε = 10", "dpsgd-eps10"), ("non-private", "non-private"),
    ]  # fmt: skip
    studies = [run.protocol.study for run in found.runs]
    assert [s.training.mode for s in studies] == ["constrained", "dpsgd", "dpsgd", "dpsgd", "none"]
    assert [s.privacy.epsilon for s in studies] == [None, 1.0, 3.0, 10.0, None]
    assert all(run.protocol.study.study.seed is None for run in found.runs)
    assert found.runs[0].protocol == found.base and found.runs[0].settings == {}
    assert found.runs[-1].settings == {"training.mode": "none"}


def test_settings_come_from_the_constant_then_set_then_dpsgd(folder: Path) -> None:
    found = plan(
        folder,
        epsilons=[0.5],
        overrides=["training.batch_size=64", "model.latent_dim=5", "training.rounds=3"],
        dpsgd=["model.latent_dim=4", "training.update_norm=2"],
    )
    constrained, dpsgd, none = (run.protocol.study for run in found.runs)
    assert dpsgd.training.batch_size == 64 and dpsgd.model.latent_dim == 4 and dpsgd.training.update_norm == 2
    for key, value in (item.split("=") for item in DPSGD_SETTINGS):
        section, name = key.split(".")
        if name not in ("batch_size", "latent_dim", "update_norm", "rounds"):
            assert json.loads(json.dumps(getattr(getattr(dpsgd, section), name))) == json.loads(value), key
    for study in (constrained, none):
        assert (study.training.batch_size, study.model.latent_dim, study.training.update_norm) == (64, 5, 1.0)
        assert study.model.hidden == (128, 128)
    assert {study.training.rounds for study in (constrained, dpsgd, none)} == {3}
    assert found.runs[1].settings["model.latent_dim"] == 4 and "training.rounds" not in found.runs[1].settings
    assert any(DPSGD_SETTINGS[0] in note for note in found.notes)
    assert any("model.latent_dim=4" in note for note in found.notes)


def test_a_study_in_dpsgd_keeps_its_settings_there_and_loses_them_elsewhere(folder: Path) -> None:
    found = plan(
        folder,
        'mode = "dpsgd"\ngradient_clip = 2.5\nbatch_size = 32\n[privacy]\nepsilon = 5.0\n[model]\nhidden = [8]\n',
        epsilons=[2.0],
    )
    constrained, dpsgd, none = (run.protocol.study for run in found.runs)
    assert dpsgd.model.hidden == (8,) and dpsgd.training.gradient_clip == 2.5 and dpsgd.privacy.epsilon == 2.0
    assert dpsgd.model.latent_dim == 16 and dpsgd.training.kl_weight == 1.0  # not DPSGD_SETTINGS
    for study in (constrained, none):
        assert study.privacy.epsilon is None and study.training.gradient_clip == 1.0
        assert study.training.batch_size == 32 and study.model.hidden == (8,)
    assert not any(DPSGD_SETTINGS[0] in note for note in found.notes)


def test_update_noise_stays_with_the_constrained_run(folder: Path) -> None:
    found = plan(folder, "[privacy]\nupdate_noise = 3.0\n", epsilons=[1.0])
    assert [run.protocol.study.privacy.update_noise for run in found.runs] == [3.0, 0.0, 0.0]
    assert any("update_noise = 3" in note for note in found.notes)


@pytest.mark.parametrize("override", [False, True])
def test_a_limit_on_epsilon_is_left_out_and_that_is_said(folder: Path, override: bool) -> None:
    if override:
        found = plan(folder, overrides=["privacy.max_epsilon=2.0"])
    else:
        found = plan(folder, "[privacy]\nmax_epsilon = 2.0\n")
    assert [run.protocol.study.privacy.max_epsilon for run in found.runs] == [None] * 5
    assert any("max_epsilon = 2" in note and "left out" in note for note in found.notes)
    assert plan(folder).notes and not any("max_epsilon" in note for note in plan(folder).notes)


@pytest.mark.parametrize("override", [False, True])
def test_every_run_samples_from_the_prior(folder: Path, override: bool) -> None:
    if override:
        found = plan(folder, overrides=['release.method="channel"', "channel.epsilon=1.0"])
    else:
        found = plan(folder, '[release]\nmethod = "channel"\n[channel]\nepsilon = 1.0\n')
    assert {run.protocol.study.release.method for run in found.runs} == {"prior"}
    assert any('release.method = "channel"' in note for note in found.notes)


def test_seeds(folder: Path) -> None:
    found = plan(folder, epsilons=[1.0], seeds=2)
    assert [(run.folder, run.protocol.study.study.seed) for run in found.runs] == [
        ("constrained-seed0", 0), ("dpsgd-eps1-seed0", 0), ("non-private-seed0", 0),
        ("constrained-seed1", 1), ("dpsgd-eps1-seed1", 1), ("non-private-seed1", 1),
    ]  # fmt: skip
    assert found.runs[3].name == "constrained, seed 1" and found.runs[3].line == "constrained"
    assert len({run.protocol.digest for run in found.runs}) == 6
    kept = plan(folder, overrides=["study.seed=7"])
    assert {run.protocol.study.study.seed for run in kept.runs} == {7}
    assert any("study.seed = 7 is replaced" in n for n in plan(folder, overrides=["study.seed=7"], seeds=3).notes)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0], "0.0 is not a positive finite number"),
        ([1.0, -2.0], "-2.0 is not a positive finite number"),
        ([math.nan], "nan is not a positive"),
        ([math.inf], "inf is not a positive"),
        ([1.0, 1e300], "1e+300 is above 1000"),
        ([1.0, 3.0, 1.0], "1 is named 2 times"),
        ([1.0, 1.0 + 1e-12], "1 is named 2 times"),  # two runs could not be told apart by name
        ([], "no ε is named"),
    ],
)
def test_an_epsilon_that_is_none(values: Sequence[float], expected: str) -> None:
    with pytest.raises(UsageError, match="--epsilon") as caught:
        check_epsilons(values)
    assert expected in caught.value.message and "--epsilon 3" in caught.value.fix


def test_every_bad_epsilon_is_named_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        check_epsilons([-1.0, 2.0, 2.0, math.inf])
    assert all(text in caught.value.message for text in ("-1.0", "2 is named 2 times", "inf"))
    assert check_epsilons([10.0, 0.5]) == [0.5, 10.0]


@pytest.mark.parametrize(
    ("option", "text", "error", "expected"),
    [
        ("--set", "rounds=3", StudyError, "--set 'rounds=3' is not section.key=value"),
        ("--dpsgd", "training.rounds", StudyError, "--dpsgd 'training.rounds' is not section.key=value"),
        ("--set", "training.mode=none", UsageError, "leave the key out"),
        ("--dpsgd", "training.mode=none", UsageError, "leave the key out"),
        ("--set", "privacy.epsilon=2", UsageError, "with --epsilon"),
        ("--dpsgd", " privacy.epsilon = 2", UsageError, "with --epsilon"),
        ("--dpsgd", "release.rows=5", UsageError, "expected a key of [model] or [training]"),
        ("--dpsgd", "study.target=x", UsageError, "expected a key of [model] or [training]"),
    ],
)
def test_overrides_that_a_comparison_cannot_take(
    option: str, text: str, error: type[CohortiumError], expected: str
) -> None:
    with pytest.raises(error) as caught:
        planned_change(option, text)
    assert expected in str(caught.value) and caught.value.fix


def test_overrides_are_read_as_in_a_file() -> None:
    values = {"[1, 2]": [1, 2], '"dead"': "dead", "dead": "dead", "true": True, "1e-3": 1e-3}
    for text, value in values.items():
        assert planned_change("--set", f"training.x={text}").value == value


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dpsgd": ["training.batch_sise=3"]}, "did you mean 'batch_size'?"),
        ({"dpsgd": ["training.batch_size=many"]}, "dpsgd ε = 1"),
        ({"overrides": ["training.ruonds=3"]}, "did you mean 'rounds'?"),
    ],
)
def test_keys_are_checked_when_planning(folder: Path, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(StudyError) as caught:
        plan(folder, **options)
    assert expected in caught.value.message


def test_seeds_below_one(folder: Path) -> None:
    with pytest.raises(UsageError, match="--seeds 0"):
        plan(folder, seeds=0)


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("[privacy]\ndelta = 0.002\n", {}, "delta = 0.002 is too large"),
        ("[privacy]\nupdate_noise = 1.0\n", {}, "update_noise = 1 is of no use"),
        ("", {"epsilons": [1e-9, 1.0]}, "epsilon = 1e-09 at delta = 1e-05 is out of reach"),
        ("", {"dpsgd": ["training.min_sites=3"]}, "dpsgd ε = 1: 2 site(s), training.min_sites is 3"),
    ],
)
def test_the_plan_is_checked_against_the_sites(folder: Path, text: str, options: dict[str, Any], expected: str) -> None:
    found = plan(folder, text, **options)
    with pytest.raises(CohortiumError) as caught:
        found.check(PATIENTS)
    assert expected in caught.value.message and caught.value.fix


def test_a_plan_without_objections(folder: Path) -> None:
    plan(folder, epsilons=[3.0]).check(PATIENTS)


# ---------------------------------------------------------------- the command line


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def command(folder: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*options: object) -> Outcome:
        arguments = ["compare", folder / "study.toml", "--sites", folder / "sites", "--out", folder / "out", *options]
        monkeypatch.setattr(sys, "argv", ["cohortium", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        assert isinstance(caught.value.code, int)
        captured = capsys.readouterr()
        return Outcome(caught.value.code, captured.out, captured.err)

    return run


def test_the_last_screen_and_the_files(command: Command, folder: Path) -> None:
    outcome = command("--test", folder / "test.csv", "--epsilon", "2", "--epsilon", "0.5")
    flat = "".join(outcome.out.split())
    assert outcome.code == 0
    for text in ("dpsgd ε = 0.5", "dpsgd ε = 2", "non-private", "no finite ε", "compare.html", "compare.json", "0.740"):
        assert "".join(text.split()) in flat, text
    assert "run 2 of 4: dpsgd ε = 0.5" in outcome.err and "run 4 of 4: non-private" in outcome.err
    assert (folder / "out" / "compare.html").exists() and (folder / "out" / "compare.json").exists()


def test_json_is_the_document(command: Command, folder: Path) -> None:
    outcome = command("--json", "--quiet", "--seeds", "2")
    assert outcome.code == 0 and outcome.err == ""
    assert json.loads(outcome.out) == json.loads((folder / "out" / "compare.json").read_text())
    assert len(json.loads(outcome.out)["runs"]) == 10


def test_a_failed_run_shows_in_the_exit_code_and_the_files_are_whole(
    command: Command, runs: Runs, folder: Path
) -> None:
    runs.trouble["dpsgd-eps3"] = FederationError("round 2: non-finite-loss")
    outcome = command("--json")
    assert outcome.code == ExitCode.FEDERATION and "1 of 5 runs failed" in outcome.err
    assert json.loads(outcome.out)["runs"][2]["failed"] == "round 2: non-finite-loss"
    assert (folder / "out" / "compare.html").read_text().endswith("</html>")


def spoil(name: str, text: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return write


def leave(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("prepare", "options", "code", "expected"),
    [
        pytest.param(leave, ["--epsilon", "0"], ExitCode.USAGE, "0.0 is not a positive finite number", id="zero"),
        pytest.param(leave, ["--epsilon", "nan"], ExitCode.USAGE, "nan is not a positive", id="nan"),
        pytest.param(leave, ["--epsilon=-1"], ExitCode.USAGE, "-1.0 is not a positive", id="negative"),
        pytest.param(leave, ["--epsilon", "1", "--epsilon", "1"], ExitCode.USAGE, "1 is named 2 times", id="twice"),
        pytest.param(leave, ["--epsilon", "low"], ExitCode.USAGE, "low", id="no number"),
        pytest.param(leave, ["--seeds", "0"], ExitCode.USAGE, "--seeds 0", id="no seed"),
        pytest.param(leave, ["--set", "training.mode=none"], ExitCode.USAGE, "runs every mode itself", id="mode"),
        pytest.param(leave, ["--set", "training.ruonds=1"], ExitCode.STUDY, "did you mean 'rounds'?", id="key"),
        pytest.param(leave, ["--dpsgd", "training.x=1"], ExitCode.STUDY, "[training] x", id="dpsgd key"),
        pytest.param(spoil("study.toml", "[study"), [], ExitCode.STUDY, "not valid TOML", id="study"),
        pytest.param(spoil("schema.json", "{"), [], ExitCode.SCHEMA, "schema", id="schema"),
        pytest.param(
            spoil("sites/anna.csv", f"age,dead\n{SECRET},true\n"), [], ExitCode.DATA, "site 'anna'", id="site"
        ),
        pytest.param(
            spoil("bad.csv", "age\n3\n"), ["--test", "bad.csv"], ExitCode.DATA, "'dead' is missing", id="test"
        ),
        pytest.param(leave, ["--test", "none.csv"], ExitCode.DATA, "none.csv", id="no test file"),
        pytest.param(leave, ["--set", "privacy.delta=0.01"], ExitCode.STUDY, "delta = 0.01 is too large", id="delta"),
        pytest.param(leave, ["--set", "training.min_sites=3"], ExitCode.FEDERATION, "min_sites is 3", id="min_sites"),
        pytest.param(spoil("out/kept.txt", "x"), [], ExitCode.OUTPUT, "exists and is not empty", id="output"),
    ],
)
def test_bad_input_is_found_before_any_federation(
    command: Command,
    runs: Runs,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable[[Path], object],
    options: list[str],
    code: ExitCode,
    expected: str,
) -> None:
    prepare(folder)
    monkeypatch.chdir(folder)
    outcome = command(*options)
    assert outcome.code == code, outcome.err
    assert expected in outcome.err and outcome.out == "" and SECRET not in outcome.err
    assert "Traceback" not in outcome.err and runs.started == []
    assert not (folder / "out" / "runs").exists()
    assert (folder / "out").exists() == (code == ExitCode.OUTPUT)
