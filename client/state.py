"""What a site keeps between rounds: its encoder, its optimiser, and what it sent last, for an identical resend.

Safetensors files in the study's folder, written atomically and durably, so that a SuperNode may be killed at any
moment. They are made of patient data and never leave the site.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_arrays
from safetensors.torch import save
from torch import Tensor

from common.errors import SiteError
from common.files import write_atomic

SECTIONS = ("trainer", "reply")
ROWS = "rows"


class StateError(SiteError):
    """The training state on disk cannot be used."""


@dataclass(frozen=True)
class SiteState:
    """`round` is the last one answered (0: none), `base` the digest of the decoder it was trained from."""

    round: int = 0
    base: str = ""
    trainer: Mapping[str, Tensor] = field(default_factory=dict)
    reply: Mapping[str, Tensor] = field(default_factory=dict)


def load_state(path: Path, study: str) -> SiteState:
    """The state on disk, or a fresh one if there is none; `StateError` if the file is damaged or of another study."""
    if not path.exists():
        return SiteState()
    sections: dict[str, dict[str, Tensor]] = {name: {} for name in SECTIONS}
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["cohortium"])
            for key in file.keys():  # noqa: SIM118 - not a dict
                section, _, name = key.partition("/")
                sections[section][name] = file.get_tensor(key)
        if header["study"] != study:
            raise KeyError("study")
        return SiteState(int(header["round"]), str(header["base"]), sections["trainer"], sections["reply"])
    except (SafetensorError, KeyError, TypeError, ValueError, OSError):
        raise StateError(
            f"{path}: the site's training state is damaged or belongs to another study",
            fix="restore it from a backup; without it the site cannot go on with this study",
        ) from None


def save_state(path: Path, study: str, state: SiteState) -> None:
    """Write `state` durably; `OutputError` if that fails, in which case the old state is still whole."""
    tensors = {f"trainer/{name}": tensor.contiguous() for name, tensor in state.trainer.items()}
    tensors |= {f"reply/{name}": tensor.contiguous() for name, tensor in state.reply.items()}
    header = json.dumps({"study": study, "round": state.round, "base": state.base})
    # Not `save_file`: on a full disk it raises an error of its own that is not an OSError.
    write_atomic(path, save(tensors, metadata={"cohortium": header}))


@dataclass(frozen=True)
class Released:
    """The rows that went out, float64 (rows, columns), and `base`, the digest of the decoder that made them."""

    base: str
    rows: np.ndarray


def load_released(path: Path, study: str) -> Released | None:
    """The rows on disk, None if there are none; `StateError` if the file is damaged or of another study."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            header = json.loads((file.metadata() or {})["cohortium"])
            rows = file.get_tensor(ROWS)
        if header["study"] != study or rows.dtype != np.float64:
            raise KeyError("study")
        return Released(str(header["base"]), rows)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError):
        raise StateError(
            f"{path}: the rows this site released are damaged or belong to another study",
            fix="restore the file from a backup; fresh rows would be a new spend",
        ) from None


def save_released(path: Path, study: str, released: Released) -> None:
    """Write durably; `OutputError` if that fails."""
    header = json.dumps({"study": study, "base": released.base})
    rows = np.ascontiguousarray(released.rows, dtype=np.float64)
    write_atomic(path, save_arrays({ROWS: rows}, metadata={"cohortium": header}))
