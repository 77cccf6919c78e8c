"""The rounds of a study in this process, without Flower: the real trainers, and the strategy's own aggregation."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from client.trainers import MODES, RoundInputs
from common.encoding import TableEncoding
from common.model.vae import Decoder
from common.study import Protocol
from common.table import Table
from server.checkpoint import build_decoder
from server.strategy import LipschitzFedAvg, Member
from server.witness import Witness

Round = tuple[dict[str, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Trained:
    """The final decoder, and (global decoder, update) of every round of one site."""

    decoder: Decoder
    rounds: list[Round]


def federate(protocol: Protocol, tables: Mapping[str, Table], watched: str) -> Trained:
    """Train over `tables`, seeded by the study; keep the messages of the site `watched`."""
    study, seed = protocol.study, protocol.study.study.seed or 0
    encoding = TableEncoding(protocol.schema)
    data = {name: encoding.encode(table) for name, table in tables.items()}
    states: dict[str, Mapping[str, Tensor]] = {name: {} for name in data}
    decoder = build_decoder(protocol, seed)
    members = tuple(Member(i, name, len(rows)) for i, (name, rows) in enumerate(data.items()))
    with tempfile.TemporaryDirectory() as scratch:
        witness = Witness(Path(scratch) / "heads.json", Ed25519PrivateKey.generate())
        strategy = LipschitzFedAvg(protocol, decoder, members, lambda report, current: None, witness)
    trainer, kept = MODES[study.training.mode], []
    for number in range(1, study.training.rounds + 1):
        start, updates = decoder.arrays(), {}
        for i, (name, rows) in enumerate(data.items()):
            own = seed * 1_000_003 + number * 1009 + i
            given = RoundInputs(study, encoding, rows, start, number, states[name], own, torch.device("cpu"))
            result = trainer.train(given)
            states[name], updates[name] = result.state, dict(result.update)
        kept.append((start, updates[watched]))
        strategy.aggregate(updates)
    return Trained(decoder, kept)
