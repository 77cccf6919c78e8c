"""The budget: refused before anything is sent, with the numbers."""

from pathlib import Path
from typing import Any

import pytest

from common.messages import (
    JoinReply,
    Status,
)
from common.privacy.accountant import account
from common.privacy.events import GaussianUpdate
from common.privacy.ledger import Ledger
from common.study import Protocol
from tests.client.hospital import PROTOCOL, RADIUS, ROUNDS, ROWS, Hospital, join_request, study, table, train_request


def noisy(name: str = "s", max_epsilon: float | None = None, **training: Any) -> Protocol:
    """A study whose three rounds cost ε = ONE."""
    privacy: dict[str, Any] = {"update_noise": NOISE, "accept_useless_noise": True}
    if max_epsilon is not None:
        privacy["max_epsilon"] = max_epsilon
    return study(study={"name": name}, privacy=privacy, training=training)


NOISE = 4.0
ONE, TWO = (  # one such study, and two
    account([GaussianUpdate(n, RADIUS, NOISE, 1.0) for n in range(ROUNDS * k)], 1e-5).epsilon for k in (1, 2)
)


def test_without_a_limit_an_infinite_epsilon_is_accepted_and_logged(hospital: Hospital) -> None:
    hospital.joined()
    assert hospital.log()[-1]["epsilon"] == "infinity"
    hospital.joined(noisy())
    assert hospital.log()[-1]["epsilon"] == pytest.approx(ONE) and hospital.log()[-1]["delta"] == 1e-5


@pytest.mark.parametrize(
    ("protocol", "policy"),
    [
        (study(privacy={"max_epsilon": 1e6}), ""),
        (PROTOCOL, "max_epsilon = 1e6"),
        (noisy(max_epsilon=ONE * 0.999), ""),
        (noisy(), f"max_epsilon = {ONE * 0.999}"),
        (noisy(max_epsilon=ONE * 0.999), "max_epsilon = 1e6"),  # the stricter of the two
        (noisy(max_epsilon=1e6), f"max_epsilon = {ONE * 0.999}"),
    ],
)
def test_a_schedule_that_would_overspend_is_refused_before_it_starts(
    tmp_path: Path, protocol: Protocol, policy: str
) -> None:
    hospital = Hospital(tmp_path / "anna", policy)
    assert hospital.join(join_request(protocol)) == JoinReply(Status.REFUSED_BY_POLICY, "anna")
    reason = hospital.reason(Status.REFUSED_BY_POLICY)
    assert "the whole schedule would reach epsilon = " in reason and "more than the budget of" in reason
    assert ("infinity" if protocol.study.privacy.update_noise == 0 else f"{ONE:.4g}") in reason
    assert hospital.train(train_request(protocol=protocol), protocol).status is Status.UNKNOWN_STUDY
    assert hospital.spends() == []


def test_a_schedule_within_the_limit_runs_to_its_end_and_no_further(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path / "anna", f"max_epsilon = {ONE * 1.001}")
    protocol = noisy()
    hospital.joined(protocol)
    for number in range(1, ROUNDS + 1):
        assert hospital.train(train_request(number, protocol), protocol).status is Status.OK
        hospital.joined(protocol)  # joining again in the middle counts nothing twice
    assert len(hospital.spends()) == ROUNDS
    longer = noisy("longer", rounds=1)
    assert hospital.join(join_request(longer)).status is Status.REFUSED_BY_POLICY
    assert f"spent so far: {ONE:.4g}" in hospital.reason(Status.REFUSED_BY_POLICY)


def test_all_studies_of_a_site_share_its_limit(tmp_path: Path) -> None:
    limit = (ONE + TWO) / 2  # room for one study, not for two
    hospital = Hospital(tmp_path / "anna", f"max_epsilon = {limit}")
    first, second = noisy("first"), noisy("second")
    hospital.joined(first).joined(second)  # nothing is spent yet, so each fits
    answers: list[Status] = []
    for number in range(1, ROUNDS + 1):
        for protocol in (first, second):
            answers.append(hospital.train(train_request(number, protocol), protocol).status)
    # The first spend of one leaves too little room for the whole of the other.
    assert set(answers) == {Status.OK, Status.REFUSED_BY_POLICY} and answers.count(Status.OK) == len(hospital.spends())
    with Ledger(hospital.state / "ledger.sqlite") as ledger:
        assert account([entry.event for entry in ledger.entries()], 1e-5).epsilon <= limit
        assert ledger.verify()[0] == answers.count(Status.OK)


def test_a_limit_that_became_stricter_holds_for_the_next_round(hospital: Hospital) -> None:
    protocol = noisy()
    assert hospital.joined(protocol).train(train_request(1, protocol), protocol).status is Status.OK
    policy = hospital.config.policy.model_copy(update={"max_epsilon": ONE * 0.999})
    hospital.config = hospital.config.model_copy(update={"policy": policy})
    assert hospital.train(train_request(2, protocol), protocol).status is Status.REFUSED_BY_POLICY
    assert len(hospital.spends()) == 1 and [e["action"] for e in hospital.log()].count("trained") == 1


def test_a_delta_that_would_expose_patients_is_refused(hospital: Hospital) -> None:
    too_large = study(privacy={"delta": 1.01 / (10 * ROWS)})
    assert hospital.join(join_request(too_large)) == JoinReply(Status.REFUSED_BY_POLICY, "anna")
    reason = hospital.reason(Status.REFUSED_BY_POLICY)
    assert "is too large" in reason and f"{ROWS} patients of site 'anna'" in reason
    # n^-1.5 lies above 1/(10 n) below a hundred patients, so a warning needs more of them.
    hospital.joined(study(privacy={"delta": 0.99 / (10 * ROWS)}))
    assert not [entry for entry in hospital.log() if entry["action"] == "warning"]
    hospital.data.write_text(table(150))
    hospital.joined(study(privacy={"delta": 1.01 * 150**-1.5}))
    (warning,) = [entry for entry in hospital.log() if entry["action"] == "warning"]
    assert "is large: delta * n = " in warning["reason"] and "150 patients" in warning["reason"]
