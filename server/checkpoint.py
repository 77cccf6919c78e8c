"""The coordinator's decoder on disk: every round durable, and the final one as a file of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from common.encoding import TableEncoding
from common.errors import OutputError
from common.files import write_atomic
from common.model.vae import Decoder
from common.study import Protocol


@dataclass(frozen=True)
class Checkpoint:
    """A global decoder with the study and round it belongs to, and what was reported of that round."""

    study: str
    round: int
    decoder: Decoder
    report: Mapping[str, Any]


def build_decoder(protocol: Protocol, seed: int | None = None) -> Decoder:
    """The study's decoder with its data-independent orthogonal start."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    constrained = protocol.study.training.mode != "none"
    return Decoder(TableEncoding(protocol.schema), protocol.study.model, generator, constrained=constrained)


def save_checkpoint(
    path: Path, protocol: Protocol, number: int, decoder: Decoder, report: Mapping[str, Any] | None = None
) -> None:
    """Write the decoder after round `number` (0: the start) and the round's report durably and atomically."""
    header = json.dumps({"study": protocol.digest, "round": number, "report": dict(report or {})})
    # Not `save_file`: on a full disk it raises an error of its own that is not an OSError.
    write_atomic(path, save(decoder.arrays(), metadata={"cohortium": header}))


def load_checkpoint(path: Path, protocol: Protocol) -> Checkpoint:
    """Read a checkpoint of this study; `OutputError` if it is damaged or of another study."""
    decoder = build_decoder(protocol, seed=0)
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["cohortium"])
            arrays = {name: file.get_tensor(name) for name, _ in decoder.named_parameters()}
        if header["study"] != protocol.digest:
            raise OutputError(f"{path}: belongs to another study", fix="use the study.toml this decoder was made with")
        if any(arrays[name].shape != parameter.shape for name, parameter in decoder.named_parameters()):
            raise ValueError("shape")  # copying would broadcast a smaller array without a word
        decoder.load_arrays(arrays)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError, RuntimeError):
        raise OutputError(f"{path}: not a decoder checkpoint of this study", fix="check the path") from None
    return Checkpoint(header["study"], int(header["round"]), decoder, header.get("report", {}))


def complete_rounds(path: Path, checkpoint: Checkpoint) -> None:
    """Bring rounds.jsonl to the round of the checkpoint, which is written first.

    A process killed between the two left out the last line, or tore it. `OutputError` if more than that is missing.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    if len(lines) == checkpoint.round - 1 and checkpoint.report:
        lines.append(json.dumps(dict(checkpoint.report)))
    if len(lines) != checkpoint.round:
        raise OutputError(
            f"{path}: holds {len(lines)} rounds, the checkpoint is of round {checkpoint.round}",
            fix="restore both files from the same moment",
        )
    write_atomic(path, "".join(f"{line}\n" for line in lines))
