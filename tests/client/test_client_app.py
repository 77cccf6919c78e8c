"""The device, and the ClientApp around a site."""

import json
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.app import app
from client.device import pick_device
from common.errors import SiteError
from common.messages import (
    JOIN,
    TRAIN,
    JoinReply,
    Status,
)
from common.records import HEADER
from tests.client.hospital import (
    ROWS,
    SECRET,
    Hospital,
    join_request,
    train_request,
)


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(SiteError, match="finds no such device"):
        pick_device(f"cuda:{torch.cuda.device_count()}")


def test_a_device_that_is_not_there(hospital: Hospital) -> None:
    hospital.joined()
    site = hospital.config.site.model_copy(update={"device": f"cuda:{torch.cuda.device_count()}"})
    hospital.config = hospital.config.model_copy(update={"site": site})
    assert hospital.train(train_request()).status is Status.SITE_MISCONFIGURED
    assert "finds no such device" in hospital.reason(Status.SITE_MISCONFIGURED)


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower stamps every message with the task it was made in."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def deliver(kind: str, record: RecordDict, **node_config: str | int) -> RecordDict:
    context = Context(run_id=1, node_id=2, node_config=dict(node_config), state=RecordDict({}), run_config={})
    return app(Message(content=record, dst_node_id=2, message_type=kind), context).content


def test_the_client_app_answers_for_the_site_of_its_node(hospital: Hospital) -> None:
    configured = {"site-config": str(hospital.folder / "site.toml")}
    joined = deliver(JOIN, join_request(), **configured)
    hospital.inspect(JOIN, joined)
    assert JoinReply.from_record(joined).patients == ROWS
    trained = deliver(TRAIN, train_request(), **configured)
    hospital.inspect(TRAIN, trained)
    assert len(hospital.spends()) == 1


@pytest.mark.parametrize("text", [None, "[site\n", f'[site]\nname = "{SECRET}"\n'])
def test_a_node_without_a_usable_site_says_so_and_no_more(
    hospital: Hospital, text: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COHORTIUM_SIMULATION", raising=False)
    path = hospital.folder / "site.toml"
    path.unlink() if text is None else path.write_text(text)
    for kind, request in ((JOIN, join_request()), (TRAIN, train_request())):
        reply = deliver(kind, request, **{"site-config": str(path)})
        hospital.inspect(kind, reply)
        assert reply.config_records[HEADER]["status"] == "site-misconfigured"
        assert "site.toml" in capsys.readouterr().err
    reply = deliver(JOIN, join_request())
    assert reply.config_records[HEADER]["status"] == "site-misconfigured"
    assert "no site configuration" in capsys.readouterr().err


def test_a_simulated_node_finds_its_site_by_its_number(
    hospital: Hospital, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = tmp_path / "sites.json"
    listing.write_text(json.dumps(["/nowhere/site.toml", str(hospital.folder / "site.toml")]))
    monkeypatch.setenv("COHORTIUM_SIMULATION", str(listing))
    partition = {"partition-id": 1, "num-partitions": 2}
    assert JoinReply.from_record(deliver(JOIN, join_request(), **partition)).site == "anna"
    elsewhere = deliver(JOIN, join_request(), **{"partition-id": 0})
    assert JoinReply.from_record(elsewhere).status is Status.SITE_MISCONFIGURED
