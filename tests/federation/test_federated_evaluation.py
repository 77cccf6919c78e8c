"""A whole study whose sites score the cohort against their own patients, some of whom are held out."""

import base64
import json

import numpy as np
import pytest

from common.audit import read_audit
from common.evaluation.plan import count_plan
from common.evaluation.results import ALL
from common.privacy.events import BoundedInfluence, GaussianStatistics
from common.privacy.gaussian import gaussian_epsilon
from common.privacy.ledger import Ledger
from common.study import Protocol
from tests.federation.simulated import ROWS, SECRET, Finished, Inputs, finish, read_all

pytestmark = pytest.mark.federation
ROUNDS, EPSILON, DELTA, HOLDOUT = 3, 4.0, 1e-5, 0.4


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    inputs = Inputs.lay_out(tmp_path_factory.mktemp("evaluated"), rounds=ROUNDS, min_sites=4)
    settings = ("evaluation.method=accounted", f"evaluation.epsilon={EPSILON}", f"evaluation.holdout={HOLDOUT}")
    options = [part for setting in settings for part in ("--set", setting)]
    result = finish(inputs, inputs.start("--test", str(inputs.folder / "test.csv"), "--json", *options))
    assert result.code == 0, result.explanation
    return result


def test_every_site_answers_and_all_are_pooled(evaluated: Finished) -> None:
    found = evaluated.json("evaluation.json")
    assert found["dropped"] == {} and set(found["results"]) == {*ROWS, ALL}
    for site, rows in ROWS.items():
        held_out = round(HOLDOUT * rows)
        assert found["patients"][site] == {"everyone": rows, "fit": rows - held_out, "holdout": held_out}
    pooled = found["results"][ALL]
    assert pooled["marginals"]["age"]["patients"] == sum(ROWS.values())
    assert 0 <= pooled["utility"]["gradient_boosting/1"]["low"] <= pooled["utility"]["gradient_boosting/1"]["high"] <= 1


def test_the_ledgers_hold_the_spend_and_the_logs_what_left(evaluated: Finished) -> None:
    plan = count_plan(Protocol.from_json(evaluated.json("study.json")))
    statement = evaluated.json("privacy.json")
    assert statement["excludes"] is None
    for site in ROWS:
        with Ledger(evaluated.inputs.out / "ledgers" / f"{site}.sqlite") as ledger:
            ledger.verify()
            *rounds, last = [entry.event for entry in ledger.entries()]
        assert len(rounds) == ROUNDS and all(isinstance(event, BoundedInfluence) for event in rounds)
        assert isinstance(last, GaussianStatistics)
        assert gaussian_epsilon(DELTA, last.noise_multiplier) == pytest.approx(EPSILON, rel=1e-6)
        lines = read_audit(evaluated.inputs.out / "site-logs" / f"{site}.jsonl")
        (line,) = [line for line in lines if line["action"] == "evaluated"]
        assert len(line["values"]) == plan.size
        # Noise in every cell: no count left as it is.
        assert not np.any(np.array(line["values"]) == np.round(line["values"]))
        exposures = [entry["exposure"] for entry in statement["entries"] if entry["site"] == site]
        assert all("Noised statistics" in exposure["evaluated_in_words"] for exposure in exposures)


def test_the_evaluation_is_signed_and_nothing_of_a_patient_is_left(evaluated: Finished) -> None:
    payload = json.loads(base64.b64decode(evaluated.json("manifest.dsse.json")["payload"]))
    assert "evaluation.json" in {subject["name"] for subject in payload["subject"]}
    for path, content in read_all(evaluated.inputs.out):
        assert SECRET.encode() not in content, path
