"""The gate, the worker and the executor around them, without Flower's network."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import ConfigRecord, Context, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.common.serde import context_to_proto, message_to_proto
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse, PullTaskInputResponse
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError
from flwr.supercore.task_identity import TaskIdentity

from client.bundles import LARGEST_BUNDLE, MOST_WAITING, BundleStore
from client.executor import Executor, UnansweredError
from client.gate import refusal, status_in
from client.tasks import Task
from client.worker import DONE, READY, Worker, WorkerLostError
from common.audit import read_audit
from common.messages import JOIN, RELEASE, REPLY_FIELDS, TRAIN, JoinReply, ReleaseReply, Status, TrainReply
from common.records import HEADER
from tests.client.hospital import (
    PROTOCOL,
    decoder_of,
    join_request,
    release_request,
    study,
    train_request,
)
from tests.client.steward import BUNDLE, Stewarded, digest_of
from tests.disk import full_disk


@pytest.fixture
def site(tmp_path: Path) -> Stewarded:
    return Stewarded(tmp_path / "anna")


MESSAGES = [(JOIN, join_request()), (TRAIN, train_request()), (RELEASE, release_request(PROTOCOL, 5))]


@pytest.mark.parametrize(("kind", "record"), MESSAGES)
def test_nothing_passes_without_an_approved_bundle(site: Stewarded, kind: str, record: RecordDict) -> None:
    assert site.judge(kind, record) is Status.AWAITING_APPROVAL
    assert [(r.kind, r.digest) for r in site.approvals.requests()] == [("bundle", digest_of(BUNDLE))]
    assert BundleStore(site.state).load(digest_of(BUNDLE)) == BUNDLE
    site.decide("bundle", digest_of(BUNDLE), "denied")
    assert site.judge(kind, record) is Status.DENIED


def test_another_byte_is_another_bundle(site: Stewarded) -> None:
    site.approve_all()
    assert site.judge(JOIN, join_request()) is None
    assert site.judge(JOIN, join_request(), BUNDLE + b" ") is Status.AWAITING_APPROVAL


def test_a_study_waits_for_its_own_approval(site: Stewarded) -> None:
    site.judge(JOIN, join_request())
    site.decide("bundle", digest_of(BUNDLE))
    assert site.judge(TRAIN, train_request()) is Status.UNKNOWN_STUDY, "nobody has asked for it"
    assert site.judge(JOIN, join_request()) is Status.AWAITING_APPROVAL
    assert site.judge(TRAIN, train_request()) is Status.AWAITING_APPROVAL
    site.decide("study", PROTOCOL.digest)
    for kind, record in MESSAGES:
        assert site.judge(kind, record) is None
    other = study(training={"rounds": 99})
    assert site.judge(JOIN, join_request(other)) is Status.AWAITING_APPROVAL, "one round more is another study"
    site.decide("study", PROTOCOL.digest, "denied")
    for kind, record in MESSAGES:
        assert site.judge(kind, record) is Status.DENIED, "a withdrawal counts at once"


def test_a_decision_that_this_site_did_not_sign_opens_nothing(site: Stewarded) -> None:
    site.approve_all()
    path = site.state / "approvals" / f"study-{PROTOCOL.digest}.decision.json"
    envelope = json.loads(path.read_text())
    envelope["signatures"][0]["sig"] = "A" * 86 + "=="
    path.write_text(json.dumps(envelope))
    for kind, record in MESSAGES:
        assert site.judge(kind, record) is Status.SITE_MISCONFIGURED
    assert "not signed by this site's key" in site.reports[-1]["reason"]


def test_without_a_key_nothing_passes(site: Stewarded) -> None:
    site.approve_all()
    (site.state / "ledger.key").chmod(0o644)
    assert site.judge(JOIN, join_request()) is Status.LEDGER_FAILED
    (site.state / "ledger.key").unlink()
    assert site.judge(JOIN, join_request()) is Status.LEDGER_FAILED


def test_in_a_simulation_only_the_bundle_needs_approval(tmp_path: Path) -> None:
    site = Stewarded(tmp_path / "anna", "simulation = true")
    assert site.judge(JOIN, join_request()) is Status.AWAITING_APPROVAL
    site.decide("bundle", digest_of(BUNDLE))
    for kind, record in MESSAGES:
        assert site.judge(kind, record) is None


def test_what_the_policy_forbids_is_refused_at_once_and_shown_to_the_steward(tmp_path: Path) -> None:
    site = Stewarded(tmp_path / "anna", "max_update_norm = 0.1")
    site.judge(JOIN, join_request())
    site.decide("bundle", digest_of(BUNDLE))
    assert site.judge(JOIN, join_request()) is Status.REFUSED_BY_POLICY
    assert site.approvals.request("study", PROTOCOL.digest) is not None
    assert site.judge(JOIN, join_request()) is Status.REFUSED_BY_POLICY
    [line] = [e for e in read_audit(site.state / "audit.jsonl") if e["outcome"] == Status.REFUSED_BY_POLICY.value]
    assert line["study"] == PROTOCOL.digest and "exceeds this site's limit 0.1" in line["reason"]


def test_malformed_messages(site: Stewarded) -> None:
    site.approve_all()
    empty = RecordDict({HEADER: ConfigRecord({"version": 1})})
    for kind in (JOIN, TRAIN, RELEASE):
        assert site.judge(kind, RecordDict()) is Status.BAD_REQUEST
        assert site.judge(kind, empty) is Status.BAD_REQUEST
    assert site.judge("query.strange", join_request()) is Status.BAD_REQUEST
    record = train_request()
    record.config_records[HEADER]["study"] = "../" * 21 + "x"
    assert site.judge(TRAIN, record) is Status.BAD_REQUEST
    assert site.judge(TRAIN, RecordDict(), b"other") is Status.AWAITING_APPROVAL, "the bundle comes first"


def test_a_broken_site_toml_closes_the_site(site: Stewarded) -> None:
    site.approve_all()
    (site.hospital.folder / "site.toml").write_text("[site\n")
    assert site.judge(JOIN, join_request()) is Status.SITE_MISCONFIGURED


def test_a_coordinator_cannot_fill_the_disk(site: Stewarded) -> None:
    assert site.judge(JOIN, join_request(), b"\0" * (LARGEST_BUNDLE + 1)) is Status.AWAITING_APPROVAL
    store = BundleStore(site.state)
    assert list(store.folder.glob("*")) == []
    for number in range(MOST_WAITING + 40):
        assert site.judge(JOIN, join_request(), b"%d" % number) is Status.AWAITING_APPROVAL
    assert len(list(store.folder.glob("*.fab"))) == MOST_WAITING
    assert len(site.approvals.requests()) == 32
    assert any("wait for a decision already" in report.get("reason", "") for report in site.reports)


def test_a_full_disk_approves_nothing_and_is_said_so(site: Stewarded) -> None:
    with full_disk(0):
        assert site.judge(JOIN, join_request()) is Status.STORAGE_FAILED
    assert {report["event"] for report in site.reports} == {"held-back", "audit-failed"}
    assert site.approvals.requests() == [] and not list(BundleStore(site.state).folder.glob("*.fab"))
    assert site.judge(JOIN, join_request()) is Status.AWAITING_APPROVAL
    site.approve_all()
    with full_disk(0):
        assert site.judge(JOIN, join_request()) is None, "the audit line of an answer is not what decides"


def test_what_nobody_decided_expires_and_waits_anew(site: Stewarded) -> None:
    site.judge(JOIN, join_request())
    path = site.state / "approvals" / f"bundle-{digest_of(BUNDLE)}.request.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"expires": "2020-01-01T00:00:00Z"}))
    assert site.approvals.standing("bundle", digest_of(BUNDLE), site.key) == "expired"
    assert site.judge(JOIN, join_request()) is Status.AWAITING_APPROVAL
    assert site.approvals.standing("bundle", digest_of(BUNDLE), site.key) == "waiting"
    assert site.audit()[-1] == ("asked bundle", "expired, waiting anew")


def test_asking_again_and_again_adds_one_line_to_the_audit_log(site: Stewarded) -> None:
    for _ in range(5):
        site.judge(JOIN, join_request())
    assert site.audit() == [("asked bundle", "waiting"), ("answer query.join", "awaiting-approval")]


@pytest.mark.parametrize("status", [Status.AWAITING_APPROVAL, Status.DENIED, Status.INTERNAL_ERROR])
def test_refusals_are_replies_of_the_protocol(site: Stewarded, status: Status) -> None:
    shapes = {name: tuple(value.shape) for name, value in decoder_of(PROTOCOL).items()}
    replies = []
    for kind, record in MESSAGES:
        asked, _ = site.gate.judge(kind, record, BUNDLE)
        replies.append(refusal(asked, status))
        assert replies[-1] is not None and set(replies[-1].config_records[HEADER]) <= set(REPLY_FIELDS[kind])
        assert status_in(replies[-1]) is status
    join, train, release = replies
    assert JoinReply.from_record(join).status is status
    found = TrainReply.from_record(train, shapes)
    assert (found.status, found.site, found.study, found.round) == (status, "anna", PROTOCOL.digest, 1)
    assert ReleaseReply.from_record(release, (5, 3)).study == PROTOCOL.digest
    assert refusal(site.gate.judge("query.strange", RecordDict(), BUNDLE)[0], status) is None


def test_the_gate_loads_no_training_code(tmp_path: Path) -> None:
    code = (
        "import sys, client.executor\n"
        "loaded = {'torch', 'opacus', 'client.app', 'client.handlers'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=Path.cwd(), capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


class FakeTask:
    """One message as `client.tasks.Task` hands it out."""

    is_client_app = True
    run, node = 7, 8

    def __init__(self, kind: str, content: RecordDict, bundle: bytes = BUNDLE) -> None:
        self.kind, self.content, self.bundle = kind, content, bundle
        self.sent: list[RecordDict | None] = []

    def pull(self) -> None:
        pass

    def answer(self, content: RecordDict | None) -> None:
        self.sent.append(content)


class FakeWorker:
    def __init__(self, lost: bool = False) -> None:
        self.asked, self.lost = 0, lost

    def ask(self, kind: str, run: int, node: int, content: RecordDict) -> RecordDict:
        self.asked += 1
        if self.lost:
            raise WorkerLostError("gone")
        return JoinReply(Status.CLOSED_NOW, "anna").to_record()


def serve(site: Stewarded, worker: Any, task: Any) -> RecordDict:
    Executor(None, site.gate, worker).serve(task)  # type: ignore[arg-type]
    (sent,) = task.sent
    return sent


def test_the_worker_sees_only_what_the_gate_lets_pass(site: Stewarded) -> None:
    worker = FakeWorker()
    assert status_in(serve(site, worker, FakeTask(JOIN, join_request()))) is Status.AWAITING_APPROVAL
    assert worker.asked == 0
    site.approve_all()
    assert status_in(serve(site, worker, FakeTask(JOIN, join_request()))) is Status.CLOSED_NOW
    assert worker.asked == 1
    agent = FakeTask(JOIN, join_request())
    agent.is_client_app = False
    assert serve(site, worker, agent) is None and worker.asked == 1
    assert ("answer query.join", "closed-now") in site.audit()


def test_a_lost_worker_is_answered_at_once(site: Stewarded) -> None:
    site.approve_all()
    shapes = {name: tuple(value.shape) for name, value in decoder_of(PROTOCOL).items()}
    found = TrainReply.from_record(serve(site, FakeWorker(lost=True), FakeTask(TRAIN, train_request(2))), shapes)
    assert (found.status, found.study, found.round) == (Status.INTERNAL_ERROR, PROTOCOL.digest, 2)


class OneTask:
    """A SuperNode with one task, whose answer it does not take; `owed` once the message was given away."""

    def __init__(self, owed: bool, error: Exception) -> None:
        self.owed, self.error = owed, error

    def claim(self) -> Any:
        return self

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def pull(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    ("owed", "error", "event"),
    [
        (False, ValueError(), "task-failed"),
        (True, ValueError(), "unanswered"),
        (
            True,
            httpx.HTTPStatusError("413", request=httpx.Request("POST", "http://x"), response=httpx.Response(413)),
            "unanswered",
        ),
        (True, httpx.ConnectError("gone"), "task-lost"),
        (True, ObjectPushError("object", 1, "session"), "task-lost"),
    ],
)
def test_a_message_that_cannot_be_answered_ends_the_executor(
    site: Stewarded, capsys: pytest.CaptureFixture[str], owed: bool, error: Exception, event: str
) -> None:
    executor = Executor(OneTask(owed, error), site.gate, FakeWorker())  # type: ignore[arg-type]
    with pytest.raises(UnansweredError) if event == "unanswered" else nullcontext():
        assert executor._step()
    said = [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()]
    assert said == ["supernode-reached", "received", event]


class SuperNode:
    """The Runtime API with one message, whose objects are `contents`; takes down what is confirmed."""

    def __init__(self, contents: dict[str, bytes], tree: ObjectTree, about: Metadata) -> None:
        self.contents, self.tree, self.confirmed = contents, tree, list[str]()
        self.message = message_to_proto(make_message(about, content=RecordDict()))

    def PullTaskInput(self, _: Any) -> PullTaskInputResponse:  # noqa: N802
        context = Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})
        return PullTaskInputResponse(context=context_to_proto(context), task_id=3)

    def PullMessages(self, _: Any) -> PullAppMessagesResponse:  # noqa: N802
        return PullAppMessagesResponse(messages_list=[self.message], message_object_trees=[self.tree])

    def PullObject(self, request: Any) -> PullObjectResponse:  # noqa: N802
        content = self.contents.get(request.object_id)
        return PullObjectResponse(
            object_found=content is not None, object_available=content is not None, object_content=content or b""
        )

    def ConfirmMessageReceived(self, request: Any) -> None:  # noqa: N802
        self.confirmed.append(request.message_object_id)


def pulled(contents: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Task:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, None)
    about = Metadata(1, "root", 1, 2, "", "", 0.0, 60.0, JOIN)
    return Task(SuperNode(contents, ObjectTree(object_id="root"), about), TaskType.CLIENT_APP)  # type: ignore[arg-type]


def test_a_message_that_cannot_be_read_is_answered_like_an_empty_one(
    site: Stewarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = pulled({"root": b"Message  4\x00\xff\xff\xff\xff"}, monkeypatch)
    task.pull()
    assert task.owed and task.kind == JOIN and task.content == RecordDict()
    site.approve_all()
    assert site.gate.judge(task.kind, task.content, BUNDLE)[1] in (Status.BAD_REQUEST, Status.AWAITING_APPROVAL)


def test_a_message_that_is_not_here_whole_is_not_owed_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    task = pulled({}, monkeypatch)
    with pytest.raises(ObjectPullError):
        task.pull()
    assert not task.owed


@pytest.fixture
def worker(site: Stewarded) -> Iterator[Worker]:
    made = Worker(site.hospital.folder / "site.toml", site.report, limit=60.0)
    yield made
    made.stop()


def pid_of(site: Stewarded) -> int:
    return [report["worker"] for report in site.reports if report["event"] == "worker-started"][-1]


def test_a_real_worker_answers_dies_and_comes_back(
    site: Stewarded, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_SECRET", "x")
    reply = JoinReply.from_record(worker.ask(JOIN, 1, 2, join_request()))
    assert (reply.status, reply.patients) == (Status.OK, 40)
    first = pid_of(site)
    assert b"FLWR_" not in Path(f"/proc/{first}/environ").read_bytes()
    trained = worker.ask(TRAIN, 1, 2, train_request())
    assert status_in(trained) is Status.OK
    # between two messages: nothing is lost, and the round is answered identically by the next process
    os.kill(first, signal.SIGKILL)
    time.sleep(0.3)
    again = worker.ask(TRAIN, 1, 2, train_request())
    assert pid_of(site) != first
    assert repr(again) == repr(trained) and len(site.hospital.spends()) == 1
    # in the middle of one
    os.kill(pid_of(site), signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (pid_of(site), signal.SIGKILL)).start()
    with pytest.raises(WorkerLostError):
        worker.ask(TRAIN, 1, 2, train_request())


def test_a_worker_that_answers_garbage(site: Stewarded, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = multiprocessing.Pipe()

    def answer() -> None:
        theirs.send_bytes(READY)
        for _ in range(2):
            theirs.recv_bytes()
        for part in (DONE, b"\xff" * 100):
            theirs.send_bytes(part)

    def start() -> None:
        worker._pipe, worker._process = ours, subprocess.Popen(["sleep", "60"])
        threading.Thread(target=answer, daemon=True).start()

    monkeypatch.setattr(worker, "_start", start)
    with pytest.raises(WorkerLostError, match="cannot be read"):
        worker.ask(JOIN, 1, 2, join_request())


def test_a_worker_that_hangs_is_killed(site: Stewarded, worker: Worker) -> None:
    while "worker-ready" not in [report["event"] for report in site.reports]:
        worker.tend()
        time.sleep(0.1)
    worker._limit = 0.3
    stuck = pid_of(site)
    os.kill(stuck, signal.SIGSTOP)
    with pytest.raises(WorkerLostError, match="too long"):
        worker.ask(JOIN, 1, 2, join_request())
    assert not Path(f"/proc/{stuck}").exists()
