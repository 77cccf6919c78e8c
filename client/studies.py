"""A study that this site has accepted, as it lies on its disk."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.anchor.cells import TableCells
from common.encoding import TableEncoding
from common.model.vae import Decoder
from common.privacy.anchor import Step
from common.study import Protocol


@dataclass(frozen=True)
class Study:
    """An accepted study at this site: its protocol, its folder, the shapes of the decoder, and the number of cells."""

    protocol: Protocol
    encoding: TableEncoding
    shapes: Mapping[str, tuple[int, ...]]
    folder: Path
    cells: int

    def anchored_path(self, step: Step) -> Path:
        """The noised statistics of a step of the anchor."""
        return self.folder / f"anchor-{step}.safetensors"

    @property
    def state_path(self) -> Path:
        """The training state of this study."""
        return self.folder / "state.safetensors"

    @property
    def anchored_decoder_path(self) -> Path:
        """The global decoder before the first round after an anchor, for the steward to look at."""
        return self.folder / "anchored-decoder.safetensors"

    @property
    def evaluated_path(self) -> Path:
        """The aggregates of the evaluation."""
        return self.folder / "evaluated.safetensors"

    @property
    def released_path(self) -> Path:
        """The rows released through the channel."""
        return self.folder / "released.safetensors"


@functools.lru_cache(maxsize=8)
def open_study(path: Path, _time: int) -> Study:
    """Read the protocol at `path`; `_time` is when it was last changed, so that a new one is read again."""
    protocol = Protocol.from_json(json.loads(path.read_text(encoding="utf-8")))
    encoding = TableEncoding(protocol.schema)
    decoder = Decoder(encoding, protocol.study.model, initialise=False)  # for its shapes only
    shapes = {name: tuple(value.shape) for name, value in decoder.named_parameters()}
    cells = sum(TableCells(protocol.schema, protocol.target).sizes)
    return Study(protocol, encoding, shapes, path.parent, cells)
