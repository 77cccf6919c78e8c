"""The coordinator's executor: claims the ServerApp of every run and runs the installed server.app, never the bundle.

One run at a time; the others wait at the SuperLink. It runs a launch of this consortium only: one whose settings lie in
the state folder, and whose bundle stands for exactly the code that is loaded here, since that is what sites approved.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Context, RecordDict
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, context_to_proto, run_from_proto
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from common.errors import CohortiumError, FederationError
from common.files import write_atomic
from common.keys import read_private_file
from server.bundle import RUN_KEY, build_bundle
from server.grid import QuickGrid, shorten_waits
from server.processes import SECRET, StateFolder, end_with_parent, quiet_routine, use_json_logs
from server.run import RunFiles, RunSettings
from server.runs import RUN_NAME, Runs

IDLE_SECONDS = 0.3
HEARTBEAT_SECONDS = 10.0
ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
log = logging.getLogger("cohortium.executor")


class Executor:
    """Claims tasks at `address` (HOST:PORT of the private listener) until it is ended."""

    def __init__(self, state: StateFolder, address: str, ca: Path) -> None:
        from server.app import app  # warm: imported once, before any run

        self.app = app
        self.state = state
        self.address = address
        self.ca_path = ca
        self.ca = ca.read_bytes()
        self.bundle = build_bundle().digest
        secret = read_private_file(state.secret, SECRET).strip()
        self.base = RuntimeHttpClient.from_server_address(
            address,
            False,
            self.ca,
            [
                RuntimeVersionHttpInterceptor(component_name="flwr-serverapp"),
                SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=frozenset({ACQUIRE})),
            ],
        )
        shorten_waits()

    def run(self) -> None:
        """Forever."""
        self._stop_abandoned()
        log.info("ready; the code that sites approve is %s", self.bundle)
        request = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
        while True:
            try:
                answer = self.base.AcquireTask(request)
            except httpx.HTTPError as error:
                log.warning("the SuperLink cannot be asked for work (%s)", type(error).__name__)
                time.sleep(1.0)
                continue
            self._heard()
            if answer.HasField("task") and answer.token:
                self._serve(answer.token)
            else:
                time.sleep(IDLE_SECONDS)

    def _serve(self, token: str) -> None:
        grid = QuickGrid(runtime_api_address=self.address, insecure=False, root_certificates=self.ca, token=token)
        status, details, context = SubStatus.FAILED, "see the coordinator's files", None
        ended = threading.Event()
        threading.Thread(target=self._beat, args=(grid, ended), daemon=True, name="heartbeat").start()
        try:
            pulled = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
            run, context = run_from_proto(pulled.run), context_from_proto(pulled.context)
            grid.set_run(run)
            TaskIdentity.task_id, TaskIdentity.run_id = pulled.task_id, run.run_id
            TaskIdentity.node_id = context.node_id
            settings = self._settings(str(run.override_config.get(RUN_KEY, "")), run.fab_hash)
            write_atomic(self.state.serving, json.dumps({"run": str(run.run_id)}))
            log.info("run %s begins", run.run_id)
            context.run_config = {RUN_KEY: str(settings)}
            self.app(grid=grid, context=context)
            status, details = SubStatus.COMPLETED, ""
        except KeyboardInterrupt:  # Flower sends this process SIGINT once the SuperLink no longer accepts its token
            status, details = SubStatus.STOPPED, "stopped"
        except CohortiumError as error:
            log.error("the run failed: %s", error.message)
        except Exception as error:
            log.error("the run ended on %s", type(error).__name__)
            if os.environ.get("COHORTIUM_DEBUG"):
                log.exception("traceback")
        finally:
            ended.set()
            self._report(grid, context, status, details)
            with contextlib.suppress(OSError):
                self.state.serving.unlink(missing_ok=True)
            log.info("run over: %s", status)

    def _settings(self, name: str, bundle: str) -> Path:
        path = self.state.runs / f"{name}.json"
        if not re.fullmatch(RUN_NAME, name) or not path.is_file():
            raise FederationError(
                "a run that no launch of this consortium started", fix="launch with `cohortium launch`"
            )
        if bundle != self.bundle:
            error = FederationError(
                f"the run's bundle {bundle[:16]}… is not of the code loaded here ({self.bundle[:16]}…)",
                fix="restart `cohortium start-superlink` after an update, and launch again",
            )
            failure = {"exit_code": int(error.exit_code), "message": error.message, "fix": error.fix}
            write_atomic(RunFiles(RunSettings.load(path).out).failure, json.dumps(failure))
            raise error
        return path

    def _beat(self, grid: QuickGrid, ended: threading.Event) -> None:
        while not ended.wait(HEARTBEAT_SECONDS):
            try:
                grid._runtime_client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
                self._heard()
            except Exception as error:  # the next one may get through; the run's own requests say if it is over
                log.warning("heartbeat: %s", type(error).__name__)

    def _heard(self) -> None:
        """The SuperLink has answered; `start-superlink` takes the time of this file for its health probe."""
        with contextlib.suppress(OSError):
            self.state.answered.touch(0o600)

    def _report(self, grid: QuickGrid, context: Context | None, status: str, details: str) -> None:
        if context is not None:
            context.state = RecordDict()
        proto = None if context is None else context_to_proto(context)
        try:
            grid._runtime_client.PushTaskOutput(
                PushTaskOutputRequest(context=proto, sub_status=status, details=details)
            )
        except (Exception, KeyboardInterrupt) as error:
            log.warning("the SuperLink did not take the outcome (%s)", type(error).__name__)
        finally:
            grid.close()

    def _stop_abandoned(self) -> None:
        """End the run that an executor before this one had in hand when it was killed: it has to be resumed."""
        try:
            run = str(json.loads(self.state.serving.read_text(encoding="utf-8"))["run"])
            Runs(self.address, self.ca_path).stop(run)
            log.warning("run %s was cut off; continue it with `cohortium resume`", run)
        except (OSError, ValueError, KeyError, TypeError):
            return
        except FederationError as error:
            log.warning("%s", error.message)
        self.state.serving.unlink(missing_ok=True)


def main(consortium: str, address: str, logs: str) -> None:
    """Entry point of the process that the supervisor starts."""
    end_with_parent()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if logs == "json":
        use_json_logs()
    else:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("flwr").propagate = False  # it prints its own lines
    quiet_routine()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    folder = Path(consortium)
    executor: Any = Executor(StateFolder(folder), address, folder / "ca.pem")
    while True:
        try:
            executor.run()
        except KeyboardInterrupt:  # a late one for a run that is over
            continue


if __name__ == "__main__":
    main(*sys.argv[1:])
