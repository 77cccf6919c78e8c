"""The worker: a warm process of its own that runs the installed client.app on one message after another.

It speaks with the executor through one inherited socket: a JSON line and the message's records (protobuf) in, a verdict
and the reply's records out. It holds no key of Flower's network and no token; its parent addresses the replies.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from client import PARENT
from common.errors import FederationError

READY, DONE, FAILED = b"ready", b"done", b"failed"
STARTING_TIME = 300.0
TIME_LIMIT = 6 * 3600.0
KEPT_OUT = ("FLWR_", "FLOWER_")  # variables the worker does not inherit


class WorkerLostError(FederationError):
    """The worker died, was killed, or took longer than its limit."""


class Worker:
    """The parent's handle: starts the process, passes messages, restarts it after a crash."""

    def __init__(self, site_toml: Path, report: Callable[..., None], limit: float = TIME_LIMIT) -> None:
        self._site, self._report, self._limit = site_toml, report, limit
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._ready = False
        self._crashes, self._not_before = 0, 0.0

    def tend(self) -> None:
        """Start the process if there is none and its pause after a crash is over; notice that it is ready."""
        if self._process is not None and self._process.poll() is not None:
            self._lost(f"ended with code {self._process.returncode}")
        if self._process is None and time.monotonic() >= self._not_before:
            self._start()
        self._notice(0.0)

    def ask(self, kind: str, run: int, node: int, content: RecordDict) -> RecordDict:
        """The reply of client.app; `WorkerLostError` if there will be none."""
        self.tend()
        if self._ready and self._pipe is not None and self._pipe.poll(0.0):  # nobody asked it anything: it has died
            self._lost("ended between two messages")
        if self._process is None:
            self._start()  # a message is no reason to wait for the pause
        if not self._notice(STARTING_TIME):
            self._lost("did not start in time")
            raise WorkerLostError("the worker did not start")
        assert self._pipe is not None
        try:
            self._pipe.send_bytes(json.dumps({"kind": kind, "run": run, "node": node}).encode())
            self._pipe.send_bytes(recorddict_to_proto(content).SerializeToString())
            if not self._pipe.poll(self._limit):
                self._lost(f"took longer than {self._limit:g} s")
                raise WorkerLostError("the worker took too long")
            verdict, data = self._pipe.recv_bytes(), self._pipe.recv_bytes()
        except (OSError, EOFError):
            self._lost("ended in the middle of a message")
            raise WorkerLostError("the worker ended") from None
        if verdict != DONE:
            raise WorkerLostError("client.app raised")
        self._crashes = 0
        try:
            message = ProtoRecordDict()
            message.ParseFromString(data)
            return recorddict_from_proto(message)
        except Exception:  # whatever the libraries make of bytes that are none of ours
            raise WorkerLostError("the worker's reply cannot be read") from None

    def stop(self) -> None:
        """End the process; a message in progress is lost to it."""
        process, self._process, self._ready = self._process, None, False
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if process is not None:
            process.kill()
            process.wait()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {name: value for name, value in os.environ.items() if not name.startswith(KEPT_OUT)}
        command = [sys.executable, "-P", "-m", "client.worker", "--fd", str(theirs.fileno()), "--site", str(self._site)]
        self._process = subprocess.Popen(
            command,
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            env=environment,
        )
        theirs.close()
        self._pipe, self._ready = Connection(ours.detach()), False
        self._report("worker-started", worker=self._process.pid)

    def _notice(self, timeout: float) -> bool:
        """Whether the process has said that it is ready, waiting up to `timeout` seconds for it."""
        if self._ready or self._pipe is None:
            return self._ready
        try:
            self._ready = self._pipe.poll(timeout) and self._pipe.recv_bytes() == READY
        except (OSError, EOFError):
            self._lost("ended before it was ready")
        if self._ready:
            self._report("worker-ready")
        return self._ready

    def _lost(self, how: str) -> None:
        self.stop()
        self._crashes += 1
        pause = min(60.0, 2.0 ** min(self._crashes, 6) / 2)
        self._not_before = time.monotonic() + pause
        self._report("worker-lost", reason=how, crashes=self._crashes, pause=pause)


def end_with_parent(then: Callable[[], None]) -> None:
    """Call `then` once the process that started this one is gone, however it ended."""

    def watch() -> None:
        while os.getppid() == PARENT:
            time.sleep(0.5)
        then()

    threading.Thread(target=watch, name="parent", daemon=True).start()


def serve(pipe: Connection, site_toml: Path) -> None:
    """Answer messages until the parent closes the pipe."""
    from flwr.app import Context, Message
    from flwr.supercore.task_identity import TaskIdentity

    from client.app import app

    pipe.send_bytes(READY)
    while True:
        try:
            head, content = json.loads(pipe.recv_bytes()), ProtoRecordDict()
            content.ParseFromString(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        run, node = int(head["run"]), int(head["node"])
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run, node
        configuration = {"site-config": str(site_toml)}
        context = Context(run_id=run, node_id=node, node_config=configuration, state=RecordDict(), run_config={})  # type: ignore[arg-type]
        message = Message(content=recorddict_from_proto(content), dst_node_id=node, message_type=str(head["kind"]))
        try:
            reply = recorddict_to_proto(app(message, context).content).SerializeToString()
        except Exception as error:  # its text might quote a patient
            print(f"cohortium-site: client.app raised {type(error).__name__}", file=sys.stderr, flush=True)
            pipe.send_bytes(FAILED)
            pipe.send_bytes(b"")
        else:
            pipe.send_bytes(DONE)
            pipe.send_bytes(reply)


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="client.worker")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--site", type=Path, required=True)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    end_with_parent(lambda: os._exit(1))
    serve(Connection(options.fd), options.site)


if __name__ == "__main__":
    main()
