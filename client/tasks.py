"""The seam to flwr 1.41: tasks of a flower-supernode that runs with --isolation process, on loopback.

Everything private of Flower that the executor needs is here. Where an upgrade changes it, the import fails or the
SuperNode refuses the request: nothing runs. A bundle is bytes in memory and nothing else.
"""

from __future__ import annotations

import threading
from typing import Any

import httpx
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError, pull_and_inflate_object_from_tree
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime.run_clientapp import push_message

__all__ = ["GoneError", "ObjectPushError", "Task", "Tasks", "TransportError"]
HEARTBEAT = 10.0
TransportError = httpx.HTTPError
GoneError = httpx.TransportError  # no answer at all, while a `TransportError` may also be a refusal


class Tasks:
    """Where tasks come from: the SuperNode's Runtime API."""

    def __init__(self, address: str, secret: bytes) -> None:
        self._address = address
        method = frozenset({"/flwr.proto.Runtime/AcquireTask"})
        self._client = self._connect(SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=method))

    def claim(self) -> Task | None:
        """The next task, or None; `TransportError` if the SuperNode cannot be reached."""
        # Agents too: a task of that type that nobody claims would block the SuperNode for good.
        request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP, TaskType.AGENT_APP])
        response = self._client.AcquireTask(request)
        if not (response.HasField("task") and response.token):
            return None
        return Task(self._connect(RuntimeTokenHttpInterceptor(response.token)), response.task.type)

    def _connect(self, *interceptors: Any) -> RuntimeHttpClient:
        version = RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")
        return RuntimeHttpClient.from_server_address(self._address, True, None, [version, *interceptors])


class Task:
    """One message with the bundle it names. Use as a context manager: heartbeats go out until it ends."""

    def __init__(self, client: RuntimeHttpClient, kind: str) -> None:
        self._client = client
        self.is_client_app = kind == TaskType.CLIENT_APP
        self._context: Context | None = None
        self._stop = threading.Event()
        self._answered = False
        self.owed = False  # the SuperNode has given its message away, and waits for the answer without end

    def __enter__(self) -> Task:
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        status, details = (SubStatus.COMPLETED, "") if self._answered else (SubStatus.FAILED, "internal-error")
        context = context_to_proto(self._context) if self._context is not None else None
        try:
            self._client.PushTaskOutput(PushTaskOutputRequest(context=context, sub_status=status, details=details))
        except TransportError:
            pass  # the SuperNode is gone or gave the task up; its next start begins anew
        finally:
            self._client.close()

    def pull(self) -> None:
        """Fetch bundle and message; `bundle`, `kind`, `content`, `run` and `node` are set after this."""
        pulled = self._client.PullTaskInput(PullTaskInputRequest())
        self.bundle = bytes(pulled.fab.content)
        context = self._context = context_from_proto(pulled.context)
        self.run, self.node = int(pulled.run.run_id), int(context.node_id)
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = pulled.task_id, self.run, self.node
        messages = self._client.PullMessages(PullAppMessagesRequest())
        tree, node = messages.message_object_trees[0], Node(node_id=self.node)
        self._message, self.content = message_from_proto(messages.messages_list[0]), RecordDict()
        self._message.metadata.__dict__["_message_id"] = tree.object_id
        self.kind = str(self._message.metadata.message_type)
        confirm = make_confirm_message_received_fn_protobuf(self._client.ConfirmMessageReceived, node, self.run)

        def confirmed(identity: str) -> None:
            confirm(identity)
            self.owed = True

        # The SuperNode offers a task before it holds all objects of its message, and drops a message that is confirmed
        # too early: pull every object first, whatever the answer will be. This function does, and then confirms.
        try:
            message = pull_and_inflate_object_from_tree(
                tree,
                make_pull_object_fn_protobuf(self._client.PullObject, node, self.run),
                confirmed,
                return_type=Message,
                # A run that ends while its objects are pushed never finishes them: not to be waited for for ever. But
                # a busy SuperLink takes its time: with 30 sites on two loaded cores more than 20 s were seen.
                initial_backoff=0.02,
                backoff_cap=1.0,
                max_time=90.0,
            )
            self.content = message.content if message.has_content() else RecordDict()
        except Exception:
            if not self.owed:
                raise
            # All of it is here, and is no message: answered like an empty one, since the SuperNode waits for an answer.

    def answer(self, content: RecordDict | None) -> None:
        """Send the reply; without content Flower's error 7, for a message that is none of ours."""
        assert self._context is not None
        if content is None:
            reply = Message(Error(code=ErrorCode.INVALID_FAB, reason="bad-request"), reply_to=self._message)
        else:
            reply = Message(content=content, reply_to=self._message)
        push_message(self._client, reply, self._context)
        self._answered, self.owed = True, False

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            try:
                self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
            except (TransportError, RuntimeError):
                continue
