import hashlib
import io
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.serverapp.strategy import Strategy
from flwr.supercore.task_identity import TaskIdentity

from common.errors import CertificateError, FederationError
from common.messages import ARRAYS, HEADER, Status, TrainReply, TrainRequest
from common.model.vae import Decoder
from common.privacy.ledger import GENESIS
from common.privacy.ledger_keys import SignedHead, head_holds, public_hex, sign_head
from common.privacy.update import update_norm
from common.schema import parse_schema
from common.study import Protocol, Study
from server.checkpoint import build_decoder
from server.strategy import LipschitzFedAvg, Member, RoundReport
from server.witness import Witness

SECRET = "Zq7731"
RADIUS, BOUND, LOGIT_SCALE = 2.0, 10.0, 5.0
MEMBERS = (Member(11, "anna", 100), Member(12, "berta", 200), Member(13, "clara", 500))
WEIGHTS = {"anna": 0.125, "berta": 0.25, "clara": 0.625}
NODES = {member.site: member.node_id for member in MEMBERS}
COORDINATOR = Ed25519PrivateKey.generate()
NO_GRID: Any = None  # the strategy's own steps never touch the grid

Updates = Mapping[str, Mapping[str, torch.Tensor]]


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower stamps every message with the task it was made in."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def make_protocol(name: str = "s", **training: Any) -> Protocol:
    study = {
        "study": {"name": name, "schema": "schema.json"},
        "model": {"latent_dim": 3, "hidden": [8, 6], "decoder_lipschitz": BOUND, "logit_scale": LOGIT_SCALE},
        "training": {"rounds": 5, "update_norm": RADIUS, "min_sites": 2} | training,
    }
    schema = {
        "fields": [
            {"name": "age", "type": "number", "constraints": {"minimum": 0, "maximum": 100}},
            {"name": "sex", "type": "string", "constraints": {"enum": ["f", "m"]}},
        ]
    }
    return Protocol(Study.model_validate(study), parse_schema(schema))


class SiteLedger:
    """The heads that a site's ledger would have."""

    def __init__(self, site: str) -> None:
        self.site, self.key = site, Ed25519PrivateKey.generate()
        self.length, self.head = 0, GENESIS

    def spend(self) -> None:
        self.length, self.head = self.length + 1, hashlib.sha256(f"{self.head}{self.length}".encode()).hexdigest()

    @property
    def signed(self) -> tuple[int, str, str]:
        return self.length, self.head, sign_head("ledger head", self.key, self.site, self.length, self.head)


class Federation:
    """A strategy, what it reported, and replies as the sites of the study would send them."""

    def __init__(self, members: tuple[Member, ...] = MEMBERS, **training: Any) -> None:
        self.protocol = make_protocol(**training)
        self.decoder: Decoder = build_decoder(self.protocol, 0)
        self.reports: list[tuple[RoundReport, dict[str, torch.Tensor]]] = []
        self.folder = tempfile.TemporaryDirectory()
        self.witness = Witness(Path(self.folder.name) / "ledger-heads.json", COORDINATOR)
        self.ledgers = {member.site: SiteLedger(member.site) for member in members}
        for site, ledger in self.ledgers.items():
            self.witness.joined(SignedHead(site, *ledger.signed, public_hex(ledger.key)))
        self.strategy = LipschitzFedAvg(
            protocol=self.protocol,
            decoder=self.decoder,
            members=members,
            observer=lambda report, decoder: self.reports.append((report, decoder.arrays())),
            witness=self.witness,
        )

    def requests(self, number: int = 1) -> dict[int, Message]:
        messages = self.strategy.configure_train(number, ArrayRecord(), ConfigRecord(), NO_GRID)
        return {message.metadata.dst_node_id: message for message in messages}

    def update(self, seed: int, norm: float = RADIUS * (1 - 1e-6)) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        raw = {n: torch.randn(a.shape, generator=generator) for n, a in self.decoder.arrays().items()}
        return {n: a * (norm / update_norm(raw)) for n, a in raw.items()}

    def record(self, site: str, update: Mapping[str, torch.Tensor], number: int = 1, study: str = "") -> RecordDict:
        self.ledgers[site].spend()
        signed = self.ledgers[site].signed
        return TrainReply(Status.OK, site, study or self.protocol.digest, number, update, *signed).to_record()

    def answers(self, updates: Updates, number: int = 1) -> list[Message]:
        requests = self.requests(number)
        return [Message(self.record(s, u, number), reply_to=requests[NODES[s]]) for s, u in updates.items()]

    def play(self, updates: Updates, number: int = 1) -> dict[str, torch.Tensor]:
        self.strategy.aggregate_train(number, self.answers(updates, number))
        return self.decoder.arrays()


@pytest.fixture
def federation() -> Federation:
    return Federation()


def clipped(weight: np.ndarray, bound: float) -> np.ndarray:
    left, singular, right = np.linalg.svd(weight, full_matrices=False)
    return (left * np.minimum(singular, bound)) @ right


def by_hand(start: Mapping[str, torch.Tensor], updates: Updates) -> dict[str, np.ndarray]:
    """P_s(decoder + Σ w u) in numpy."""
    result = {n: a.numpy().astype(np.float64) for n, a in start.items()}
    for site, update in updates.items():
        result = {n: a + WEIGHTS[site] * update[n].numpy().astype(np.float64) for n, a in result.items()}
    share = (BOUND / LOGIT_SCALE) ** (1 / 3)
    return {n: clipped(a, share) if n.endswith("weight") else a for n, a in result.items()}


def lipschitz(arrays: Mapping[str, torch.Tensor]) -> float:
    weights = [a.numpy().astype(np.float64) for n, a in arrays.items() if n.endswith("weight")]
    assert len(weights) == 3
    return LOGIT_SCALE * math.prod(float(np.linalg.svd(w, compute_uv=False)[0]) for w in weights)


def distance(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> float:
    return update_norm({n: left[n].to(torch.float64) - right[n].to(torch.float64) for n in left})


def equal(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


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


def test_what_flower_gets_back_is_the_new_decoder(federation: Federation) -> None:
    answers = federation.answers({site: federation.update(i) for i, site in enumerate(WEIGHTS)})
    arrays, metrics = federation.strategy.aggregate_train(1, answers)
    assert metrics is None and arrays is not None
    after = federation.decoder.arrays()
    assert equal({n: torch.from_numpy(a.numpy().copy()) for n, a in arrays.items()}, after)


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


# ---------------------------------------------------------------- bad replies


def reply(federation: Federation, member: str, /, **changes: Any) -> Message:
    """A reply of `member` that is right except for `changes`: header fields, or `arrays` by name."""
    record = federation.record(member, federation.update(5))
    header, arrays = dict(record.config_records[HEADER]), dict(record.array_records[ARRAYS])
    arrays |= changes.pop("arrays", {})
    header |= changes
    content = RecordDict({HEADER: ConfigRecord(header), ARRAYS: ArrayRecord(array_dict=arrays)})
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


def raw(data: bytes, dtype: str = "float32", shape: tuple[int, ...] = (8,), stype: str = "numpy.ndarray") -> Array:
    return Array(dtype=dtype, shape=shape, stype=stype, data=data)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, array)
    return buffer.getvalue()


def bias(array: Array) -> Callable[[Federation], list[Message]]:
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
    "wrong shape": (bias(Array(np.zeros(9, np.float32))), "is not float32 of shape (8,)"),
    "transposed": (changed(arrays={"network.layers.0.weight": Array(np.zeros((3, 8), np.float32))}), "shape (8, 3)"),
    "wrong dtype": (bias(Array(np.zeros(8, np.float64))), "is not float32"),
    "complex": (bias(Array(np.zeros(8, np.complex64))), "is not float32"),
    "one array more": (changed(arrays={"extra": Array(np.zeros(1, np.float32))}), "arrays named differently"),
    "no arrays": (
        lambda f: [
            Message(
                RecordDict({HEADER: f.record("clara", f.update(5)).config_records[HEADER]}),
                reply_to=f.requests()[NODES["clara"]],
            )
        ],
        "no arrays",
    ),
    "declares one thing, holds another": (bias(raw(npy(np.zeros(8, np.float64)))), "holds something else"),
    "garbage bytes": (bias(raw(b"\x00garbage")), "cannot be decoded"),
    "no bytes": (bias(raw(b"")), "cannot be decoded"),
    "a pickle": (bias(raw(npy(np.array([{}], dtype=object)))), "cannot be decoded"),
    "an archive": (bias(raw(npz(np.zeros(8, np.float32)))), "holds something else"),
    "a broken archive": (bias(raw(b"PK\x03\x04" + b"\x00" * 40)), "cannot be decoded"),
    "a header that claims terabytes": (
        bias(raw(npy(np.zeros(8, np.float32)).replace(b"(8,), }", b"(9999999999999,), }"))),
        "cannot be decoded",
    ),
    "another serialisation": (bias(raw(npy(np.zeros(8, np.float32)), stype="pickle")), "cannot be decoded"),
    "oversized": (bias(raw(b"x" * 100_000)), "is not float32"),
    "wrong round": (changed(round=2), "answers round 2"),
    "other study": (changed(study="f" * 64), "answers another study"),
    "other site's name": (changed(site="anna"), "answers under another site's name"),
    "unknown status": (changed(status="fine"), "unknown status code"),
    "another version": (changed(version=2), "protocol version"),
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
