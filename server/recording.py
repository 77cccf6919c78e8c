"""What an audit needs of a twin study: every global decoder that one site was sent, and every update it sent back.

In a simulation only. A consortium's coordinator sees the same messages; the product keeps none of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from common.files import write_atomic
from server.strategy import LipschitzFedAvg

FOLDER = "messages"


@dataclass
class RecordingFedAvg(LipschitzFedAvg):
    """Federated averaging that first writes down what `site` was sent and sent; `folder` is the run's."""

    site: str = ""
    folder: Path = Path()

    def aggregate(self, updates: Mapping[str, Mapping[str, torch.Tensor]]) -> float:
        """Write the round, then aggregate; a round that the site missed leaves nothing."""
        if self.site in updates:
            arrays = {f"start/{name}": array for name, array in self.decoder.arrays().items()}
            arrays |= {f"update/{name}": array.contiguous() for name, array in updates[self.site].items()}
            number = len(list((self.folder / FOLDER).glob("*.safetensors"))) + 1
            header = {"cohortium": json.dumps({"study": self.protocol.digest, "site": self.site})}
            write_atomic(self.folder / FOLDER / f"{number:05}.safetensors", save(arrays, metadata=header))
        return super().aggregate(updates)


def recorded_rounds(folder: Path) -> Iterator[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """(global decoder, update) of every round that the site answered, in order, one in memory at a time."""
    for path in sorted((folder / FOLDER).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        start, update = (
            {key.removeprefix(part): array for key, array in arrays.items() if key.startswith(part)}
            for part in ("start/", "update/")
        )
        yield start, update
