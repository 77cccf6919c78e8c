"""The gRPC health protocol, asked over a real connection."""

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common import health
from common.errors import UsageError
from common.health import STALE_SECONDS, HealthServer, probe

SERVICES = ("one", "two")


@pytest.fixture
def server() -> Iterator[HealthServer]:
    made = HealthServer("127.0.0.1:0", SERVICES)
    yield made
    made.stop()


def everything(address: str) -> int:
    """What a container engine asks: the service without a name."""
    with grpc.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(service=""), timeout=5).status


def test_each_service_is_well_or_not(server: HealthServer) -> None:
    assert probe(server.address, SERVICES) == {"one": False, "two": False}
    server.update({"one": True})
    assert probe(server.address, SERVICES) == {"one": True, "two": False}
    assert everything(server.address) == health_pb2.HealthCheckResponse.NOT_SERVING
    server.update({"one": True, "two": True})
    assert probe(server.address, SERVICES) == {"one": True, "two": True}
    assert everything(server.address) == health_pb2.HealthCheckResponse.SERVING


def test_a_service_that_is_not_served_is_no_answer(server: HealthServer) -> None:
    assert probe(server.address, ("one", "three")) is None


def test_nobody_answers_once_it_is_stopped(server: HealthServer) -> None:
    server.stop()
    assert probe(server.address, SERVICES, 0.5) is None


def test_what_is_published_does_not_last(server: HealthServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.update({"one": True, "two": True})
    later = health.time.monotonic() + STALE_SECONDS + 1
    monkeypatch.setattr(health.time, "monotonic", lambda: later)
    assert probe(server.address, SERVICES) == {"one": False, "two": False}, "the process hangs"
    server.update({"one": True})
    assert probe(server.address, SERVICES) == {"one": True, "two": False}


def test_a_proxy_of_the_environment_is_not_asked(server: HealthServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.update({"one": True, "two": True})
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert probe(server.address, SERVICES) == {"one": True, "two": True}


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot listen"):
        HealthServer("192.0.2.1:1", SERVICES)
