"""The evaluation at a hospital: what it counts, what it spends, what it hides, and that it says it only once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.patients import roles_of
from common.audit import AUDIT_LOG, read_audit
from common.encoding import TableEncoding
from common.evaluation.counts import bins_of, cells_of
from common.evaluation.plan import count_plan, score_names
from common.evaluation.results import evaluation_results
from common.generation import sample_prior
from common.messages import Status
from common.privacy.accountant import account
from common.privacy.events import GaussianStatistics, UnnoisedAggregates
from common.privacy.ledger import Ledger
from common.records import values_digest
from common.study import Protocol
from common.table import Table, read_table
from server.checkpoint import build_decoder
from tests.client.hospital import ROUNDS, ROWS, Hospital, evaluate_request, join_request, study, train_request
from tests.disk import full_disk

EPSILON = 2.0


def evaluated_study(method: str = "accounted", **changes: Any) -> Protocol:
    evaluation = {"method": method, "holdout": 0.3} | ({"epsilon": EPSILON} if method == "accounted" else {}) | changes
    return study(study={"target": "dead"}, evaluation=evaluation, privacy={"delta": 1e-4})


def cohort_of(protocol: Protocol, rows: int = 200, seed: int = 3) -> np.ndarray:
    tables = sample_prior(build_decoder(protocol, 0), TableEncoding(protocol.schema), rows, seed)
    return np.vstack([table.values for table in tables])


ACCOUNTED = evaluated_study()
UNNOISED = evaluated_study("unnoised")
ALLOWED = 'evaluation = "unnoised"\nmin_count = 3\nmin_patients = 3'


def events(hospital: Hospital) -> list[Any]:
    with Ledger(hospital.state / "ledger.sqlite") as ledger:
        return [entry.event for entry in ledger.entries()]


def test_noised_counts_are_spent_before_they_leave(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path / "anna").joined(ACCOUNTED)
    cohort = cohort_of(ACCOUNTED)
    reply = hospital.evaluate(evaluate_request(ACCOUNTED, cohort), ACCOUNTED)
    assert reply.status is Status.OK and reply.aggregates is not None
    assert not np.isnan(reply.aggregates).any()
    (event,) = events(hospital)
    assert isinstance(event, GaussianStatistics) and event.round == ROUNDS + 2
    assert account([event], 1e-4).epsilon == pytest.approx(EPSILON, rel=1e-6)
    assert hospital.spends() == [(ROUNDS + 2, values_digest(reply.aggregates))]


def test_the_noise_is_that_of_the_event(tmp_path: Path) -> None:
    """Noise of many cells of some sites against the declared deviation; without it they would be whole numbers."""
    plan = count_plan(ACCOUNTED)
    cohort = cohort_of(ACCOUNTED)
    draws, sigmas = [], set()
    for number in range(6):  # every site is a new one: the noise of a site is drawn once
        hospital = Hospital(tmp_path / f"s{number}").joined(ACCOUNTED)
        reply = hospital.evaluate(evaluate_request(ACCOUNTED, cohort), ACCOUNTED)
        assert reply.aggregates is not None
        patients, _ = read_table(hospital.data, ACCOUNTED.schema)
        sigma = plan.split(plan.deviations(events(hospital)[0].noise_multiplier))
        found = plan.split(reply.aggregates[0])
        for column in ACCOUNTED.schema.columns:
            exact = np.bincount(cells_of(patients[column.name], column), minlength=bins_of(column))
            draws += (found["marginal", column.name] - exact).tolist()
            sigmas.add(sigma["marginal", column.name].flat[0])
    (sigma,) = sigmas
    assert len(draws) == 6 * 18
    assert 0.72 < np.std(draws) / sigma < 1.3 and abs(np.mean(draws)) < 4 * sigma / np.sqrt(len(draws))


def test_the_same_request_gets_the_same_bytes_and_another_cohort_none(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path / "anna").joined(ACCOUNTED)
    cohort = cohort_of(ACCOUNTED)
    first, again = (hospital.evaluate(evaluate_request(ACCOUNTED, cohort), ACCOUNTED) for _ in range(2))
    assert first.aggregates is not None and again.aggregates is not None
    assert first.aggregates.tobytes() == again.aggregates.tobytes() and len(hospital.spends()) == 1
    other = hospital.evaluate(evaluate_request(ACCOUNTED, cohort_of(ACCOUNTED, seed=4)), ACCOUNTED)
    assert other.status is Status.WRONG_ROUND and len(hospital.spends()) == 1


def test_what_left_stands_in_the_audit_log(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path / "anna").joined(ACCOUNTED)
    reply = hospital.evaluate(evaluate_request(ACCOUNTED, cohort_of(ACCOUNTED)), ACCOUNTED)
    assert reply.aggregates is not None
    line = next(entry for entry in read_audit(hospital.state / AUDIT_LOG) if entry["action"] == "evaluated")
    assert np.array(line["values"]).tobytes() == reply.aggregates[0].tobytes()
    assert line["digest"] == values_digest(reply.aggregates)


def test_unnoised_counts_are_exact_or_hidden(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path / "anna", ALLOWED).joined(UNNOISED)
    protocol = evaluated_study("unnoised", min_count=3)
    hospital.joined(protocol)
    reply = hospital.evaluate(evaluate_request(protocol, cohort_of(protocol)), protocol)
    assert reply.status is Status.OK and reply.aggregates is not None
    plan = count_plan(protocol)
    counts = plan.split(reply.aggregates[0, : plan.size])
    shown = reply.aggregates[0, : plan.size]
    assert ((shown >= 3) | np.isnan(shown)).all() and np.isnan(shown).any()
    patients, _ = read_table(hospital.data, protocol.schema)
    assert counts["marginal", "dead"].tolist() == np.bincount(patients["dead"].astype(int), minlength=2).tolist()
    assert len(reply.aggregates[0]) == plan.size + len(score_names(protocol)) > plan.size
    (event,) = events(hospital)
    assert isinstance(event, UnnoisedAggregates) and account([event], 1e-4).excludes


def test_a_cell_that_was_hidden_once_stays_hidden(tmp_path: Path) -> None:
    """Also in a later study with a lower floor and one patient more, and no small difference appears."""
    hospital = Hospital(tmp_path / "anna", ALLOWED)
    first, second = (evaluated_study("unnoised", min_count=floor) for floor in (8, 3))
    answers = []
    for protocol in (first, second):
        reply = hospital.joined(protocol).evaluate(evaluate_request(protocol, cohort_of(protocol)), protocol)
        assert reply.aggregates is not None
        answers.append(reply.aggregates[0, : count_plan(protocol).size])
        hospital.data.write_text(hospital.data.read_text() + "50,f,true\n")
    hidden, shown = np.isnan(answers[0]), ~np.isnan(answers[1])
    assert hidden.any() and not (hidden & shown).any()
    both = ~hidden & shown
    change = np.abs(answers[1][both] - answers[0][both])
    assert ((change == 0) | (change >= 3)).all()


def test_a_damaged_memory_of_what_was_published_stops_the_answer(tmp_path: Path) -> None:
    protocol = evaluated_study("unnoised", min_count=3)
    hospital = Hospital(tmp_path / "anna", ALLOWED).joined(protocol)
    (hospital.state / "published.json").write_text("{")
    reply = hospital.evaluate(evaluate_request(protocol, cohort_of(protocol)), protocol)
    assert reply.status is not Status.OK and hospital.spends() == []
    assert "published.json" in hospital.reason(reply.status)


@pytest.mark.parametrize(
    ("policy", "method"), [("", "unnoised"), ('evaluation = "none"', "accounted"), ('evaluation = "none"', "unnoised")]
)
def test_the_policy_decides_which_evaluation_is_answered(tmp_path: Path, policy: str, method: str) -> None:
    hospital = Hospital(tmp_path / "anna", policy)
    record = evaluated_study(method)
    assert hospital.join(join_request(record)).status is Status.REFUSED_BY_POLICY
    assert method in hospital.reason(Status.REFUSED_BY_POLICY)


def test_a_study_without_evaluation_is_not_evaluated(tmp_path: Path) -> None:
    protocol = study(study={"target": "dead"})
    hospital = Hospital(tmp_path / "anna").joined(protocol)
    reply = hospital.evaluate(evaluate_request(protocol, cohort_of(protocol, rows=20)), protocol)
    assert reply.status is Status.BAD_REQUEST and hospital.spends() == []


def test_rows_that_do_not_fit_the_schema_are_refused(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path / "anna").joined(ACCOUNTED)
    cohort = cohort_of(ACCOUNTED)
    cohort[0, 0] = 1e6
    assert hospital.evaluate(evaluate_request(ACCOUNTED, cohort), ACCOUNTED).status is Status.BAD_REQUEST
    many = np.repeat(cohort_of(ACCOUNTED), 60, axis=0)
    assert hospital.evaluate(evaluate_request(ACCOUNTED, many), ACCOUNTED).status is Status.BAD_REQUEST
    assert hospital.spends() == []


def test_a_cohort_of_another_schema_or_without_rows_is_refused(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path / "anna").joined(ACCOUNTED)
    cohort = cohort_of(ACCOUNTED)
    levels = cohort.copy()
    levels[:, 1] = 7.0  # a level that this schema does not have
    missing = cohort.copy()
    missing[0, 2] = np.nan  # in a column that it requires
    for rows in (cohort[:, :2], np.column_stack([cohort, cohort[:, 0]]), cohort[:0], levels, missing):
        reply = hospital.evaluate(evaluate_request(ACCOUNTED, rows), ACCOUNTED)
        assert reply.status is Status.BAD_REQUEST
        hospital.reason(Status.BAD_REQUEST)  # and its log quotes nobody
    assert hospital.spends() == []


@pytest.mark.parametrize("method", ["accounted", "unnoised"])
def test_a_site_with_one_outcome_class_answers(tmp_path: Path, method: str) -> None:
    protocol = evaluated_study(method, **({"min_count": 3} if method == "unnoised" else {}))
    hospital = Hospital(tmp_path / "anna", ALLOWED)
    hospital.data.write_text(hospital.data.read_text().replace("false", "true"))
    reply = hospital.joined(protocol).evaluate(evaluate_request(protocol, cohort_of(protocol)), protocol)
    assert reply.status is Status.OK and reply.aggregates is not None
    names = score_names(protocol)
    scores = dict(zip(names, reply.aggregates[0, count_plan(protocol).size :].tolist(), strict=True))
    if method == "unnoised":  # no AUROC without patients of both kinds, whoever the model was learned from
        assert all(math.isnan(value) for name, value in scores.items() if name.startswith(("tstr/", "trtr/")))
        assert 0 <= scores["membership/distance/auroc"] <= 1
    results = evaluation_results(
        protocol, Table(protocol.schema, cohort_of(protocol)), {"anna": reply.aggregates}, {"anna": ROWS}
    )
    json.dumps(results, allow_nan=False)


@pytest.mark.parametrize(("holdout", "policy"), [(0.01, "min_count = 1"), (0.1, ""), (0.99, "min_count = 1")])
def test_a_holdout_that_leaves_hardly_anybody_is_too_few(tmp_path: Path, holdout: float, policy: str) -> None:
    """Nobody held out, four of forty under the floor of 11, nobody who takes part: refused before anything is done."""
    hospital = Hospital(tmp_path / "anna", policy)
    assert hospital.join(join_request(evaluated_study(holdout=holdout))).status is Status.TOO_FEW_PATIENTS
    assert "held out" in hospital.reason(Status.TOO_FEW_PATIENTS) or "holds out" in hospital.reason(
        Status.TOO_FEW_PATIENTS
    )


def test_unnoised_values_stand_in_the_log_as_they_left(tmp_path: Path) -> None:
    """Hidden cells as null; scores, those of attacks too, behind the counts."""
    protocol = evaluated_study("unnoised", min_count=3)
    hospital = Hospital(tmp_path / "anna", ALLOWED).joined(protocol)
    reply = hospital.evaluate(evaluate_request(protocol, cohort_of(protocol)), protocol)
    assert reply.aggregates is not None
    line = next(entry for entry in read_audit(hospital.state / AUDIT_LOG) if entry["action"] == "evaluated")
    logged = np.array([np.nan if value is None else value for value in line["values"]])
    assert logged.tobytes() == reply.aggregates[0].tobytes() and line["digest"] == values_digest(reply.aggregates)
    assert len(logged) == count_plan(protocol).size + len(score_names(protocol))


def test_a_budget_that_the_evaluation_would_exceed_refuses_the_study(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path / "anna", 'modes = ["dpsgd"]\nmax_epsilon_per_study = 4.0')
    protocols = []
    for epsilon in (0.5, 3.0):
        document = evaluated_study(epsilon=epsilon).study.document()
        document["training"]["mode"], document["privacy"]["epsilon"] = "dpsgd", 3.0
        protocols.append(Protocol(type(ACCOUNTED.study).model_validate(document), ACCOUNTED.schema))
    assert hospital.join(join_request(protocols[0])).status is Status.OK
    assert hospital.join(join_request(protocols[1])).status is Status.REFUSED_BY_POLICY


def test_nothing_leaves_that_cannot_be_logged_or_stored(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path / "anna").joined(ACCOUNTED)
    with full_disk(2000):
        reply = hospital.evaluate(evaluate_request(ACCOUNTED, cohort_of(ACCOUNTED)), ACCOUNTED)
    assert reply.status in (Status.STORAGE_FAILED, Status.LEDGER_FAILED) and hospital.spends() == []


def test_held_out_patients_do_not_train(tmp_path: Path) -> None:
    """Two tables that differ in held-out patients alone give the same update; the roles do not depend on the table."""
    protocol = evaluated_study()
    roles = roles_of(protocol, ROWS)
    assert len(roles.holdout) == round(0.3 * ROWS) and not set(roles.holdout) & set(roles.fit)
    seeded = json.loads(json.dumps(protocol.study.document()))
    seeded["study"]["seed"] = 7
    protocol = Protocol(type(protocol.study).model_validate(seeded), protocol.schema)
    roles = roles_of(protocol, ROWS)
    updates = []
    for name in ("a", "b", "c"):
        hospital = Hospital(tmp_path / name, "simulation = true")
        lines = hospital.data.read_text().splitlines()
        slot = {"a": None, "b": int(roles.holdout[0]), "c": int(roles.fit[0])}[name]
        if slot is not None:
            lines[1 + slot] = "119.5,m,false"
        hospital.data.write_text("\n".join(lines) + "\n")
        reply = hospital.joined(protocol).train(train_request(1, protocol), protocol)
        assert reply.update is not None
        updates.append(np.concatenate([array.numpy().ravel() for array in reply.update.values()]))
    assert np.array_equal(updates[0], updates[1]) and not np.array_equal(updates[0], updates[2])


def test_a_table_in_another_order_is_not_evaluated(tmp_path: Path) -> None:
    """Else held-out patients would be among those who trained."""
    hospital = Hospital(tmp_path / "anna").joined(ACCOUNTED)
    lines = hospital.data.read_text().splitlines()
    hospital.data.write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n")
    reply = hospital.evaluate(evaluate_request(ACCOUNTED, cohort_of(ACCOUNTED)), ACCOUNTED)
    assert reply.status is Status.DATA_UNUSABLE and hospital.spends() == []
