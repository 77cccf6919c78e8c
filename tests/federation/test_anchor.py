"""A whole anchored study: two messages a site, a certified decoder, a cohort, and an ε that another account gives."""

from __future__ import annotations

import base64
import json
import math

import pytest

from common.privacy.events import BoundedInfluence, GaussianStatistics
from common.privacy.gaussian import composed_noise_multiplier, gaussian_epsilon
from common.privacy.ledger import Ledger
from common.table import read_table
from tests.federation.simulated import BOUND, ROWS, Finished, Inputs, finish

pytestmark = pytest.mark.federation
EPSILON, DELTA = 10.0, 1e-5


def simulated(folder: pytest.TempPathFactory, name: str, *settings: str) -> Finished:
    inputs = Inputs.lay_out(folder.mktemp(name), rounds=2, min_sites=4)
    options = [part for setting in (f"anchor.epsilon={EPSILON}", *settings) for part in ("--set", setting)]
    result = finish(inputs, inputs.start("--test", str(inputs.folder / "test.csv"), "--json", *options))
    assert result.code == 0, result.explanation
    return result


@pytest.fixture(scope="module")
def anchored(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return simulated(tmp_path_factory, "anchored", "training.mode=anchored", "training.rounds=0")


def test_every_ledger_holds_two_spends_that_compose_to_epsilon(anchored: Finished) -> None:
    for site in ROWS:
        with Ledger(anchored.inputs.out / "ledgers" / f"{site}.sqlite") as ledger:
            ledger.verify()
            events = [entry.event for entry in ledger.entries()]
        assert len(events) == 2 and all(isinstance(event, GaussianStatistics) for event in events)
        spent = [event.noise_multiplier for event in events if isinstance(event, GaussianStatistics)]
        multiplier = composed_noise_multiplier([(noise, 1) for noise in spent])
        assert gaussian_epsilon(DELTA, multiplier) == pytest.approx(EPSILON, rel=1e-6)
    for entry in anchored.json("privacy.json")["entries"]:
        assert entry["epsilon"] == pytest.approx(EPSILON, rel=1e-5) and entry["epsilon"] <= EPSILON
        assert not entry["conditional"] and "T2" not in entry["basis"]


def test_the_cohort_fits_the_schema_and_comes_from_the_nearer_generator(anchored: Finished) -> None:
    cohort, _ = read_table(anchored.inputs.out / "cohort.csv", anchored.inputs.schema, out_of_bounds="refuse")
    assert len(cohort) == 700
    document = anchored.json("anchor.json")
    distances = document["distance_to_statistics"]
    assert document["generator"] == min(distances, key=lambda name: distances[name])
    assert document["decoder_certificate"] <= BOUND and math.isfinite(document["copula_largest_singular_value"])
    assert document["sites"]["marginals"] == document["sites"]["moments"] == ROWS


def test_the_release_says_what_it_rests_on(anchored: Finished) -> None:
    assert anchored.json("gates.json")["passed"]
    (line,) = (anchored.inputs.out / "rounds.jsonl").read_text().splitlines()
    assert '"round": 0' in line
    report = (anchored.inputs.out / "report.html").read_text()
    assert "Two messages of statistics" in report and "anchored: noised statistics" in report
    payload = json.loads(base64.b64decode(anchored.json("manifest.dsse.json")["payload"]))
    assert "anchor.json" in {subject["name"] for subject in payload["subject"]}
    assert "anchor.safetensors" not in {subject["name"] for subject in payload["subject"]}


def test_rounds_after_an_anchor_start_from_its_decoder_and_their_epsilon_is_infinite(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    result = simulated(tmp_path_factory, "after", "training.update_norm=0.05")
    lines = (result.inputs.out / "rounds.jsonl").read_text().splitlines()
    assert len(lines) == 2 and result.json("anchor.json")["generator"] == "decoder"
    with Ledger(result.inputs.out / "ledgers" / "north.sqlite") as ledger:
        events = [entry.event for entry in ledger.entries()]
    assert [type(event) for event in events] == [GaussianStatistics] * 2 + [BoundedInfluence] * 2
    assert {entry["epsilon"] for entry in result.json("privacy.json")["entries"]} == {"infinity"}
