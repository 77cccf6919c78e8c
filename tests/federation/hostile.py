"""What a hostile site runs: its own SuperNode, executor and worker with code of its own, and another lie every round.

`sitecustomize` of the site's environment calls `install`. FOLDER/plan.json names the lie of each round,
FOLDER/seen.jsonl says which were told, and FOLDER/decoder-ROUND.safetensors is what the coordinator sent.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

FOLDER = "HOSTILE_FOLDER"
SITECUSTOMIZE = "from tests.federation.hostile import install\ninstall()\n"
HUGE = 200 << 20  # bytes
LATE, FOR_EVER = 19.0, 3600.0  # seconds
GARBAGE, REPLAYED = b"\xff" * 4096, 1


def install() -> None:
    """Change what the worker and the executor of this site do."""
    folder = os.environ.get(FOLDER)
    if folder and "client.worker" in sys.orig_argv:
        lie_in_the_worker(Path(folder))
    if folder and "client.executor" in sys.orig_argv:
        lie_in_the_executor(Path(folder))


def lie_in_the_worker(folder: Path) -> None:
    """Every answer to a round is first the honest one, spend and all, and then what the plan says."""
    import numpy as np
    import torch
    from flwr.app import ArrayRecord, ConfigRecord, RecordDict
    from flwr.common import serde
    from safetensors.torch import save_file

    import client.handlers
    from common.messages import TrainReply, TrainRequest

    plan, honest, kept = read_plan(folder), client.handlers.Site.train, dict[int, TrainReply]()
    raw: list[bytes] = []

    class Bytes:
        """In place of a message of protobuf."""

        def __init__(self, content: bytes) -> None:
            self.SerializeToString = lambda: content

    class Anything:
        """In place of a reply: these records, whatever they are."""

        def __init__(self, record: RecordDict) -> None:
            self.to_record = lambda: record

    def train(site: Any, record: Any) -> Any:
        header = record.config_records["header"]
        number, lie = int(header["round"]), plan.get(str(header["round"]), "")
        study = site._accepted(str(header["study"]))
        save_file(
            dict(TrainRequest.from_record(record, study.shapes).decoder), folder / f"decoder-{number}.safetensors"
        )
        reply = honest(site, record)
        assert reply.update is not None, reply
        kept[number] = reply
        first = lie not in seen(folder)
        note(folder, number, lie)
        if lie == "garbage":
            raw.append(GARBAGE)
        elif lie == "nan":
            name, array = next(iter(reply.update.items()))
            return replace(reply, update=dict(reply.update) | {name: torch.full_like(array, float("nan"))})
        elif lie == "too long":
            radius = study.protocol.study.training.update_norm
            norm = sum(float(array.square().sum()) for array in reply.update.values()) ** 0.5
            return replace(reply, update={n: a * (10 * radius / norm) for n, a in reply.update.items()})
        elif lie == "another round":
            return replace(reply, round=number + 1)
        elif lie == "another study":
            return replace(reply, study="0" * 64)
        elif lie == "another site":
            return replace(reply, site="anna")
        elif lie == "replay":
            return kept[REPLAYED]
        elif lie == "many parts":
            parts = np.frombuffer(os.urandom(HUGE), dtype=np.uint8)
            return Anything(RecordDict({"arrays": ArrayRecord([parts])}))
        elif lie == "huge":
            records = reply.to_record()
            records["arrays"] = ConfigRecord({"content": os.urandom(HUGE)})
            return Anything(records)
        elif (lie == "late" and first) or lie == "hang":
            time.sleep(LATE if lie == "late" else FOR_EVER)
        return reply

    def to_proto(content: Any, to_proto: Any = serde.recorddict_to_proto) -> Any:
        return Bytes(raw.pop()) if raw else to_proto(content)

    client.handlers.Site.train = train  # type: ignore[method-assign]
    serde.recorddict_to_proto = to_proto


def lie_in_the_executor(folder: Path) -> None:
    """A message whose own words name another sender and another question, and one that is no message."""
    import hashlib

    from flwr.app.message import remove_content_from_message
    from flwr.common.serde import message_to_proto
    from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
    from flwr.proto.node_pb2 import Node
    from flwr.proto.runtime_pb2 import PushAppMessagesRequest
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
        no_object_id_recompute,
    )
    from flwr.supernode.runtime import run_clientapp

    plan, honest = read_plan(folder), run_clientapp.push_message

    def push(runtime: Any, message: Any, context: Any) -> None:
        header = message.content.config_records.get("header", {}) if message.has_content() else {}
        lie = plan.get(str(header.get("round", "")), "")
        if lie not in ("forged", "no message"):
            honest(runtime, message, context)
            return
        note(folder, int(header["round"]), lie)
        about = message_to_proto(remove_content_from_message(message))
        if lie == "forged":
            message.metadata.__dict__ |= {"_src_node_id": victim(folder), "_reply_to_message_id": "0" * 64}
            message.metadata.__dict__["_message_id"] = message.object_id
            with no_object_id_recompute():
                tree = get_object_tree(message)
                objects = {name: part.deflate() for name, part in get_all_nested_objects(message).items()}
        else:
            body = secrets.token_bytes(500)
            content = b"Message  %d\x00" % len(body) + body
            name = hashlib.sha256(content).hexdigest()
            tree, objects = ObjectTree(object_id=name), {name: content}
        about.metadata.message_id = tree.object_id
        pushed = runtime.PushMessages(PushAppMessagesRequest(messages_list=[about], message_object_trees=[tree]))
        for name, content in objects.items():
            request = PushObjectRequest(
                node=Node(node_id=context.node_id), run_id=context.run_id, object_id=name, object_content=content
            )
            request.session_id = pushed.session_id
            assert runtime.PushObject(request).stored

    run_clientapp.push_message = push


def victim(folder: Path) -> int:
    """The node of the site that shall seem to have sent it; the test says who that is once all have joined."""
    while not (folder / "victim").exists():
        time.sleep(0.05)
    return int((folder / "victim").read_text())


def read_plan(folder: Path) -> dict[str, str]:
    return json.loads((folder / "plan.json").read_text())


def note(folder: Path, number: int, lie: str) -> None:
    with (folder / "seen.jsonl").open("a") as file:
        file.write(json.dumps({"round": number, "lie": lie}) + "\n")


def seen(folder: Path) -> list[str]:
    path = folder / "seen.jsonl"
    return [json.loads(line)["lie"] for line in path.read_text().splitlines()] if path.exists() else []
