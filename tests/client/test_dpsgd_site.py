"""A hospital in the mode dpsgd: what it answers, and what it spends."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from client.handlers import Site
from client.site import load_site
from common.messages import JoinRequest, Status, TrainReply, TrainRequest
from common.privacy.accountant import account
from common.privacy.dpsgd import dpsgd_schedule
from common.privacy.ledger import Ledger
from common.study import Protocol
from server.checkpoint import build_decoder
from tests.client.noised import SCHEMA, make_study
from tests.client.rounds import same


@pytest.fixture
def hospital(tmp_path: Path) -> Iterator[tuple[Site, Protocol]]:
    rows = ["age,ward,dead", *(f"{20 + i},{'abcd'[i % 4]},{'true' if i % 3 else 'false'}" for i in range(30))]
    (tmp_path / "patients.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "site.toml").write_text(
        '[site]\nname = "anna"\ndata = "patients.csv"\nstate = "state"\ndevice = "cpu"\n[policy]\nmodes = ["dpsgd"]\n'
    )
    yield Site(load_site(tmp_path / "site.toml")), Protocol(make_study(seed=None), SCHEMA)


def answer(site: Site, protocol: Protocol, number: int) -> TrainReply:
    request = TrainRequest(protocol.digest, number, 0.5, build_decoder(protocol, 0).arrays())
    return site.train(request.to_record())


def test_a_site_of_thirty_patients_spends_what_was_calibrated(hospital: tuple[Site, Protocol]) -> None:
    site, protocol = hospital
    assert site.join(JoinRequest(protocol.to_json()).to_record()).status is Status.OK
    assert [answer(site, protocol, number).status for number in (1, 2, 3, 4)] == [Status.OK] * 4
    assert answer(site, protocol, 5).status is Status.WRONG_ROUND  # no more than the schedule
    with Ledger(site.config.site.state / "ledger.sqlite", "anna") as ledger:
        events = [entry.event for entry in ledger.entries(protocol.digest)]
    assert events == [dpsgd_schedule(protocol.study, 30).event(number) for number in (1, 2, 3, 4)]
    assert 0.98 * 3.0 < account(events, protocol.study.privacy.delta).epsilon <= 3.0


@pytest.mark.parametrize(("limit", "status"), [(3.0, Status.OK), (2.9, Status.REFUSED_BY_POLICY)])
def test_the_whole_schedule_is_held_against_the_budget_before_round_1(
    hospital: tuple[Site, Protocol], limit: float, status: Status
) -> None:
    site, _ = hospital
    protocol = Protocol(make_study(seed=None, privacy={"max_epsilon": limit}), SCHEMA)
    assert site.join(JoinRequest(protocol.to_json()).to_record()).status is status


def test_a_resent_request_gets_the_same_bytes_though_the_noise_is_not_repeatable(
    hospital: tuple[Site, Protocol],
) -> None:
    site, protocol = hospital
    site.join(JoinRequest(protocol.to_json()).to_record())
    first, again = answer(site, protocol, 1), answer(site, protocol, 1)
    assert first.update is not None and again.update is not None and same(first.update, again.update)


def test_a_site_that_lost_its_state_takes_no_further_part(hospital: tuple[Site, Protocol]) -> None:
    site, protocol = hospital
    site.join(JoinRequest(protocol.to_json()).to_record())
    assert answer(site, protocol, 2).status is Status.OK  # a site that missed round 1 has lost nothing
    for path in site.config.site.state.glob("studies/*/state.safetensors"):
        path.unlink()
    assert answer(site, protocol, 3).status is Status.STORAGE_FAILED
    with Ledger(site.config.site.state / "ledger.sqlite", "anna") as ledger:
        assert len(ledger.entries(protocol.digest)) == 1
