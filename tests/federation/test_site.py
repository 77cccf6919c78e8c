"""A site against a real SuperLink: a hostile bundle, approvals, rounds, and processes that are killed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.supercore.task_identity import TaskIdentity

from client.init_site import init_site
from client.review import Review
from client.site import load_site
from common.audit import read_audit
from common.messages import JOIN, TRAIN, JoinReply, Status, TrainReply
from server.consortium import init_consortium
from tests.client.hospital import PROTOCOL, decoder_of, join_request, table, train_request
from tests.federation.site_processes import (
    BIN,
    COHORTIUM_SITE,
    Coordinator,
    SiteProcess,
    SuperLink,
    environment,
    evil_bundle,
)

pytestmark = [pytest.mark.federation, pytest.mark.deadlines]
SHAPES = {name: tuple(value.shape) for name, value in decoder_of(PROTOCOL).items()}


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, None)


@pytest.fixture
def link(tmp_path: Path) -> Iterator[SuperLink]:
    init_consortium(tmp_path / "con", "Trial", ["localhost"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "link").mkdir()
    made = SuperLink(tmp_path / "link", tmp_path / "con", port)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def folder(tmp_path: Path, link: SuperLink) -> Path:
    """A site that is enrolled."""
    (tmp_path / "patients.csv").write_text(table())
    init_site(tmp_path / "anna", "anna", tmp_path / "patients.csv", link.address, tmp_path / "con" / "ca.pem")
    path = tmp_path / "anna" / "site.toml"
    path.write_text(path.read_text().replace('device = "auto"', 'device = "cpu"\nthreads = 1'))
    link.register((tmp_path / "anna" / "keys" / "node.key.pub").read_text())
    return tmp_path / "anna"


def test_a_site_decides_and_survives(link: SuperLink, folder: Path, tmp_path: Path) -> None:
    owned = tmp_path / "OWNED"
    bundle = evil_bundle(owned)
    site = SiteProcess(folder)
    coordinator = Coordinator(link, bundle)
    review = Review(load_site(folder / "site.toml"))
    try:
        (node,) = coordinator.wait_for_nodes(1)

        def join() -> Status:
            return JoinReply.from_record(coordinator.ask(node, JOIN, join_request())[0].content).status

        def train(number: int) -> TrainReply:
            reply, _ = coordinator.ask(node, TRAIN, train_request(number))
            return TrainReply.from_record(reply.content, SHAPES)

        assert join() is Status.AWAITING_APPROVAL
        assert train(1).status is Status.AWAITING_APPROVAL
        review.decide(review.find(hashlib.sha256(bundle).hexdigest()), "approved", "steward", "a test")
        assert join() is Status.AWAITING_APPROVAL, "now the study"
        review.decide(review.find(PROTOCOL.digest), "approved", "steward", "a test")
        assert join() is Status.OK
        assert train(1).status is Status.OK

        # a worker that dies in a message: an answer at once, and the next question is answered
        site.wait_for("worker-ready")
        worker = [event["worker"] for event in site.events() if event["event"] == "worker-started"][-1]
        os.kill(worker, signal.SIGKILL)
        answered = train(2)
        assert answered.status in (Status.OK, Status.INTERNAL_ERROR) and answered.round == 2
        assert train(2).status is Status.OK

        # a SuperNode that is killed is back long before the minute after which Flower forgets it
        started = [e for e in site.events() if e["event"] == "started" and e.get("process") == "supernode"]
        os.kill(started[-1]["pid"], signal.SIGKILL)
        killed = time.monotonic()
        while sum("SuperNode ID" in str(event.get("message")) for event in site.events()) < 2:
            assert time.monotonic() - killed < 45, "the SuperNode is not back"
            time.sleep(0.2)
        again = train(2)
        assert (again.status, again.ledger_length) == (Status.OK, 2), "no second spend"

        status = command(folder, "status", "--json")
        found = json.loads(status.stdout)
        assert status.returncode == 0 and all(found["health"].values()) and found["connected"]
        assert found["studies"][0]["round"] == 2 and found["waiting"] == []
        second = command(folder, "start")
        assert second.returncode == 6 and "running already" in second.stderr
        review.decide(review.find(PROTOCOL.digest), "denied", "steward", "withdrawn")
        assert train(3).status is Status.DENIED
    finally:
        coordinator.finish()
        code = site.stop()
    assert code == 0
    assert not owned.exists(), "the bundle was imported"
    lines = [(line["action"], line["outcome"]) for line in read_audit(folder / "state" / "audit.jsonl")]
    assert [line for line in lines if line[0] in ("approve", "deny")] == [
        ("approve", "approved"),
        ("approve", "approved"),
        ("deny", "denied"),
    ]
    assert ("answer train.round", "ok") in lines and lines[-1] == ("answer train.round", "denied")
    assert not list((folder / "state" / "run").glob("*.secret")), "the secret outlives the site"
    text = site.log_path.read_text()
    assert "PRIVATE KEY" not in text and "owned" not in text


def test_the_same_bundle_runs_at_a_stock_supernode(link: SuperLink, folder: Path, tmp_path: Path) -> None:
    """The control: without the executor this bundle writes its file."""
    owned = tmp_path / "OWNED"
    coordinator = Coordinator(link, evil_bundle(owned))
    command = [str(BIN / "flower-supernode"), "--superlink", link.address]
    command += ["--root-certificates", str(folder / "ca.pem")]
    command += ["--auth-supernode-private-key", str(folder / "keys" / "node.key")]
    with (
        (tmp_path / "stock.log").open("wb") as log,
        subprocess.Popen(
            command, stdout=log, stderr=log, env=environment(tmp_path / "home"), start_new_session=True
        ) as stock,
    ):
        try:
            (node,) = coordinator.wait_for_nodes(1)
            coordinator.ask(node, JOIN, join_request())
        finally:
            coordinator.finish()
            os.killpg(stock.pid, signal.SIGKILL)
    assert owned.read_text() == "owned"


def test_a_site_that_is_not_enrolled_says_so(link: SuperLink, folder: Path, tmp_path: Path) -> None:
    stranger = tmp_path / "bert"
    init_site(stranger, "bert", tmp_path / "patients.csv", link.address, folder / "ca.pem")
    site = SiteProcess(stranger)
    assert site.process.wait(120) == 8
    assert "not enrolled, or was revoked" in site.log_path.read_text().splitlines()[-2]


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-c", COHORTIUM_SITE, *arguments, "--site", str(folder / "site.toml")]
    return subprocess.run(command, capture_output=True, text=True, env=environment(folder), timeout=60)
