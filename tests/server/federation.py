"""A study of three sites, and replies as they would send them, for the tests of the strategy."""

import hashlib
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from common.messages import Status, TrainReply
from common.model.vae import Decoder
from common.privacy.ledger import GENESIS
from common.privacy.ledger_keys import SignedHead, public_hex, sign_head
from common.privacy.update import update_norm
from common.schema import parse_schema
from common.study import Protocol, Study
from server.checkpoint import build_decoder
from server.roll import Roll
from server.strategy import LipschitzFedAvg, Member, RoundReport
from server.witness import Witness

SECRET = "Zq7731"
RADIUS, BOUND, LOGIT_SCALE = 2.0, 10.0, 5.0
MEMBERS = (Member(11, "anna", 100), Member(12, "berta", 200), Member(13, "clara", 500))
WEIGHTS = {"anna": 0.125, "berta": 0.25, "clara": 0.625}
NODES = {member.site: member.node_id for member in MEMBERS}
COORDINATOR = Ed25519PrivateKey.generate()
NO_GRID: Any = None  # the strategy's own steps never touch the grid

Updates = Mapping[str, Mapping[str, torch.Tensor]]


def make_protocol(name: str = "s", **training: Any) -> Protocol:
    study = {
        "study": {"name": name, "schema": "schema.json"},
        "model": {"latent_dim": 3, "hidden": [8, 6], "decoder_lipschitz": BOUND, "logit_scale": LOGIT_SCALE},
        "training": {"rounds": 5, "update_norm": RADIUS, "min_sites": 2} | training,
    }
    schema = {
        "fields": [
            {"name": "age", "type": "number", "constraints": {"minimum": 0, "maximum": 100}},
            {"name": "sex", "type": "string", "constraints": {"enum": ["f", "m"]}},
        ]
    }
    return Protocol(Study.model_validate(study), parse_schema(schema))


class SiteLedger:
    """The heads that a site's ledger would have."""

    def __init__(self, site: str) -> None:
        self.site, self.key = site, Ed25519PrivateKey.generate()
        self.length, self.head = 0, GENESIS

    def spend(self) -> None:
        self.length, self.head = self.length + 1, hashlib.sha256(f"{self.head}{self.length}".encode()).hexdigest()

    @property
    def signed(self) -> tuple[int, str, str]:
        return self.length, self.head, sign_head("ledger head", self.key, self.site, self.length, self.head)


class Federation:
    """A strategy, what it reported, and replies as the sites of the study would send them."""

    def __init__(self, members: tuple[Member, ...] = MEMBERS, roll: Roll | None = None, **training: Any) -> None:
        self.protocol = make_protocol(**training)
        self.decoder: Decoder = build_decoder(self.protocol, 0)
        self.reports: list[tuple[RoundReport, dict[str, torch.Tensor]]] = []
        self.folder = tempfile.TemporaryDirectory()
        self.witness = Witness(Path(self.folder.name) / "ledger-heads.json", COORDINATOR)
        self.ledgers = {member.site: SiteLedger(member.site) for member in members}
        for site, ledger in self.ledgers.items():
            self.witness.joined(SignedHead(site, *ledger.signed, public_hex(ledger.key)))
        self.strategy = LipschitzFedAvg(
            protocol=self.protocol,
            decoder=self.decoder,
            members=members,
            observer=lambda report, decoder: self.reports.append((report, decoder.arrays())),
            witness=self.witness,
            roll=roll or Roll(),
        )

    def requests(self, number: int = 1) -> dict[int, Message]:
        messages = self.strategy.configure_train(number, ArrayRecord(), ConfigRecord(), NO_GRID)
        return {message.metadata.dst_node_id: message for message in messages}

    def update(self, seed: int, norm: float = RADIUS * (1 - 1e-6)) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        raw = {n: torch.randn(a.shape, generator=generator) for n, a in self.decoder.arrays().items()}
        return {n: a * (norm / update_norm(raw)) for n, a in raw.items()}

    def record(self, site: str, update: Mapping[str, torch.Tensor], number: int = 1, study: str = "") -> RecordDict:
        self.ledgers[site].spend()
        signed = self.ledgers[site].signed
        return TrainReply(Status.OK, site, study or self.protocol.digest, number, update, *signed).to_record()

    def answers(self, updates: Updates, number: int = 1) -> list[Message]:
        requests = self.requests(number)
        return [Message(self.record(s, u, number), reply_to=requests[NODES[s]]) for s, u in updates.items()]

    def play(self, updates: Updates, number: int = 1) -> dict[str, torch.Tensor]:
        self.strategy.aggregate_train(number, self.answers(updates, number))
        return self.decoder.arrays()


def clipped(weight: np.ndarray, bound: float) -> np.ndarray:
    left, singular, right = np.linalg.svd(weight, full_matrices=False)
    return (left * np.minimum(singular, bound)) @ right


def by_hand(start: Mapping[str, torch.Tensor], updates: Updates) -> dict[str, np.ndarray]:
    """P_s(decoder + Σ w u) in numpy."""
    result = {n: a.numpy().astype(np.float64) for n, a in start.items()}
    for site, update in updates.items():
        result = {n: a + WEIGHTS[site] * update[n].numpy().astype(np.float64) for n, a in result.items()}
    share = (BOUND / LOGIT_SCALE) ** (1 / 3)
    return {n: clipped(a, share) if n.endswith("weight") else a for n, a in result.items()}


def lipschitz(arrays: Mapping[str, torch.Tensor]) -> float:
    weights = [a.numpy().astype(np.float64) for n, a in arrays.items() if n.endswith("weight")]
    assert len(weights) == 3
    return LOGIT_SCALE * math.prod(float(np.linalg.svd(w, compute_uv=False)[0]) for w in weights)


def distance(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> float:
    return update_norm({n: left[n].to(torch.float64) - right[n].to(torch.float64) for n in left})


def equal(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)
