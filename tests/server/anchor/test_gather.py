"""The anchor at the coordinator: what is asked and believed, what is made of it, and what a restart finds again."""

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

import server.anchor.generators
from client.anchor import exact_statistics, noised_statistics
from common.anchor_messages import AnchorReply, AnchorRequest
from common.encoding import TableEncoding
from common.errors import FederationError, OutputError, StudyError
from common.messages import ANCHOR, Status
from common.privacy.anchor import anchor_event
from common.privacy.ledger import GENESIS
from common.privacy.ledger_keys import SignedHead, public_hex, sign_head
from common.study import Protocol
from server.anchor.gather import gather_anchor, remake_anchor
from server.anchor.generators import Anchored
from server.anchor.statistics import load_statistics
from server.roll import Roll
from server.run import RunFiles
from server.strategy import Member
from server.witness import Witness
from tests.common.anchor.anchored import SCHEMA, patients, protocol

MEMBERS = (Member(11, "anna", 900), Member(12, "berta", 1200), Member(13, "clara", 600))
COORDINATOR, SITE_KEY = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
Answer = Callable[[np.ndarray], "np.ndarray | Status | Error | None"]


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower stamps every message with the task it was made in; and a short training is enough here."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr(server.anchor.generators, "TRAINING_ROWS", 2000)
    monkeypatch.setattr(server.anchor.generators, "EPOCHS", 2)


def signed(site: str, length: int) -> tuple[int, str, str]:
    head = GENESIS if length == 0 else hashlib.sha256(f"{site}{length}".encode()).hexdigest()
    return length, head, sign_head("ledger head", SITE_KEY, site, length, head)


class Sites:
    """Flower's grid with the three sites behind it; `answers` change what a site would have sent in a step."""

    def __init__(self, study: Protocol, answers: dict[tuple[str, str], Answer]) -> None:
        self.study, self.answers, self.asked = study, answers, list[tuple[str, str]]()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = []
        for message in messages:
            assert message.metadata.message_type == ANCHOR
            member = next(m for m in MEMBERS if m.node_id == message.metadata.dst_node_id)
            cells = sum(2 if c.name == "dead" else 0 for c in SCHEMA.columns) + 81 + 65 + 4 + 3 + 4
            request = AnchorRequest.from_record(message.content, cells)
            self.asked.append((member.site, request.step))
            data = TableEncoding(SCHEMA).encode(patients(member.patients, member.node_id))
            exact, sensitivity = exact_statistics(self.study, data, request.step, request.marginals)
            event = anchor_event(self.study.study, request.step)
            sent = noised_statistics(exact, sensitivity, event, member.node_id + event.round)[None, :]
            found = self.answers.get((member.site, request.step), lambda values: values)(sent)
            if found is None:
                continue
            content: RecordDict | Error
            if isinstance(found, Error):
                content = found
            elif isinstance(found, Status):
                content = AnchorReply(found, member.site, request.study).to_record()
            else:
                head = signed(member.site, 1 if request.step == "marginals" else 2)
                content = AnchorReply(Status.OK, member.site, request.study, found, *head).to_record()
            replies.append(Message(content, reply_to=message))
        return replies


def gather(
    out: Path, study: Protocol, answers: dict[tuple[str, str], Answer] | None = None, spent: int = 0
) -> tuple[Anchored, Sites, dict[str, Any]]:
    files = RunFiles(out)
    witness = Witness(files.ledger_heads, COORDINATOR)
    for member in MEMBERS:
        witness.joined(SignedHead(member.site, *signed(member.site, spent), public_hex(SITE_KEY)))
    sites = Sites(study, answers or {})
    grid: Any = sites
    made = gather_anchor(grid, study, MEMBERS, witness, files, Roll())
    return made, sites, json.loads(files.anchor.read_text())


def test_both_steps_and_both_generators(tmp_path: Path) -> None:
    study = protocol(10.0)
    made, sites, document = gather(tmp_path, study)
    assert sites.asked == [(m.site, step) for step in ("marginals", "moments") for m in MEMBERS]
    assert document["sites"]["moments"] == {"anna": 900, "berta": 1200, "clara": 600}
    assert document["dropped"] == {"marginals": {}, "moments": {}}
    assert document["decoder_certificate"] <= study.study.model.decoder_lipschitz
    assert made.decoder.certificate() <= study.study.model.decoder_lipschitz
    assert document["generator"] == min(
        document["distance_to_statistics"], key=lambda name: document["distance_to_statistics"][name]
    )
    rows = np.vstack([table.values for table in made.sample(3000, 0)])
    pooled = np.vstack([patients(m.patients, m.node_id).values for m in MEMBERS])
    assert abs(rows[:, 0].mean() - pooled[:, 0].mean()) < 0.05
    assert abs(np.nanmean(rows[:, 1]) - np.nanmean(pooled[:, 1])) < 2.5


def test_the_study_may_name_the_generator_and_rounds_begin_with_the_decoder(tmp_path: Path) -> None:
    for name in ("decoder", "copula"):
        made, _, document = gather(tmp_path / name, protocol(10.0, anchor={"generator": name}))
        assert made.generator == document["generator"] == name
    made, _, _ = gather(tmp_path / "rounds", protocol(10.0, rounds=3))
    assert made.generator == "decoder"


def test_a_site_that_fails_is_named_and_its_patients_are_not_counted(tmp_path: Path) -> None:
    answers: dict[tuple[str, str], Answer] = {
        ("berta", "marginals"): lambda _: Status.STORAGE_FAILED,
        ("clara", "moments"): lambda _: None,
    }
    _, _, document = gather(tmp_path, protocol(10.0, training={"min_sites": 2}), answers)
    assert document["sites"] == {"marginals": {"anna": 900, "clara": 600}, "moments": {"anna": 900, "berta": 1200}}
    assert document["dropped"]["marginals"] == {"berta": "storage-failed"}
    assert "clara" in document["dropped"]["moments"]


@pytest.mark.parametrize(
    "answer",
    [
        lambda values: values[:, :-1],
        lambda values: np.where(np.arange(values.size) == 0, np.nan, values),
        lambda _: Status.REFUSED_BY_POLICY,
    ],
)
def test_too_few_answers_end_the_study_before_the_second_step(tmp_path: Path, answer: Answer) -> None:
    answers = {("anna", "marginals"): answer, ("berta", "marginals"): answer}
    with pytest.raises(FederationError, match=r"anchor, marginals: 1 sites answered, at least 2.*anna.*berta"):
        gather(tmp_path, protocol(10.0), answers)
    assert not RunFiles(tmp_path).anchor_statistics.exists()


def test_a_restart_asks_only_what_is_missing(tmp_path: Path) -> None:
    """After a failed second step the first is not asked again, and the marginals sites encode with stay the same."""
    study = protocol(10.0)
    failing: dict[tuple[str, str], Answer] = {(m.site, "moments"): lambda _: Status.CLOSED_NOW for m in MEMBERS}
    with pytest.raises(FederationError, match="moments"):
        gather(tmp_path, study, failing)
    before = load_statistics(RunFiles(tmp_path).anchor_statistics, study)
    made, sites, _ = gather(tmp_path, study, spent=1)
    assert [step for _, step in sites.asked] == ["moments"] * 3
    after = load_statistics(RunFiles(tmp_path).anchor_statistics, study)
    assert before is not None and after is not None and before.second is None
    assert all(np.array_equal(a, b) for a, b in zip(before.marginals, after.marginals, strict=True))
    again = remake_anchor(study, RunFiles(tmp_path))
    one, other = (np.vstack([t.values for t in x.sample(200, 5)]) for x in (made, again))
    assert np.array_equal(one, other, equal_nan=True)


def test_statistics_of_another_study_are_refused(tmp_path: Path) -> None:
    gather(tmp_path, protocol(10.0))
    with pytest.raises(OutputError, match="of another study"):
        remake_anchor(protocol(9.0), RunFiles(tmp_path))
    RunFiles(tmp_path).anchor_statistics.write_bytes(b"nothing")
    with pytest.raises(OutputError, match="damaged"):
        remake_anchor(protocol(10.0), RunFiles(tmp_path))


def test_an_epsilon_that_leaves_nothing_is_refused_before_anybody_is_asked(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"(?s)epsilon = 0.001 is of no use.*nothing was spent"):
        gather(tmp_path, protocol(0.001))
    _, sites, _ = gather(tmp_path, protocol(0.001, anchor={"accept_useless_noise": True}))
    assert len(sites.asked) == 6


def test_a_declared_range_that_is_mostly_empty_is_named_from_the_noised_counts(tmp_path: Path) -> None:
    import copy

    from common.schema import parse_schema
    from common.table import Table
    from server.anchor.statistics import Pooled, Statistics

    descriptor = copy.deepcopy(dict(SCHEMA.descriptor))
    descriptor["fields"][1]["constraints"] |= {"minimum": 0, "maximum": 5000}
    wide = Protocol(protocol(10.0).study, parse_schema(descriptor))
    data = TableEncoding(wide.schema).encode(Table(wide.schema, patients(2000, 0).values))
    exact, sensitivity = exact_statistics(wide, data, "marginals", None)
    sent = noised_statistics(exact, sensitivity, anchor_event(wide.study, "marginals"), 0)
    assert Statistics(wide, Pooled(sent, {"anna": 2000})).wide_columns() == ["age"]
    assert load_statistics(tmp_path / "absent", wide) is None
