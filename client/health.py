"""Health of a running site over the gRPC health protocol (package grpcio-health-checking, which Flower brings along).

The service "" is SERVING if everything is; "supernode", "executor", "worker" and "superlink" (it has answered lately)
say it one by one. Nothing secret is served, so it is plain; it listens on loopback unless `--health` says else.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from common.errors import UsageError

SERVICES = ("supernode", "executor", "worker", "superlink")
_SERVING, _NOT = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class HealthServer:
    """Answers probes until it is stopped."""

    def __init__(self, address: str) -> None:
        """Listen on HOST:PORT (port 0: a free one); `UsageError` if that cannot be."""
        self._servicer = health.HealthServicer()
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
        """Publish which services are well; one that is not named is not."""
        for name in SERVICES:
            self._servicer.set(name, _SERVING if well.get(name) else _NOT)
        self._servicer.set("", _SERVING if all(well.get(name) for name in SERVICES) else _NOT)

    def stop(self) -> None:
        """Answer no more."""
        self._servicer.enter_graceful_shutdown()
        self._server.stop(0.5)


def probe(address: str, timeout: float = 3.0) -> dict[str, bool] | None:
    """Which services are well at `address`; None if nobody answers there."""
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            found = {
                name: stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=timeout).status == _SERVING
                for name in SERVICES
            }
        except grpc.RpcError:
            return None
    return found
