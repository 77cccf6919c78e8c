import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp.strategy import Strategy

from common.errors import CertificateError
from common.messages import TrainRequest
from common.privacy.update import update_norm
from server.strategy import Member, RoundReport
from tests.server.federation import (
    BOUND,
    NO_GRID,
    NODES,
    RADIUS,
    WEIGHTS,
    Federation,
    by_hand,
    distance,
    equal,
    lipschitz,
)

pytestmark = pytest.mark.usefixtures("identity")


# ---------------------------------------------------------------- a round in which all is well


def test_it_is_a_strategy_of_flower(federation: Federation) -> None:
    assert isinstance(federation.strategy, Strategy)


def test_every_member_is_sent_the_decoder_and_its_weight(federation: Federation) -> None:
    requests = federation.requests(4)
    assert requests.keys() == set(NODES.values())
    shapes = {n: tuple(a.shape) for n, a in federation.decoder.arrays().items()}
    for site, node in NODES.items():
        assert requests[node].metadata.message_type == "train.round"
        request = TrainRequest.from_record(requests[node].content, shapes)
        assert (request.study, request.round, request.weight) == (federation.protocol.digest, 4, WEIGHTS[site])
        assert equal(request.decoder, federation.decoder.arrays())


def test_the_aggregate_is_the_weighted_sum_projected(federation: Federation) -> None:
    for number in range(1, 4):
        start = federation.decoder.arrays()
        updates = {site: federation.update(10 * number + i) for i, site in enumerate(WEIGHTS)}
        after, expected = federation.play(updates, number), by_hand(start, updates)
        for name, array in after.items():
            np.testing.assert_allclose(array.numpy(), expected[name], rtol=1e-5, atol=2e-6)
        # The projection had something to do, so that this test sees it.
        step = {n: sum(WEIGHTS[s] * u[n].to(torch.float64) for s, u in updates.items()) for n in start}
        assert max(float((after[n] - start[n] - step[n]).abs().max()) for n in start if n.endswith("weight")) > 1e-2
        report, reported = federation.reports[-1]
        assert equal(reported, after)
        assert (report.round, report.answered, dict(report.dropped)) == (number, ("anna", "berta", "clara"), {})
        assert report.step_norm == pytest.approx(update_norm({n: torch.as_tensor(a) for n, a in step.items()}))
        assert lipschitz(after) <= report.certificate <= BOUND
        assert report.certificate == pytest.approx(lipschitz(after), rel=1e-5)


def test_the_order_of_replies_does_not_matter() -> None:
    results = []
    for flip in (False, True):
        federation = Federation()
        answers = federation.answers({site: federation.update(i) for i, site in enumerate(WEIGHTS)})
        federation.strategy.aggregate_train(1, answers[::-1] if flip else answers)
        results.append(federation.decoder.arrays())
    assert equal(*results)


def test_flower_carries_no_weights_between_rounds(federation: Federation) -> None:
    """The decoder is the strategy's own; what Flower is given back it would only log and hand over again."""
    before = federation.decoder.arrays()
    answers = federation.answers({site: federation.update(i) for i, site in enumerate(WEIGHTS)})
    arrays, metrics = federation.strategy.aggregate_train(1, answers)
    assert metrics is None and arrays is not None and not list(arrays.items())
    assert not equal(federation.decoder.arrays(), before)


def test_no_site_is_ever_asked_to_evaluate(federation: Federation) -> None:
    assert list(federation.strategy.configure_evaluate(1, ArrayRecord(), ConfigRecord(), NO_GRID)) == []
    assert federation.strategy.aggregate_evaluate(1, []) is None


# ---------------------------------------------------------------- T1 and T2


def test_no_updates_whatever_lead_out_of_the_bound(federation: Federation) -> None:
    for number in range(1, 6):
        # All sites push every layer along its own top singular pair: the steepest way out.
        push: dict[str, torch.Tensor] = {}
        for name, array in federation.decoder.arrays().items():
            push[name] = torch.zeros_like(array)
            if name.endswith("weight"):
                left, _, right = torch.linalg.svd(array)
                push[name] = torch.outer(left[:, 0], right[0])
        scale = RADIUS * (1 - 1e-6) / update_norm(push)
        after = federation.play({site: {n: a * scale for n, a in push.items()} for site in WEIGHTS}, number)
        assert lipschitz(after) <= BOUND
        assert lipschitz(after) > 0.999 * BOUND  # the push was real


@pytest.mark.parametrize("site", WEIGHTS)
def test_replacing_all_of_a_site_moves_the_decoder_by_at_most_twice_its_weighted_radius(site: str) -> None:
    largest = 0.0
    for seed in range(12):
        results = []
        for sign in (1.0, -1.0):
            federation = Federation()
            updates = {name: federation.update(100 * seed + i, 0.3) for i, name in enumerate(WEIGHTS)}
            own = federation.update(7000 + seed)
            if seed % 2:  # along the biases, which no projection shortens, the bound is attained
                own = {n: a if n.endswith("bias") else torch.zeros_like(a) for n, a in own.items()}
                own = {n: a * (RADIUS * (1 - 1e-6) / update_norm(own)) for n, a in own.items()}
            updates[site] = {n: sign * a for n, a in own.items()}
            results.append(federation.play(updates))
        largest = max(largest, distance(*results))
    bound = 2 * WEIGHTS[site] * RADIUS
    assert 0.99 * bound < largest <= bound * (1 + 1e-5)


def test_a_missing_site_is_not_made_up_for(federation: Federation) -> None:
    start = federation.decoder.arrays()
    updates = {site: federation.update(i) for i, site in enumerate(("anna", "berta"))}
    after, expected = federation.play(updates), by_hand(start, updates)  # weights 1/8 and 1/4, not 1/3 and 2/3
    for name, array in after.items():
        np.testing.assert_allclose(array.numpy(), expected[name], rtol=1e-5, atol=2e-6)
    report, _ = federation.reports[-1]
    assert report.dropped == {"clara": "no reply before the deadline"}
    assert report.step_norm < (WEIGHTS["anna"] + WEIGHTS["berta"]) * RADIUS


# ---------------------------------------------------------------- the certificate, and the reference mode


@pytest.mark.parametrize("spoil", [1.01, math.nan, math.inf])
def test_a_decoder_that_fails_its_certificate_is_never_sent(federation: Federation, spoil: float) -> None:
    federation.play({site: federation.update(i) for i, site in enumerate(WEIGHTS)})
    with torch.no_grad():
        for layer in federation.decoder.network.linears:
            layer.weight.mul_(spoil)
    handed_out: list[Message] = []
    messages: Iterable[Message] = federation.strategy.configure_train(2, ArrayRecord(), ConfigRecord(), NO_GRID)
    with pytest.raises(CertificateError, match="the study declares at most 10"):
        handed_out.extend(messages)
    assert handed_out == []


def test_the_reference_mode_takes_updates_of_any_length_and_projects_nothing() -> None:
    federation = Federation(mode="none")
    start = federation.decoder.arrays()
    updates = {site: federation.update(i, 50 * RADIUS) for i, site in enumerate(WEIGHTS)}
    after = federation.play(updates)
    for name, array in after.items():
        expected = start[name] + sum(WEIGHTS[site] * update[name] for site, update in updates.items())
        torch.testing.assert_close(array, expected)
    assert lipschitz(after) > BOUND and federation.reports[-1][0].certificate >= lipschitz(after)
    assert len(federation.requests(2)) == 3


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ((Member(1, "anna", 5), Member(2, "anna", 5)), "names must be unique"),
        ((Member(1, "anna", 5), Member(1, "berta", 5)), "a node of its own"),
        ((Member(1, "anna", 5), Member(2, "berta", 0)), "at least one patient"),
        ((Member(1, "anna", 5),), "1 members, but min_sites is 2"),
        ((), "0 members, but min_sites is 2"),
    ],
)
def test_members_that_cannot_be(members: tuple[Member, ...], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Federation(members)


def test_a_round_report_as_a_line() -> None:
    report = RoundReport(3, ("anna",), {"berta": "data-unusable"}, 9.5, 0.25, 1.23456789, 0.00123456)
    assert report.to_json() == {
        "round": 3,
        "answered": ["anna"],
        "dropped": {"berta": "data-unusable"},
        "certificate": 9.5,
        "step_norm": 0.25,
        "seconds": 1.2346,
        "server_seconds": 0.0012,
    }
