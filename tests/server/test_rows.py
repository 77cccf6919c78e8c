"""The pooled cohort of the channel: who is asked for how much, and what of the answers is believed."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st

from common.errors import FederationError
from common.messages import RELEASE, ReleaseReply, ReleaseRequest, Status
from common.privacy.ledger import GENESIS
from common.privacy.ledger_keys import SignedHead, head_holds, public_hex, sign_head
from common.schema import parse_schema
from common.study import Protocol, Study
from server.checkpoint import build_decoder
from server.enrol import revoke
from server.roll import REVOKED, Roll
from server.rows import gather_rows, share_rows
from server.run import RunFiles
from server.strategy import Member
from server.witness import Witness
from tests.server.enrolled import Consortium, Hospital

SECRET = "Zq7731"
MEMBERS = (Member(11, "anna", 100), Member(12, "berta", 200), Member(13, "clara", 500))
SHARES = {"anna": 10, "berta": 20, "clara": 50}
COORDINATOR, SITE_KEY = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower stamps every message with the task it was made in."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def make_protocol(rows: int = 80, seed: int | None = None) -> Protocol:
    study = {
        "study": {"name": "s", "schema": "schema.json", "seed": seed},
        "model": {"latent_dim": 2, "hidden": [8]},
        "training": {"rounds": 5, "min_sites": 2},
        "release": {"method": "channel", "rows": rows},
        "channel": {"epsilon": 1.0},
    }
    schema = {
        "fields": [
            {"name": "age", "type": "number", "constraints": {"minimum": 0, "maximum": 100}},
            {"name": "sex", "type": "string", "constraints": {"enum": ["f", "m"], "required": True}},
        ]
    }
    return Protocol(Study.model_validate(study), parse_schema(schema))


def rows_of(site: str, count: int) -> np.ndarray:
    """Ages that say whose they are."""
    base = {"anna": 10.0, "berta": 30.0, "clara": 50.0}[site]
    return np.column_stack([base + np.arange(count) / 100, np.arange(count) % 2]).astype(float)


def signed(site: str, length: int = 1) -> tuple[int, str, str]:
    head = GENESIS if length == 0 else hashlib.sha256(f"{site}{length}".encode()).hexdigest()
    return length, head, sign_head("ledger head", SITE_KEY, site, length, head)


def answer(request: ReleaseRequest, site: str) -> RecordDict:
    return ReleaseReply(Status.OK, site, request.study, rows_of(site, request.rows), *signed(site)).to_record()


Answer = Callable[[ReleaseRequest], RecordDict | Error | None]


class Sites:
    """Flower's grid with the three sites behind it; `answers` tells those apart that do not answer properly."""

    def __init__(self, protocol: Protocol, answers: dict[str, Answer]) -> None:
        self.answers, self.asked = answers, dict[str, ReleaseRequest]()
        self.shapes = {n: tuple(a.shape) for n, a in build_decoder(protocol, 0).named_parameters()}

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = []
        for message in messages:
            assert message.metadata.message_type == RELEASE
            site = next(m.site for m in MEMBERS if m.node_id == message.metadata.dst_node_id)
            request = self.asked[site] = ReleaseRequest.from_record(message.content, self.shapes)
            found = self.answers.get(site, lambda request, site=site: answer(request, site))(request)
            if found is not None:
                replies.append(Message(found, reply_to=message))
        return replies


def gather(
    out: Path,
    protocol: Protocol | None = None,
    members: tuple[Member, ...] = MEMBERS,
    roll: Roll | None = None,
    **answers: Answer,
) -> tuple[np.ndarray, dict[str, Any], Sites]:
    protocol = protocol or make_protocol()
    files = RunFiles(out)
    witness = Witness(files.ledger_heads, COORDINATOR)
    for member in MEMBERS:
        witness.joined(SignedHead(member.site, *signed(member.site, 0), public_hex(SITE_KEY)))
    sites = Sites(protocol, answers)
    grid: Any = sites
    tables = list(gather_rows(grid, protocol, build_decoder(protocol, 0), members, witness, files, roll))
    document = json.loads((out / "release.json").read_text())
    return np.vstack([table.values for table in tables]), document, sites


@given(st.integers(1, 5000), st.lists(st.integers(1, 10_000), min_size=1, max_size=12))
def test_rows_are_shared_in_proportion_and_none_is_lost(rows: int, patients: list[int]) -> None:
    members = [Member(i, f"site{i:02d}", n) for i, n in enumerate(patients)]
    shares = share_rows(rows, members)
    assert sum(shares.values()) == rows
    for member in members:
        assert abs(shares[member.site] - rows * member.patients / sum(patients)) < 1
    assert share_rows(rows, members[::-1]) == shares


def test_every_site_is_asked_for_its_share_with_what_was_seen_of_its_ledger(tmp_path: Path) -> None:
    rows, document, sites = gather(tmp_path)
    assert {site: request.rows for site, request in sites.asked.items()} == SHARES
    assert document == {"method": "channel", "rows": SHARES, "dropped": {}}
    for site, request in sites.asked.items():
        end = (request.witness_length, request.witness_head, request.witness_signature)
        assert head_holds("countersignature", request.witness_key, site, *end)
    expected = np.vstack([rows_of(site, count) for site, count in SHARES.items()])
    order = np.argsort(rows[:, 0])
    assert np.array_equal(rows[order], expected)
    seen = json.loads((tmp_path / "ledger-heads.json").read_text())["sites"]
    assert all((seen[site]["length"], seen[site]["round"]) == (1, 6) for site in SHARES)


def test_the_order_of_the_rows_does_not_show_their_sites(tmp_path: Path) -> None:
    one = gather(tmp_path / "a")[0]
    assert (np.diff(one[:, 0]) < 0).mean() > 0.2
    assert not np.array_equal(one, gather(tmp_path / "b")[0])
    seeded = make_protocol(seed=3)
    assert np.array_equal(gather(tmp_path / "c", seeded)[0], gather(tmp_path / "d", seeded)[0])


def test_a_site_without_a_share_is_not_asked(tmp_path: Path) -> None:
    _, document, sites = gather(tmp_path, make_protocol(rows=2))
    assert set(sites.asked) == {"berta", "clara"} or set(sites.asked) == {"clara"}
    assert sum(document["rows"].values()) == 2


def spoiled(column: int, value: float) -> Answer:
    def make(request: ReleaseRequest) -> RecordDict:
        rows = rows_of("anna", request.rows)
        rows[0, column] = value
        return ReleaseReply(Status.OK, "anna", request.study, rows, *signed("anna")).to_record()

    return make


def replied(**changes: Any) -> Answer:
    def make(request: ReleaseRequest) -> RecordDict:
        fields: dict[str, Any] = {"status": Status.OK, "site": "anna", "study": request.study}
        fields |= dict(zip(("ledger_length", "ledger_head", "ledger_signature"), signed("anna"), strict=True))
        return ReleaseReply(rows=rows_of("anna", changes.pop("count", request.rows)), **fields | changes).to_record()

    return make


def refused(request: ReleaseRequest) -> RecordDict:
    return ReleaseReply(Status.REFUSED_BY_POLICY, "anna", request.study).to_record()


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (spoiled(0, 100.5), "a synthetic value of column 'age' breaks the schema"),
        (spoiled(1, 0.5), "a synthetic value of column 'sex' breaks the schema"),
        (spoiled(1, np.nan), "a synthetic value of column 'sex' breaks the schema"),
        (spoiled(0, np.inf), "array 'rows' has entries that are infinite"),
        (replied(count=11), "array 'rows' is not float64 of shape (10, 2)"),
        (replied(site="berta"), "answers under another site's name"),
        (replied(study="f" * 64), "answers another study"),
        (replied(ledger_length=2), "not signed by the key with which it joined"),
        (
            lambda request: ReleaseReply(
                Status.OK, "anna", request.study, rows_of("anna", 10), *signed("anna", 0)
            ).to_record(),
            "without a new entry in the site's ledger",
        ),
        (
            lambda request: ReleaseReply(Status.REFUSED_BY_POLICY, "anna", request.study).to_record(),
            "refused-by-policy",
        ),
        (lambda request: Error(0, f"ValueError: {SECRET}"), "Flower reports error 0"),
        (lambda request: RecordDict({SECRET: ConfigRecord({"y": SECRET})}), "no header"),
        (lambda request: None, "no reply before the deadline"),
    ],
)
def test_what_is_not_believed_is_dropped_by_name(tmp_path: Path, reply: Answer, reason: str) -> None:
    rows, document, _ = gather(tmp_path, anna=reply)
    assert reason in document["dropped"]["anna"] and SECRET not in document["dropped"]["anna"]
    assert document["rows"] == {"berta": 20, "clara": 50} and len(rows) == 70 and rows[:, 0].min() >= 30


def test_too_few_sites_with_rows_stop_the_release_by_name(tmp_path: Path) -> None:
    with pytest.raises(FederationError) as caught:
        gather(tmp_path, anna=lambda request: None, berta=replied(site="anna"))
    assert "1 sites sent valid rows, at least 2 are needed" in str(caught.value)
    assert "anna: no reply" in str(caught.value) and "berta: answers under another site's name" in str(caught.value)
    assert json.loads((tmp_path / "release.json").read_text())["rows"] == {"clara": 50}


def test_a_site_that_is_enrolled_no_longer_is_not_asked_and_what_it_sent_is_not_taken(tmp_path: Path) -> None:
    consortium = Consortium(tmp_path / "con")
    entries = {member.site: consortium.enrol(Hospital(member.site, member.node_id)) for member in MEMBERS}
    members = tuple(dataclasses.replace(m, enrolment=entries[m.site].fingerprint) for m in MEMBERS)
    roll = Roll(consortium.folder)

    def revokes_clara(request: ReleaseRequest) -> RecordDict:
        revoke("clara", consortium.folder)
        return answer(request, "anna")

    rows, document, sites = gather(tmp_path / "out", None, members, roll, anna=revokes_clara)
    assert set(sites.asked) == set(SHARES), "all were enrolled when they were asked"
    assert document["dropped"] == {"clara": REVOKED} and len(rows) == 30
    assert set(gather(tmp_path / "again", None, members, roll)[2].asked) == {"anna", "berta"}
    revoke("berta", consortium.folder)
    with pytest.raises(FederationError, match=r"release: 1 sites may be asked, at least 2 are needed \(berta: was"):
        gather(tmp_path / "third", None, members, roll)
