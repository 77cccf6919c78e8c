"""The executor: claims the SuperNode's tasks, lets only approved ones reach the worker, and answers all others at once.

It loads neither the training code nor anything of a bundle. If the worker dies it still holds the task's token, and
answers `internal-error` immediately.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from client.gate import Gate, refusal, status_in
from client.tasks import GoneError, ObjectPushError, Task, Tasks, TransportError
from client.worker import TIME_LIMIT, Worker, WorkerLostError, end_with_parent
from common.messages import Status

POLL, IDLE_POLL = 0.05, 0.5  # seconds between questions to the SuperNode: a fifth of the quiet time, within these
PATIENCE = 1.0  # between attempts to reach a SuperNode that is not up yet


class Stopped(BaseException):  # an event, which no handler of errors may swallow
    """SIGTERM arrived."""


class UnansweredError(Exception):
    """A message that this process took cannot be answered."""


class Executor:
    """One loop: claim, judge, answer."""

    def __init__(self, tasks: Tasks, gate: Gate, worker: Worker) -> None:
        self._tasks, self._gate, self._worker = tasks, gate, worker
        self._reached: bool | None = None

    def run(self) -> None:
        """Until `Stopped`; the worker ends with it."""
        last = time.monotonic()
        try:
            while True:
                self._worker.tend()
                if self._step():
                    last = time.monotonic()
                elif self._reached:
                    time.sleep(min(IDLE_POLL, max(POLL, 0.2 * (time.monotonic() - last))))
                else:
                    time.sleep(PATIENCE)
        finally:
            self._worker.stop()

    def _step(self) -> bool:
        """Serve one task if there is one."""
        try:
            task = self._tasks.claim()
        except TransportError as error:
            if self._reached is not False:
                say("supernode-unreachable", reason=type(error).__name__)
            self._reached = False
            return False
        if self._reached is not True:
            say("supernode-reached")
        self._reached = True
        if task is None:
            return False
        try:
            with task:
                self.serve(task)
        except Stopped:
            raise
        except (GoneError, ObjectPushError) as error:  # the SuperNode ended, or has let go of a message that expired
            say("task-lost", reason=type(error).__name__)
        except Exception as error:  # Flower's own
            if task.owed:  # the SuperNode would wait for ever; whoever started this process starts both anew
                say("unanswered", reason=type(error).__name__)
                raise UnansweredError from None
            say("task-failed", reason=type(error).__name__)
        return True

    def serve(self, task: Task) -> None:
        """Answer one message."""
        started = time.perf_counter()
        say("received")  # whoever started this process now knows that an answer is owed
        task.pull()
        kind = task.kind if task.is_client_app else "agent"
        asked, status = self._gate.judge(kind, task.content, task.bundle)
        reply, stopped = None, False
        if status is None:
            try:
                reply = self._worker.ask(kind, task.run, task.node, task.content)
                status = status_in(reply)
            except WorkerLostError as error:
                status = Status.INTERNAL_ERROR
                say("worker-failed", reason=error.message)
            except Stopped:  # the coordinator learns at once that there will be no answer
                status, stopped = Status.INTERNAL_ERROR, True
        digest = hashlib.sha256(task.bundle).hexdigest()
        task.answer(reply if reply is not None else refusal(asked, status))
        self._gate.note(asked, status, digest)
        seconds = round(time.perf_counter() - started, 3)
        say("answered", kind=kind, study=asked.study, round=asked.round, status=status.value, seconds=seconds)
        if stopped:
            raise Stopped


def say(event: str, **fields: Any) -> None:
    """One JSON line for the process that started this one; it adds the time."""
    print(json.dumps({"event": event} | fields), flush=True)


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="client.executor")
    parser.add_argument("--runtime", required=True, help="HOST:PORT of the SuperNode's Runtime API")
    parser.add_argument("--secret-file", type=Path, required=True)
    parser.add_argument("--site", type=Path, required=True)
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT)
    options = parser.parse_args()

    def on_stop(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Stopped

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_stop)
    end_with_parent(lambda: os.kill(os.getpid(), signal.SIGTERM))
    say("started", pid=os.getpid())
    tasks = Tasks(options.runtime, options.secret_file.read_bytes())
    site = options.site.resolve()
    try:
        Executor(tasks, Gate(site, say), Worker(site, say, options.time_limit)).run()
    except Stopped:
        say("stopped")
        sys.exit(0)
    except UnansweredError:
        sys.exit(1)


if __name__ == "__main__":
    main()
