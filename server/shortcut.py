"""Requests of sites and executor past those layers of Flower's application that do nothing to them.

Flower 1.41 puts nine layers around every request, four of them for the Control API alone, and each costs about as much
as a query. A layer is passed by only for exactly the paths for which its own code hands the request on untouched:
authentication of nodes is passed by for no path of the Fleet API, and what the Control API has stays whole. With any
other version of Flower all layers stay.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, MutableMapping
from importlib.metadata import version
from typing import Any

Scope = MutableMapping[str, Any]
App = Callable[..., Awaitable[None]]
KNOWN_FLOWER = "1.41."
FLEET, RUNTIME = "/v1/fleet/", "/v1/runtime/"
# Which paths a layer hands on untouched, by the name of its class.
UNTOUCHED = {
    "ControlSensitiveResponseMiddleware": (FLEET, RUNTIME),
    "ControlAuthenticationMiddleware": (FLEET, RUNTIME),
    "ControlLicenseMiddleware": (FLEET, RUNTIME),
    "ControlEventLogMiddleware": (FLEET, RUNTIME),
    "RuntimeTracingMiddleware": (FLEET,),
    "NodeAuthMiddleware": (RUNTIME,),
    "FleetEventLogMiddleware": (RUNTIME,),
}


class Unless:
    """A layer of the application, which requests to `paths` pass by."""

    def __init__(self, app: App, layer: Any, paths: frozenset[str]) -> None:
        self.direct, self.paths = app, paths
        self.through: App = layer.cls(app, *layer.args, **layer.kwargs)

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """One request."""
        past = scope["type"] == "http" and scope["path"] in self.paths
        await (self.direct if past else self.through)(scope, receive, send)


def shorten(app: Any, paths: frozenset[str]) -> None:
    """Let requests to `paths`, all of them exact, pass by the layers of `app` that hand them on untouched."""
    from starlette.middleware import Middleware

    if not version("flwr").startswith(KNOWN_FLOWER) or app.middleware_stack is not None:
        return
    untouched = dict(UNTOUCHED)
    if os.environ.get("FLWR_TRACING_ENABLED") != "1":
        untouched["RuntimeTracingMiddleware"] = (FLEET, RUNTIME)
    if getattr(app.state, "fleet_event_log_plugin", None) is None:
        untouched["FleetEventLogMiddleware"] = (FLEET, RUNTIME)
    for number, layer in enumerate(app.user_middleware):
        name = getattr(layer.cls, "__name__", "")
        if name in untouched and layer.cls.__module__.startswith("flwr."):
            passing = frozenset(path for path in paths if path.startswith(untouched[name]))
            app.user_middleware[number] = Middleware(Unless, layer=layer, paths=passing)  # type: ignore[arg-type]
