"""Health over the gRPC health protocol (package grpcio-health-checking, which Flower brings along), of either side.

The service "" is SERVING if all are; the others say it one by one. Nothing secret is served, so it is plain; it listens
on loopback unless `--health` says else.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from common.errors import UsageError

STALE_SECONDS = 120.0  # a process that publishes nothing any more hangs
_SERVING, _NOT = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class _Servicer(health.HealthServicer):
    """What was published last, for as long as that is recent."""

    def __init__(self) -> None:
        super().__init__()
        self.published = 0.0

    def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - the protocol's name
        """The status of one service."""
        answer = super().Check(request, context)
        stale = time.monotonic() - self.published > STALE_SECONDS
        return health_pb2.HealthCheckResponse(status=_NOT) if stale and answer.status == _SERVING else answer


class HealthServer:
    """Answers probes for `services` until it is stopped."""

    def __init__(self, address: str, services: Sequence[str]) -> None:
        """Listen on HOST:PORT (port 0: a free one); `UsageError` if that cannot be."""
        self.services = tuple(services)
        self._servicer = _Servicer()
        self._server = grpc.server(ThreadPoolExecutor(2, thread_name_prefix="health"))
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, self._server)
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError:
            port = 0
        if port == 0:
            raise UsageError(f"--health {address}: cannot listen there", fix="choose a free HOST:PORT of this machine")
        self.address = f"{address.rpartition(':')[0]}:{port}"
        self.update({})
        self._server.start()

    def update(self, well: Mapping[str, bool]) -> None:
        """Publish which services are well; one that is not named is not. Again at least every STALE_SECONDS."""
        for name in self.services:
            self._servicer.set(name, _SERVING if well.get(name) else _NOT)
        self._servicer.set("", _SERVING if all(well.get(name) for name in self.services) else _NOT)
        self._servicer.published = time.monotonic()

    def stop(self) -> None:
        """Answer no more."""
        self._servicer.enter_graceful_shutdown()
        self._server.stop(0.5)


def probe(address: str, services: Sequence[str], timeout: float = 3.0) -> dict[str, bool] | None:
    """Which of `services` are well at `address`; None if nobody answers there, or knows no such service."""
    # This machine is asked, and never a proxy that the environment names.
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            found = {
                name: stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=timeout).status == _SERVING
                for name in services
            }
        except grpc.RpcError:
            return None
    return found
