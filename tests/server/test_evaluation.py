"""The federated evaluation at the coordinator: what is asked, what of the answers is believed, and what they mean."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from common.errors import FederationError
from common.evaluation.plan import count_plan, score_names
from common.evaluation.results import ALL
from common.evaluation.suppression import apply, suppress
from common.evaluation.tabulate import tabulate
from common.evaluation_messages import EvaluateReply, EvaluateRequest
from common.messages import EVALUATE, Status
from common.privacy.evaluation_release import evaluation_event, noised_counts
from common.privacy.holdout import holdout_slots
from common.privacy.ledger import GENESIS
from common.privacy.ledger_keys import SignedHead, public_hex, sign_head
from common.study import Protocol
from common.table import Table
from server.cohort import write_cohort
from server.evaluation import gather_evaluation
from server.roll import Roll
from server.run import RunFiles
from server.strategy import Member
from server.witness import Witness
from tests.common.evaluation.evaluated import SCHEMA, evaluated_protocol, patients

MEMBERS = (Member(11, "anna", 400), Member(12, "berta", 600), Member(13, "clara", 800))
COORDINATOR, SITE_KEY = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
Answer = Callable[[np.ndarray], "np.ndarray | Status | Error | None"]
UNNOISED: dict[str, Any] = {"method": "unnoised", "groups": [], "min_count": 5}


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower stamps every message with the task it was made in."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def signed(site: str, length: int = 1) -> tuple[int, str, str]:
    head = GENESIS if length == 0 else hashlib.sha256(f"{site}{length}".encode()).hexdigest()
    return length, head, sign_head("ledger head", SITE_KEY, site, length, head)


def honest(protocol: Protocol, cohort: np.ndarray, member: Member) -> np.ndarray:
    """What a site with `member.patients` patients like those of the cohort answers."""
    table = patients(member.patients, member.node_id)
    fit, held_out = holdout_slots(protocol.digest, len(table), protocol.study.evaluation.holdout)
    parts: Any = {"everyone": table, "fit": Table(SCHEMA, table.values[fit])}
    parts["holdout"] = Table(SCHEMA, table.values[held_out])
    plan, counts = tabulate(protocol, Table(SCHEMA, cohort), parts)
    if protocol.study.evaluation.method == "accounted":
        event = evaluation_event(protocol.study)
        return noised_counts(plan.join(counts), plan, event, member.node_id)[None, :]
    shown = apply(counts, suppress(plan, counts, protocol.study.evaluation.min_count))
    return np.concatenate([plan.join(shown), np.full(len(score_names(protocol)), 0.7)])[None, :]


class Sites:
    """Flower's grid with the three sites behind it; `answers` change what a site would have sent."""

    def __init__(self, protocol: Protocol, answers: dict[str, Answer]) -> None:
        self.protocol, self.answers, self.asked = protocol, answers, dict[str, EvaluateRequest]()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = []
        for message in messages:
            assert message.metadata.message_type == EVALUATE
            member = next(m for m in MEMBERS if m.node_id == message.metadata.dst_node_id)
            request = EvaluateRequest.from_record(message.content, len(SCHEMA.columns), 10_000)
            self.asked[member.site] = request
            sent = honest(self.protocol, request.cohort, member)
            found = self.answers.get(member.site, lambda values: values)(sent)
            if found is None:
                continue
            content: RecordDict | Error
            if isinstance(found, Error):
                content = found
            elif isinstance(found, Status):
                content = EvaluateReply(found, member.site, request.study).to_record()
            else:
                head = signed(member.site)
                content = EvaluateReply(Status.OK, member.site, request.study, found, *head).to_record()
            replies.append(Message(content, reply_to=message))
        return replies


def gather(out: Path, protocol: Protocol, **answers: Answer) -> tuple[dict[str, Any], Sites]:
    files = RunFiles(out)
    write_cohort([patients(2000, 99)], SCHEMA, files.cohort_csv, files.cohort_parquet, protocol.markers)
    witness = Witness(files.ledger_heads, COORDINATOR)
    for member in MEMBERS:
        witness.joined(SignedHead(member.site, *signed(member.site, 0), public_hex(SITE_KEY)))
    sites = Sites(protocol, answers)
    grid: Any = sites
    document = gather_evaluation(grid, protocol, MEMBERS, witness, files, Roll())
    assert json.loads(files.evaluation.read_text()) == document
    return document, sites


def test_sites_are_sent_the_first_rows_and_their_answers_are_pooled(tmp_path: Path) -> None:
    protocol = evaluated_protocol(rows=500, epsilon=8.0)
    document, sites = gather(tmp_path, protocol)
    assert np.array_equal(sites.asked["anna"].cohort, patients(2000, 99).values[:500], equal_nan=True)
    assert set(document["results"]) == {"anna", "berta", "clara", ALL} and document["dropped"] == {}
    whole = document["results"][ALL]
    assert whole["marginals"]["age"]["patients"] == 1800 and whole["utility"]["gradient_boosting/1"]["patients"] == 450
    # Cohort and patients come from one population: no distance stands out, and the model holds up on patients.
    assert sum(m["value"] > m["chance"] for m in whole["marginals"].values()) <= 2
    assert whole["utility"]["logistic_regression/1"]["high"] > 0.75
    assert whole["attacks"]["membership"]["distance"]["patients"] == 1350 and document["schema_version"] == 2
    gap = whole["utility"]["logistic_regression/1"]["observed_minus_predicted"]
    assert gap["low"] < 0.05 and gap["high"] > -0.05
    groups = document["results"]["anna"]["groups"]  # by site and, within it, by the columns the study names
    assert [(g["column"], g["group"]) for g in groups] == [("sex", "f"), ("sex", "m")]
    assert all({"low", "high", "observed_minus_predicted"} <= set(group) for group in groups)


def test_a_cohort_of_another_population_stands_out(tmp_path: Path) -> None:
    def shifted(values: np.ndarray) -> np.ndarray:
        plan = count_plan(protocol)
        counts = plan.split(values[0].copy())
        ages = counts["marginal", "age"]
        ages[:] = ages * np.linspace(0, 2, len(ages))
        return plan.join(counts)[None, :]

    protocol = evaluated_protocol(epsilon=8.0)
    document, _ = gather(tmp_path, protocol, anna=shifted, berta=shifted, clara=shifted)
    age = document["results"][ALL]["marginals"]["age"]
    assert age["value"] > 2 * age["chance"]


def test_unnoised_answers_say_that_no_epsilon_covers_them(tmp_path: Path) -> None:
    document, _ = gather(tmp_path, evaluated_protocol(**UNNOISED))
    assert "no ε" in document["caution"] and "excluding this evaluation" in document["caution"]
    assert document["epsilon"] is None
    assert document["results"]["anna"]["scores"]["tstr/gradient_boosting/1/auroc"] == 0.7
    assert document["results"][ALL]["scores"]["trtr/gradient_boosting/1/auroc"] == pytest.approx(0.7)
    assert document["results"][ALL]["detection"]["exact"]["value"] == pytest.approx(0.7)
    attacks = document["results"][ALL]["attacks"]
    assert attacks["membership"]["density"]["auroc"]["value"] == pytest.approx(0.7)
    assert attacks["copies"]["near"]["fit"]["value"] == pytest.approx(0.7, abs=1e-3)
    assert attacks["copies"]["near"]["difference"]["value"] == pytest.approx(0, abs=1e-3)


def changed(cell: int, value: float) -> Answer:
    def change(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values[0, cell] = value
        return values

    return change


@pytest.mark.parametrize(
    ("settings", "answer", "reason"),
    [
        (UNNOISED, changed(0, 3.0), "under the study's floor of 5"),
        (UNNOISED, changed(0, 0.0), "under the study's floor of 5"),
        (UNNOISED, changed(0, 11.5), "not whole numbers"),
        (UNNOISED, changed(0, 700.0), "more patients than it declared"),
        (UNNOISED, changed(-1, 1.5), "scores outside"),
        ({}, changed(5, np.nan), "hidden cells"),
        ({}, lambda values: values[:, :-1], "shape"),
        ({}, lambda values: np.zeros((1, 4)), "shape"),
        ({}, lambda _: Status.DATA_UNUSABLE, "data-unusable"),
        ({}, lambda _: None, "no reply before the deadline"),
        ({}, lambda _: Error(code=4), "error"),
    ],
)
def test_a_site_that_answers_otherwise_is_named_and_left_out(
    tmp_path: Path, settings: dict[str, Any], answer: Answer, reason: str
) -> None:
    document, _ = gather(tmp_path, evaluated_protocol(**settings), berta=answer)
    assert set(document["dropped"]) == {"berta"}, document["dropped"]
    assert reason in document["dropped"]["berta"] or reason == "error"
    assert set(document["results"]) == {"anna", "clara", ALL}
    assert document["results"][ALL]["marginals"]["sex"]["patients"] == 1200


def test_too_few_answers_stop_before_the_release(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="1 sites answered, at least 2"):
        gather(tmp_path, evaluated_protocol(), anna=lambda _: None, berta=lambda _: Status.CLOSED_NOW)
    assert not RunFiles(tmp_path).evaluation.exists()
