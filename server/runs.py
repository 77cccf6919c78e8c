"""Runs at the SuperLink, over its private Control API: start, ask, stop."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import FederationError

if TYPE_CHECKING:
    from flwr.supercore.control import ControlHttpClient

RUN_NAME = r"[0-9a-f]{32}"
CHECK = "check that `cohortium start-superlink` runs for this consortium; `cohortium status` shows it"


@dataclass(frozen=True)
class RunState:
    """What the SuperLink says of a run: `status` is pending, starting, running or finished."""

    run: str
    status: str
    outcome: str

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.status == "finished"


@dataclass(frozen=True)
class Runs:
    """The Control API at `address` (HOST:PORT), believed under the CA in the file `ca`."""

    address: str
    ca: Path

    def require_up(self) -> None:
        """`FederationError` if the SuperLink does not answer."""
        from server.supervisor import healthy

        if not healthy(self.address, self.ca):
            raise FederationError(f"{self.address}: the SuperLink does not answer", fix=CHECK)

    def start(self, bundle: bytes, config: dict[str, str]) -> str:
        """Submit a run; returns its number. `FederationError` if the SuperLink does not take it."""
        from flwr.common.serde import fab_to_proto, user_config_to_proto
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.supercore.fab import Fab

        fab = fab_to_proto(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {}))
        request = StartRunRequest(fab=fab, override_config=user_config_to_proto({**config}))
        with self._client("the study was not submitted") as client:
            answer = client.StartRun(request)
        if not answer.HasField("run_id"):
            raise FederationError(f"{self.address}: the SuperLink did not start the run: {answer.note}", fix=CHECK)
        return str(answer.run_id)

    def state(self, run: str) -> RunState | None:
        """How a run stands; None if the SuperLink does not know it."""
        from flwr.proto.control_pb2 import ListRunsRequest

        with self._client(f"run {run} cannot be asked for") as client:
            try:
                found = client.ListRuns(ListRunsRequest(run_id=int(run))).run_dict
            except Exception as error:
                if getattr(getattr(error, "response", None), "status_code", 0) == 404:
                    return None
                raise
        if int(run) not in found:
            return None
        status = found[int(run)].status
        return RunState(run, status.status, status.sub_status)

    def stop(self, run: str) -> None:
        """End a run; nothing happens if it is over."""
        from flwr.proto.control_pb2 import StopRunRequest

        state = self.state(run)
        if state is None or state.over:
            return
        with self._client(f"run {run} was not stopped") as client:
            client.StopRun(StopRunRequest(run_id=int(run)))

    @contextmanager
    def _client(self, failed: str) -> Iterator[ControlHttpClient]:
        import httpx
        from flwr.supercore.control import ControlHttpClient
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        try:
            root = self.ca.read_bytes()
        except OSError as error:
            raise FederationError(
                f"{self.ca}: cannot be read ({error.strerror})", fix="name the consortium's folder"
            ) from None
        client = ControlHttpClient.from_server_address(
            self.address, False, root, [RuntimeVersionHttpInterceptor(component_name="cohortium")]
        )
        try:
            yield client
        except httpx.HTTPStatusError as error:
            raise FederationError(
                f"{self.address}: {failed}: the SuperLink answered {error.response.status_code}", fix=CHECK
            ) from None
        except httpx.HTTPError as error:
            raise FederationError(f"{self.address}: {failed} ({type(error).__name__})", fix=CHECK) from None
        finally:
            client.close()
