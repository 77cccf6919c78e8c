"""A whole study that releases through the sites' own channels, with patients who train apart from those who release."""

import base64
import json
import math

import pytest

from common.privacy.accountant import account_lines
from common.privacy.channel import cohort_epsilon
from common.privacy.events import BoundedInfluence, ChannelRelease
from common.privacy.ledger import Ledger
from common.table import read_table
from tests.federation.simulated import ROWS, SECRET, Finished, Inputs, finish, read_all

pytestmark = pytest.mark.federation
ROUNDS, EPSILON, DELTA = 3, 1.5, 1e-5


@pytest.fixture(scope="module")
def channel(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    inputs = Inputs.lay_out(tmp_path_factory.mktemp("channel"), rounds=ROUNDS, min_sites=4)
    settings = ("release.method=channel", f"channel.epsilon={EPSILON}", "channel.release_share=0.3")
    options = [part for setting in settings for part in ("--set", setting)]
    result = finish(inputs, inputs.start("--test", str(inputs.folder / "test.csv"), "--json", *options))
    assert result.code == 0, result.explanation
    return result


def test_every_site_gives_its_share_of_valid_rows(channel: Finished) -> None:
    shares = channel.json("release.json")
    assert shares["dropped"] == {} and sum(shares["rows"].values()) == 700
    for site, rows in shares["rows"].items():
        assert abs(rows - 700 * ROWS[site] / sum(ROWS.values())) < 1
    cohort, _ = read_table(channel.inputs.out / "cohort.csv", channel.inputs.schema, out_of_bounds="refuse")
    assert len(cohort) == 700


def test_every_ledger_ends_in_its_release_and_an_independent_count_agrees(channel: Finished) -> None:
    shares = channel.json("release.json")["rows"]
    for site, patients in ROWS.items():
        with Ledger(channel.inputs.out / "ledgers" / f"{site}.sqlite") as ledger:
            ledger.verify()
            *rounds, release = [entry.event for entry in ledger.entries()]
        assert len(rounds) == ROUNDS and all(isinstance(event, BoundedInfluence) for event in rounds)
        assert isinstance(release, ChannelRelease) and release.role == "release"
        assert (release.rows, release.patients, release.round) == (shares[site], round(0.3 * patients), ROUNDS + 1)
        multiplier = release.latent_noise / release.sensitivity
        again = cohort_epsilon(release.rows, release.patients, multiplier, DELTA)
        assert 0.95 * EPSILON < again <= EPSILON
        lines = {line.applies_to: line.epsilon for line in account_lines([*rounds, release], DELTA)}
        assert lines == {"fit patients": math.inf, "release patients": pytest.approx(again, abs=1e-6)}


def test_the_statement_tells_the_two_kinds_of_patients_apart(channel: Finished) -> None:
    entries = channel.json("privacy.json")["entries"]
    assert {(entry["site"], entry["adversary"]) for entry in entries} == {
        (site, adversary) for site in ROWS for adversary in ("public", "member", "coordinator")
    }
    for entry in entries:
        assert entry["epsilon"] == "infinity"
        lines = {line["applies_to"]: line["epsilon"] for line in entry["lines"]}
        assert lines["fit patients"] == "infinity" and 0.95 * EPSILON < lines["release patients"] <= EPSILON


def test_the_release_is_signed_and_nothing_of_a_patient_is_left(channel: Finished) -> None:
    payload = json.loads(base64.b64decode(channel.json("manifest.dsse.json")["payload"]))
    subjects = {subject["name"] for subject in payload["subject"]}
    assert {"cohort.csv", "release.json", "privacy.json"} <= subjects
    assert not list(channel.inputs.out.rglob("*released*")) and not list(channel.inputs.out.rglob("state.safetensors"))
    for path, content in read_all(channel.inputs.out):
        assert SECRET.encode() not in content, path
