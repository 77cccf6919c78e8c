"""`cohortium status --probe`: the health services of a running server and nothing else, for container engines."""

from __future__ import annotations

from pathlib import Path

from common.errors import ExitCode, FederationError
from common.health import probe
from server.processes import SERVICES, StateFolder


def ask_health(consortium: Path) -> dict[str, bool] | None:
    """The services of a running `start-superlink`, each well or not; None if nobody answers."""
    try:
        address = StateFolder(consortium.resolve()).read_addresses().get("health")
    except FederationError:
        return None
    return probe(address, SERVICES) if address else None


def health_code(services: dict[str, bool] | None) -> ExitCode:
    """Of `cohortium status --probe`: 0 if every service is well."""
    return ExitCode.OK if services and all(services.values()) else ExitCode.FEDERATION
