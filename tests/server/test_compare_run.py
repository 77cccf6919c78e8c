"""Running a comparison: folders, failures, Ctrl-C, and what is read from every run."""

from pathlib import Path

import pytest

from common.errors import ExitCode, FederationError, OutputError
from server.compare import (
    require_finished,
)
from server.compare_figure import epsilon_terms, figure_data
from server.compare_records import read_result
from server.compare_report import comparison_notes, comparison_table, render_comparison
from server.simulation import StoppedError
from tests.server.comparison import PATIENTS, Compare, Runs, by_line, plan, statement_of

SECRET = "Zq7731"


def test_every_run_has_its_folder_and_its_line(compare: Compare, runs: Runs, folder: Path) -> None:
    found = compare()
    assert runs.started == ["constrained", "dpsgd-eps1", "dpsgd-eps3", "dpsgd-eps10", "non-private"]
    assert [record.folder for record in found.runs] == [f"runs/{name}" for name in runs.started]
    assert all((folder / "out" / record.folder / "privacy.json").exists() for record in found.runs)
    assert [line.run for line in found.table] == [record.run for record in found.runs]
    assert [line.epsilon for line in found.table][::4] == ["infinity", "infinity"]
    for line in found.table[1:4]:
        assert isinstance(line.epsilon, float) and line.requested_epsilon is not None
        assert 0.98 * line.requested_epsilon < line.epsilon <= line.requested_epsilon  # what the accountant says of it
    assert found.patients == PATIENTS and found.target == "dead" and found.seeds == [None]
    require_finished(found)


def test_the_privacy_of_a_run_is_whole(compare: Compare) -> None:
    for record in compare(epsilons=[1.0]).runs:
        assert record.result is not None
        privacy = record.result.privacy
        assert privacy.delta == 1e-5 and privacy.unit == "one patient (one row)"
        assert "replacing" in privacy.neighbouring_relation and privacy.adversary == "public, member, coordinator"
        assert "ε" in privacy.in_words


def test_the_largest_epsilon_over_sites_is_taken(folder: Path) -> None:
    protocol = by_line(plan(folder, epsilons=[3.0]))["dpsgd ε = 3"]
    statement = statement_of(protocol)
    for entry in statement["entries"]:
        if (entry["site"], entry["adversary"]) == ("berta", "member"):
            entry["epsilon"] = 2.99999
        else:
            entry["epsilon"] = 1.0
    metrics = {"fidelity": dict.fromkeys(("ks_mean", "tv_mean", "correlation_difference"), 0.0)}
    metrics |= {"utility": None, "utility_reason": "none"}
    found = read_result({"seconds": {}, "not_joined": {}}, statement, metrics).privacy
    assert (found.epsilon, found.adversary) == (2.99999, "member")


def test_a_failed_run_does_not_stop_the_others(compare: Compare, runs: Runs, folder: Path) -> None:
    runs.trouble["dpsgd-eps3"] = FederationError("round 1: non-finite-loss", fix="lower it")
    found = compare()
    assert len(runs.started) == 5
    failed = found.runs[2]
    assert failed.failed == "round 1: non-finite-loss" and failed.result is None
    assert found.table[2].failed == [failed.failed] and found.table[2].finished == 0 and found.table[2].epsilon is None
    assert [line.finished for line in found.table] == [1, 1, 0, 1, 1]
    assert "failed: round 1: non-finite-loss" in render_comparison(found)
    assert "dpsgd ε = 3 failed: round 1: non-finite-loss" in comparison_notes(found, folder)
    with pytest.raises(FederationError) as caught:
        require_finished(found)
    assert "1 of 5 runs failed" in caught.value.message and "runs/dpsgd-eps3: round 1" in caught.value.message


def test_an_unforeseen_error_is_named_without_its_text(compare: Compare, runs: Runs) -> None:
    runs.trouble["constrained"] = ValueError(f"cell {SECRET}")
    found = compare()
    assert found.table[0].failed == ["an unforeseen ValueError"] and found.table[1].finished == 1
    assert SECRET not in found.model_dump_json()


def test_nothing_finishes(compare: Compare, runs: Runs, folder: Path) -> None:
    names = ("constrained", "dpsgd-eps1", "non-private")
    runs.trouble.update({name: FederationError("too few sites") for name in names})
    found = compare(epsilons=[1.0])
    assert figure_data(found) is None and "nothing to draw" in render_comparison(found)
    with pytest.raises(FederationError, match="3 of 3 runs failed"):
        require_finished(found)
    assert comparison_table(found).row_count == 3 and epsilon_terms(found) == ""


@pytest.mark.parametrize("error", [StoppedError("stopped by Ctrl-C after 1 finished round(s)"), KeyboardInterrupt()])
def test_ctrl_c_says_which_runs_are_finished(compare: Compare, runs: Runs, folder: Path, error: BaseException) -> None:
    runs.trouble["dpsgd-eps3"] = error
    with pytest.raises(StoppedError) as caught:
        compare()
    message = caught.value.message
    assert caught.value.exit_code == ExitCode.INTERRUPTED
    assert "run 3 of 5 (dpsgd ε = 3): stopped by Ctrl-C after" in message
    assert "constrained, dpsgd-eps1." in message and str(folder / "out" / "runs") in message
    assert runs.started[-1] == "dpsgd-eps3" and (folder / "out" / "runs" / "dpsgd-eps1" / "privacy.json").exists()


def test_ctrl_c_in_the_first_run(compare: Compare, runs: Runs) -> None:
    runs.trouble["constrained"] = KeyboardInterrupt()
    with pytest.raises(StoppedError, match="No run is finished"):
        compare()


def test_a_full_disk_stops_everything(compare: Compare, runs: Runs) -> None:
    runs.trouble["dpsgd-eps1"] = OutputError("the disk is full", fix="free space")
    with pytest.raises(OutputError) as caught:
        compare()
    found = caught.value
    assert found.message.startswith("the disk is full\nFinished") and found.fix == "free space"
    assert runs.started == ["constrained", "dpsgd-eps1"]
