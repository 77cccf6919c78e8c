"""The layers of Flower's real application that requests pass by, and those that they must not."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.superlink.main import create_app

from server import shortcut
from server.shortcut import FLEET, RUNTIME, UNTOUCHED, Unless, shorten
from server.superlink import fleet_paths, paths_below


@pytest.fixture
def app() -> Any:
    config: Any = SimpleNamespace(
        simulation=False,
        database=":flwr-in-memory:",
        superexec_auth_secret=b"s" * 32,
        artifact_provider=None,
        fleet_api_type="rest",
        authn_plugin=None,
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_supernode_auth=True,
    )
    lifespan: Any = lambda *_: None  # noqa: E731 - nothing is started here
    return create_app(config, lifespan)


def paths(app: Any) -> frozenset[str]:
    return fleet_paths(app) | paths_below(app, RUNTIME)


def asked(app: Any, path: str) -> tuple[int, bytes]:
    """Status and body for an empty request that nobody has signed."""

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://superlink") as client:
            return await client.post(path, content=b"", headers={"content-type": "application/protobuf"})

    response = asyncio.run(ask())
    return response.status_code, response.content


def test_nobody_without_a_key_gets_past_and_every_answer_is_the_same(app: Any) -> None:
    below = sorted(paths(app) | paths_below(app, "/v1/control/"))
    before = {path: asked(app, path) for path in below}
    app.middleware_stack = None
    shorten(app, paths(app))
    assert {path: asked(app, path) for path in below} == before
    assert all(before[path][0] == 401 for path in fleet_paths(app))


def test_each_layer_is_passed_by_for_its_paths_only(app: Any) -> None:
    layers = [layer.cls.__name__ for layer in app.user_middleware]
    shorten(app, paths(app))
    passed = {
        layer.kwargs["layer"].cls.__name__: layer.kwargs["paths"]
        for layer in app.user_middleware
        if layer.cls is Unless
    }
    # Flower has every layer that is named here: a new name would silently make this slower.
    assert set(passed) == set(UNTOUCHED) <= set(layers) and len(app.user_middleware) == len(layers)
    assert not any(path.startswith(FLEET) for path in passed["NodeAuthMiddleware"])
    for allowed in passed.values():
        assert allowed and all(path.startswith((FLEET, RUNTIME)) for path in allowed)


def test_a_log_of_what_sites_ask_is_not_passed_by(app: Any) -> None:
    app.state.fleet_event_log_plugin = object()
    shorten(app, paths(app))
    (log,) = [
        layer
        for layer in app.user_middleware
        if layer.cls is Unless and layer.kwargs["layer"].cls.__name__ == "FleetEventLogMiddleware"
    ]
    assert not any(path.startswith(FLEET) for path in log.kwargs["paths"])


def test_another_version_of_flower_keeps_all_layers(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortcut, "version", lambda _: "1.42.0")
    before = list(app.user_middleware)
    shorten(app, paths(app))
    assert app.user_middleware == before
