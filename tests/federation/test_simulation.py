"""Whole studies through Flower's real simulation runtime on Ray, as a coordinator starts them: `cohortium simulate`."""

import csv
import json
import math
import os
import signal
import subprocess

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file

from common.digest import sha256_of
from common.markers import MARKER_COLUMNS
from common.privacy.events import BoundedInfluence
from common.privacy.ledger import Ledger
from common.table import read_table
from tests.federation.simulated import (
    BOUND,
    COHORTIUM,
    LOGIT_SCALE,
    RADIUS,
    ROWS,
    SECRET,
    SITES,
    Finished,
    Inputs,
    finish,
    processes_of,
    read_all,
    wait_for,
)

pytestmark = pytest.mark.federation


# ---------------------------------------------------------------- a study that goes well


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    inputs = Inputs.lay_out(tmp_path_factory.mktemp("good"), rounds=5, min_sites=4)
    # The coordinator's working directory is his own: what lies there must not be taken for Cohortium's modules.
    for name in ("common", "server", "client"):
        (inputs.folder / f"{name}.py").write_text("raise RuntimeError('a module of the working directory')\n")
    result = finish(inputs, inputs.start("--test", str(inputs.folder / "test.csv"), "--json"))
    assert result.code == 0, result.explanation
    return result


def test_every_promised_file_is_there(good: Finished) -> None:
    promised = {
        "cohort.csv", "cohort.parquet", "metrics.json", "privacy.json", "report.html", "manifest.dsse.json",
        "decoder.safetensors", "rounds.jsonl", "ledgers",
    }  # fmt: skip
    assert promised <= {path.name for path in good.inputs.out.iterdir()}
    assert {path.name for path in (good.inputs.out / "ledgers").iterdir()} == {f"{site}.sqlite" for site in SITES}


def test_standard_output_is_one_json_document_and_progress_goes_elsewhere(good: Finished) -> None:
    summary = json.loads(good.stdout)
    assert summary["rounds"] == 5 and summary["rows"] == 700 and summary["not_joined"] == {}
    assert {site: facts["patients"] for site, facts in summary["sites"].items()} == ROWS
    assert set(summary["files"]) == {path.name for path in good.inputs.out.iterdir()}
    assert summary["epsilon"] == "infinity" and summary["certificate_bound"] == BOUND
    assert summary["utility"]["tstr"]["gradient_boosting"] is not None
    assert "rounds" in good.stderr


def test_every_round_is_answered_by_all_and_certified(good: Finished) -> None:
    assert [line["round"] for line in good.rounds] == [1, 2, 3, 4, 5]
    for line in good.rounds:
        assert sorted(line["answered"]) == sorted(SITES) and line["dropped"] == {}
        assert 0 < line["certificate"] <= BOUND
        assert 0 < line["step_norm"] <= RADIUS * (1 + 1e-6)  # a weighted mean of updates inside the ball


def weights_of(good: Finished) -> tuple[list[np.ndarray], list[np.ndarray]]:
    arrays = load_file(good.inputs.out / "decoder.safetensors")
    depth = sum(name.endswith(".weight") for name in arrays)
    assert depth == 3
    return (
        [arrays[f"network.layers.{i}.weight"].astype(np.float64) for i in range(depth)],
        [arrays[f"network.layers.{i}.bias"].astype(np.float64) for i in range(depth)],
    )


def test_an_independent_svd_agrees_with_the_certificate(good: Finished) -> None:
    weights, _ = weights_of(good)
    share = (BOUND / LOGIT_SCALE) ** (1 / len(weights))
    norms = [np.linalg.svd(weight, compute_uv=False)[0] for weight in weights]
    assert max(norms) <= share
    assert LOGIT_SCALE * math.prod(norms) == pytest.approx(good.rounds[-1]["certificate"], rel=1e-5)
    assert LOGIT_SCALE * math.prod(norms) <= BOUND


def test_no_pair_of_inputs_violates_the_bound(good: Finished) -> None:
    weights, biases = ([torch.from_numpy(a) for a in arrays] for arrays in weights_of(good))

    def decoder(z: torch.Tensor) -> torch.Tensor:  # written out again, from the definition
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            z = z @ weight.T + bias
            if i < len(weights) - 1:
                half = z.shape[-1] // 2
                z = torch.cat((torch.maximum(z[:, :half], z[:, half:]), torch.minimum(z[:, :half], z[:, half:])), -1)
        return LOGIT_SCALE * z

    generator = torch.Generator().manual_seed(0)
    first = (2 * torch.randn(512, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    shift = torch.randn(512, 4, generator=generator, dtype=torch.float64)
    shift = (shift * torch.logspace(-4, 1, 512, dtype=torch.float64)[:, None]).requires_grad_()
    optimiser = torch.optim.Adam([first, shift], lr=0.02)
    worst = 0.0
    for _ in range(300):
        ratio = (decoder(first + shift) - decoder(first)).norm(dim=1) / shift.norm(dim=1)
        worst = max(worst, float(ratio.detach().max()))
        optimiser.zero_grad()
        (-ratio.sum()).backward()
        optimiser.step()
    assert worst <= good.rounds[-1]["certificate"] <= BOUND
    assert worst > 0.25 * BOUND  # the search found steep directions: it could have seen a violation


def test_every_ledger_holds_one_exposure_a_round(good: Finished) -> None:
    total = sum(ROWS.values())
    for site, rows in ROWS.items():
        with Ledger(good.inputs.out / "ledgers" / f"{site}.sqlite", site) as ledger:
            length, _ = ledger.verify()
            events = [entry.event for entry in ledger.entries()]
            assert {entry.study for entry in ledger.entries()} == {json.loads(good.stdout)["study_digest"]}
        assert length == 5
        assert events == [BoundedInfluence(number, RADIUS, rows / total) for number in range(1, 6)]


def test_the_coordinator_has_witnessed_every_ledger(good: Finished) -> None:
    heads = good.json("ledger-heads.json")
    assert set(heads["sites"]) == set(SITES)
    for site, seen in heads["sites"].items():
        with Ledger(good.inputs.out / "ledgers" / f"{site}.sqlite") as ledger:
            found = ledger.inspect()
        assert (seen["key"], seen["length"], seen["head"]) == (found.head.key, 5, found.head.head)
        (witness,) = found.witnesses  # brought by the request of the last round, before its spend
        assert (witness.key, witness.length) == (heads["coordinator_key"], 4)
    assert not list(good.inputs.out.rglob("*.key"))


def test_the_privacy_statement_has_one_entry_a_site_and_adversary(good: Finished) -> None:
    statement = good.json("privacy.json")
    pairs = [(entry["site"], entry["adversary"]) for entry in statement["entries"]]
    assert sorted(pairs) == sorted((s, a) for s in SITES for a in ("public", "member", "coordinator"))
    for entry in statement["entries"]:
        assert entry["epsilon"] == "infinity" and "T2" in entry["basis"]
        assert entry["exposure"]["rounds"] == 5 and entry["exposure"]["update_norm"] == RADIUS


def test_the_cohort_is_valid_and_varied(good: Finished) -> None:
    table, report = read_table(good.inputs.out / "cohort.csv", good.inputs.schema, out_of_bounds="refuse")
    again, _ = read_table(good.inputs.out / "cohort.parquet", good.inputs.schema, out_of_bounds="refuse")
    assert len(table) == report.rows == 700 and report.undeclared == MARKER_COLUMNS
    np.testing.assert_array_equal(table.values, again.values)
    assert pq.read_metadata(good.inputs.out / "cohort.parquet").num_rows == 700
    for column in good.inputs.schema.columns:
        assert len(np.unique(table[column.name][~np.isnan(table[column.name])])) > 1, column.name
    real = {tuple(row) for text in SITES.values() for row in list(csv.reader(text.splitlines()))[1:]}
    with (good.inputs.out / "cohort.csv").open(encoding="utf-8", newline="") as file:
        made = [tuple(row) for row in csv.reader(file)][1:]
    assert not real & {row[:-3] for row in made}
    assert {row[-3:] for row in made} == {("severity", json.loads(good.stdout)["study_digest"][:16], "true")}


def test_nothing_of_a_site_is_left_but_its_ledger_and_log(good: Finished) -> None:
    assert not (good.inputs.out / ".work").exists()
    encoders = [path for path, content in read_all(good.inputs.out) if b"encoder." in content and path.suffix != ".log"]
    assert encoders == []
    assert [p.name for p in good.inputs.out.rglob("*.safetensors")] == ["decoder.safetensors"]
    assert good.left_running == []


def test_the_release_verifies(good: Finished) -> None:
    done = subprocess.run([COHORTIUM, "verify", good.inputs.out], capture_output=True, text=True)
    assert done.returncode == 0 and "cohort.csv" in done.stdout, done.stderr


# ---------------------------------------------------------------- a study in which sites fail


@pytest.fixture(scope="module")
def shaky(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """`tiny` declares one patient too many and stays out; the file of `east` is spoilt after it has joined."""
    declared = ROWS | {"tiny": ROWS["tiny"] + 1}
    inputs = Inputs.lay_out(tmp_path_factory.mktemp("shaky"), rounds=40, min_sites=2, declared=declared)
    process = inputs.start("--quiet")
    wait_for((inputs.out / "sites.json").exists, process)
    spoilt = inputs.folder / "sites" / "east.csv.new"
    spoilt.write_text(SITES["east"].replace("\n", f"\n{SECRET}", 3))
    spoilt.replace(inputs.folder / "sites" / "east.csv")
    result = finish(inputs, process)
    assert result.code == 0, result.explanation
    return result


def test_a_site_that_does_not_join_is_named_with_its_code(shaky: Finished) -> None:
    sites = shaky.json("sites.json")
    assert sites["not_joined"] == {"tiny": "data-unusable"}
    assert set(sites["joined"]) == {"north", "east", "south"}
    assert sum(joined["weight"] for joined in sites["joined"].values()) == pytest.approx(1.0)


def test_the_study_goes_on_without_a_site_that_fails(shaky: Finished) -> None:
    lines = shaky.rounds
    assert [line["round"] for line in lines] == list(range(1, 41))
    assert lines[-1]["dropped"] == {"east": "data-unusable"} and lines[-1]["answered"] == ["north", "south"]
    for line in lines:
        assert {"north", "south"} <= set(line["answered"]) and line["certificate"] <= BOUND
        assert line["dropped"] in ({}, {"east": "data-unusable"})


def test_the_ledger_of_a_failed_site_holds_what_it_sent_and_no_more(shaky: Finished) -> None:
    answered = {s: [ln["round"] for ln in shaky.rounds if s in ln["answered"]] for s in ("north", "east", "south")}
    for site, numbers in answered.items():
        path = shaky.inputs.out / "ledgers" / f"{site}.sqlite"
        with Ledger(path, site) as ledger:
            assert ledger.verify()[0] == len(numbers)
            assert [entry.round for entry in ledger.entries()] == numbers
    exposures = {e["site"]: e["exposure"]["rounds"] for e in shaky.json("privacy.json")["entries"]}
    assert exposures == {site: len(numbers) for site, numbers in answered.items()}


def test_the_sites_own_log_says_why_and_no_value_gets_out(shaky: Finished) -> None:
    log = [json.loads(line) for line in (shaky.inputs.out / "site-logs" / "east.jsonl").read_text().splitlines()]
    refusals = [entry for entry in log if entry["action"] == "refused"]
    assert refusals and all("column 'age'" in e["reason"] and "rows 1, 2, 3" in e["reason"] for e in refusals)
    tiny = (shaky.inputs.out / "site-logs" / "tiny.jsonl").read_text()
    assert "declares 31 patients" in tiny and "has 30" in tiny
    leaks = [path.name for path, content in read_all(shaky.inputs.out) if SECRET.encode() in content]
    assert leaks == [] and SECRET not in shaky.stdout + shaky.stderr


def test_the_report_names_the_sites_that_were_missing(shaky: Finished) -> None:
    page = (shaky.inputs.out / "report.html").read_text()
    assert "did not take part: data-unusable" in page and "east: data-unusable" in page
    assert "tiny" in shaky.stdout and "data-unusable" in shaky.stdout


# ---------------------------------------------------------------- Ctrl-C


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    inputs = Inputs.lay_out(tmp_path_factory.mktemp("stopped"), rounds=5000, min_sites=2)
    process = inputs.start()
    rounds = inputs.out / "rounds.jsonl"
    wait_for(lambda: rounds.exists() and rounds.read_text().endswith("\n"), process)
    assert processes_of(inputs.out)  # the search below can see them
    os.killpg(process.pid, signal.SIGINT)
    return finish(inputs, process)


def test_ctrl_c_ends_with_its_code_and_says_what_is_on_disk(stopped: Finished) -> None:
    assert stopped.code == 130, stopped.explanation
    assert stopped.stdout == "" and "Traceback" not in stopped.stderr
    done = len(stopped.rounds)
    text = " ".join(stopped.stderr.split())
    assert done >= 1 and f"stopped by Ctrl-C after {done} finished round(s)" in text
    assert str(stopped.inputs.out / "decoder.safetensors") in text


def test_ctrl_c_leaves_no_process_and_no_encoder(stopped: Finished) -> None:
    assert stopped.left_running == []
    assert not (stopped.inputs.out / ".work").exists()
    assert [p.name for p in stopped.inputs.out.rglob("*.safetensors")] == ["decoder.safetensors"]
    assert not (stopped.inputs.out / "cohort.csv").exists() and not (stopped.inputs.out / "manifest.dsse.json").exists()


def test_what_ctrl_c_leaves_is_whole(stopped: Finished) -> None:
    arrays = load_file(stopped.inputs.out / "decoder.safetensors")
    assert all(np.isfinite(array).all() for array in arrays.values())
    study = stopped.json("study.json")
    study["study"]["study"].pop("schema")
    study["study"].pop("gates")  # none declared
    for site in SITES:
        with Ledger(stopped.inputs.out / "ledgers" / f"{site}.sqlite", site) as ledger:
            length, _ = ledger.verify()
            # A spend precedes its reply: the round in progress may be in the ledger, a reported one must be.
            assert len(stopped.rounds) <= length <= len(stopped.rounds) + 2
            assert {e.study for e in ledger.entries()} == {sha256_of(study)}
