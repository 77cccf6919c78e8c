"""What the strategy does with bad replies, and with the heads of the sites' ledgers."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Error, Message, RecordDict

from common.errors import FederationError
from common.messages import ARRAYS, HEADER, Status, TrainReply, TrainRequest
from common.privacy.ledger import GENESIS
from common.privacy.ledger_keys import head_holds, public_hex
from common.records import PROTOCOL_VERSION
from server.witness import Witness
from tests.packed import pack, unpack
from tests.server.federation import COORDINATOR, NODES, RADIUS, SECRET, WEIGHTS, Federation, SiteLedger, by_hand, equal

pytestmark = pytest.mark.usefixtures("identity")


# ---------------------------------------------------------------- bad replies


def reply(federation: Federation, member: str, /, **changes: Any) -> Message:
    """A reply of `member` that is right except for `changes`: header fields, or `arrays` by name."""
    record = federation.record(member, federation.update(5))
    header, arrays = dict(record.config_records[HEADER]), unpack(record.config_records[ARRAYS])
    arrays |= changes.pop("arrays", {})
    header |= changes
    content = RecordDict({HEADER: ConfigRecord(header), ARRAYS: pack(arrays)})
    return Message(content, reply_to=federation.requests()[NODES[member]])


def with_content(content: RecordDict) -> Callable[[Federation], list[Message]]:
    return lambda f: [Message(content, reply_to=f.requests()[NODES["clara"]])]


def changed(**changes: Any) -> Callable[[Federation], list[Message]]:
    return lambda f: [reply(f, "clara", **changes)]


def sent(update: Callable[[Federation], Mapping[str, torch.Tensor]]) -> Callable[[Federation], list[Message]]:
    return lambda f: [Message(f.record("clara", update(f)), reply_to=f.requests()[NODES["clara"]])]


def spoilt_entry(value: float) -> Callable[[Federation], list[Message]]:
    def update(federation: Federation) -> dict[str, torch.Tensor]:
        arrays = federation.update(5)
        arrays["network.layers.1.weight"][0, 0] = value
        return arrays

    return sent(update)


def raw(**content: Any) -> Callable[[Federation], list[Message]]:
    """A reply whose arrays are these fields in place of a safetensors document."""

    def make(federation: Federation) -> list[Message]:
        header = federation.record("clara", federation.update(5)).config_records[HEADER]
        message = RecordDict({HEADER: header, ARRAYS: ConfigRecord(content)})
        return [Message(message, reply_to=federation.requests()[NODES["clara"]])]

    return make


def bias(array: np.ndarray) -> Callable[[Federation], list[Message]]:
    return changed(arrays={"network.layers.0.bias": array})


def refusal(status: Status) -> Callable[[Federation], list[Message]]:
    return lambda f: [
        Message(TrainReply(status, "clara", f.protocol.digest, 1).to_record(), reply_to=f.requests()[NODES["clara"]])
    ]


BAD: dict[str, tuple[Callable[[Federation], list[Message]], str]] = {
    "NaN": (spoilt_entry(math.nan), "entries that are not finite"),
    "infinity": (spoilt_entry(math.inf), "entries that are not finite"),
    "just outside": (sent(lambda f: f.update(5, RADIUS * (1 + 1e-5))), "the update's norm exceeds C = 2"),
    "ten times": (sent(lambda f: f.update(5, 10 * RADIUS)), "the update's norm exceeds C = 2"),
    "huge": (sent(lambda f: f.update(5, 1e30)), "the update's norm exceeds C = 2"),
    "wrong shape": (bias(np.zeros(9, np.float32)), "is not float32 of shape (8,)"),
    "transposed": (changed(arrays={"network.layers.0.weight": np.zeros((3, 8), np.float32)}), "shape (8, 3)"),
    "wrong dtype": (bias(np.zeros(8, np.float64)), "is not float32"),
    "integers": (bias(np.zeros(8, np.int32)), "is not float32"),
    "one array more": (changed(arrays={"extra": np.zeros(1, np.float32)}), "arrays named differently"),
    "no arrays": (
        lambda f: [
            Message(
                RecordDict({HEADER: f.record("clara", f.update(5)).config_records[HEADER]}),
                reply_to=f.requests()[NODES["clara"]],
            )
        ],
        "no arrays",
    ),
    "garbage bytes": (raw(content=b"\x00garbage"), "cannot be decoded"),
    "no bytes": (raw(content=b""), "cannot be decoded"),
    "text": (raw(content=SECRET), "not one safetensors document"),
    "a list": (raw(content=[1.0, 2.0]), "not one safetensors document"),
    "one field more than the document": (raw(content=b"", more=1), "not one safetensors document"),
    "a header that claims terabytes": (raw(content=b"\xff\xff\xff\xff\xff\x00\x00\x00{}"), "cannot be decoded"),
    "oversized": (raw(content=b"x" * 100_000), "100000 bytes of arrays, more than"),
    "wrong round": (changed(round=2), "answers round 2"),
    "other study": (changed(study="f" * 64), "answers another study"),
    "other site's name": (changed(site="anna"), "answers under another site's name"),
    "unknown status": (changed(status="fine"), "unknown status code"),
    "another version": (changed(version=PROTOCOL_VERSION + 1), "protocol version"),
    "one field more": (changed(loss=0.5), "fields are not those of the protocol"),
    "round as text": (changed(round="1"), "header field 'round'"),
    "round as boolean": (changed(round=True), "header field 'round'"),
    "empty": (with_content(RecordDict({})), "no header"),
    "something else": (with_content(RecordDict({"x": ConfigRecord({"y": SECRET})})), "no header"),
    "Flower error": (
        lambda f: [Message(Error(0, f"ValueError: {SECRET}"), reply_to=f.requests()[NODES["clara"]])],
        "Flower reports error 0",
    ),
    "no reply": (lambda f: [], "no reply before the deadline"),
} | {status.value: (refusal(status), status.value) for status in Status if status is not Status.OK}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_reply_is_dropped_by_name_and_the_round_goes_on(federation: Federation, kind: str) -> None:
    bad, expected = BAD[kind]
    start = federation.decoder.arrays()
    good = {site: federation.update(i) for i, site in enumerate(("anna", "berta"))}
    federation.strategy.aggregate_train(1, [*bad(federation), *federation.answers(good)])
    report, _ = federation.reports[-1]
    assert report.answered == ("anna", "berta") and set(report.dropped) == {"clara"}
    assert expected in report.dropped["clara"] and SECRET not in report.dropped["clara"]
    after = by_hand(start, good)
    for name, array in federation.decoder.arrays().items():
        np.testing.assert_allclose(array.numpy(), after[name], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", BAD)
def test_too_few_valid_replies_stop_the_study_and_leave_the_decoder_alone(kind: str) -> None:
    federation = Federation(min_sites=3)
    bad, expected = BAD[kind]
    start = federation.decoder.arrays()
    good = {site: federation.update(i) for i, site in enumerate(("anna", "berta"))}
    with pytest.raises(FederationError) as caught:
        federation.strategy.aggregate_train(1, [*federation.answers(good), *bad(federation)])
    text = str(caught.value)
    assert "round 1: 2 valid replies, min_sites is 3 (clara: " in text
    assert expected in text and SECRET not in text and "anna:" not in text
    assert equal(federation.decoder.arrays(), start) and federation.reports == []


def test_rounding_at_the_edge_of_the_ball_is_forgiven(federation: Federation) -> None:
    federation.play({site: federation.update(i, RADIUS * (1 + 3e-7)) for i, site in enumerate(WEIGHTS)})
    assert federation.reports[-1][0].dropped == {}


def test_of_two_answers_the_first_counts() -> None:
    results = []
    for extra in (False, True):
        federation = Federation()
        updates = {site: federation.update(i) for i, site in enumerate(WEIGHTS)}
        answers = federation.answers(updates)
        if extra:
            answers += federation.answers({"anna": federation.update(77)})
        federation.strategy.aggregate_train(1, answers)
        results.append(federation.decoder.arrays())
    assert equal(*results)


def test_a_bad_answer_cannot_be_mended_by_a_second_one(federation: Federation) -> None:
    updates = {site: federation.update(i) for i, site in enumerate(WEIGHTS)}
    federation.strategy.aggregate_train(1, [reply(federation, "anna", round=9), *federation.answers(updates)])
    assert federation.reports[-1][0].dropped == {"anna": "answers round 9"}


def test_a_node_that_is_no_member_is_not_heard(federation: Federation) -> None:
    updates = {site: federation.update(i) for i, site in enumerate(("anna", "berta"))}
    request = TrainRequest(federation.protocol.digest, 1, 0.5, federation.decoder.arrays()).to_record()
    stranger = Message(request, dst_node_id=99, message_type="train.round")
    forged = Message(federation.record("clara", federation.update(5)), reply_to=stranger)
    federation.strategy.aggregate_train(1, [forged, *federation.answers(updates)])
    report, _ = federation.reports[-1]
    assert report.answered == ("anna", "berta") and report.dropped == {"clara": "no reply before the deadline"}


def test_nobody_answers(federation: Federation) -> None:
    with pytest.raises(FederationError) as caught:
        federation.strategy.aggregate_train(2, [])
    assert "round 2: 0 valid replies" in str(caught.value)
    assert all(f"{site}: no reply" in str(caught.value) for site in WEIGHTS)


# ---------------------------------------------------------------- the sites' ledgers


def test_every_request_carries_the_countersigned_head_of_the_sites_ledger(federation: Federation) -> None:
    shapes = {n: tuple(a.shape) for n, a in federation.decoder.arrays().items()}
    for number in (1, 2):
        for site, node in NODES.items():
            request = TrainRequest.from_record(federation.requests(number)[node].content, shapes)
            ledger = federation.ledgers[site]
            assert (request.witness_length, request.witness_head) == (ledger.length, ledger.head) == (
                (number - 1), ledger.head,
            )  # fmt: skip
            assert request.witness_key == public_hex(COORDINATOR)
            head = (request.witness_length, request.witness_head, request.witness_signature)
            assert head_holds("countersignature", request.witness_key, site, *head)
        federation.play({site: federation.update(i) for i, site in enumerate(WEIGHTS)}, number)
    assert Witness(federation.witness.path, COORDINATOR)["anna"].length == 2, "and every round is on disk"


def other_key(ledger: SiteLedger) -> None:
    ledger.key = Ed25519PrivateKey.generate()


def restored(ledger: SiteLedger) -> None:
    ledger.length, ledger.head = -1, GENESIS  # the spend of this round makes it 0


def forked(ledger: SiteLedger) -> None:
    ledger.length, ledger.head = 0, "f" * 64  # another first entry


def unspent(ledger: SiteLedger) -> None:
    ledger.spend = lambda: None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (restored, "the site's ledger was rolled back"),
        (forked, "the site's ledger was rolled back"),
        (unspent, "the update came without a new entry in the site's ledger"),
        (other_key, "the head of the site's ledger is not signed by the key with which it joined"),
    ],
)
def test_a_site_whose_ledger_does_not_extend_is_dropped_by_name(
    federation: Federation, change: Callable[[SiteLedger], None], expected: str
) -> None:
    federation.play({site: federation.update(i) for i, site in enumerate(WEIGHTS)})
    start = federation.decoder.arrays()
    change(federation.ledgers["clara"])
    updates = {site: federation.update(10 + i) for i, site in enumerate(WEIGHTS)}
    after = federation.play(updates, 2)
    assert federation.reports[-1][0].dropped == {"clara": expected}
    expected_arrays = by_hand(start, {site: updates[site] for site in ("anna", "berta")})
    for name, array in after.items():
        np.testing.assert_allclose(array.numpy(), expected_arrays[name], rtol=1e-5, atol=2e-6)
