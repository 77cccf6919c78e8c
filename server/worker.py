"""The process in which Flower's simulation runtime runs; `simulation.py` starts it and watches it."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from common.errors import FederationError

OBJECT_STORE_BYTES = 128 * 1024 * 1024  # messages are a few hundred kilobytes; Ray's default takes a third of memory


def load_app(name: str) -> Any:
    """A Flower app by its reference in the distribution's metadata, as Flower itself finds it."""
    found = list(entry_points(group="cohortium.apps", name=name))
    if not found:
        raise FederationError(f"the {name} of this installation is not registered", fix="pip install cohortium again")
    return found[0].load()


def main(sites: int) -> None:
    """Run the simulation with one SuperNode a site; settings come from the environment (`server.run`)."""
    import torch
    from flwr.simulation import run_simulation

    actors = max(1, min(os.cpu_count() or 1, sites))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    run_simulation(
        server_app=load_app("serverapp"),
        client_app=load_app("clientapp"),
        num_supernodes=sites,
        backend_config={
            "init_args": {
                "num_cpus": actors,
                "num_gpus": gpus,
                "object_store_memory": OBJECT_STORE_BYTES,
                "log_to_driver": True,
            },
            "client_resources": {"num_cpus": 1, "num_gpus": gpus / actors},
        },
    )


if __name__ == "__main__":
    listing = Path(os.environ["COHORTIUM_SIMULATION"])
    main(len(json.loads(listing.read_text(encoding="utf-8"))))
    # Flower's threads may wait for replies that will never come; everything that matters is on disk by now.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
