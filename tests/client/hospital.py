"""A hospital on disk for the tests of its answers, and the requests a coordinator would send it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import RecordDict

from client.handlers import Site
from client.site import SiteConfig, load_site
from common.anchor_messages import AnchorReply, AnchorRequest
from common.evaluation.results import values_expected
from common.evaluation_messages import EvaluateReply, EvaluateRequest
from common.messages import (
    ANCHOR,
    EVALUATE,
    JOIN,
    RELEASE,
    REPLY_FIELDS,
    TRAIN,
    JoinReply,
    JoinRequest,
    ReleaseReply,
    ReleaseRequest,
    Status,
    TrainReply,
    TrainRequest,
)
from common.privacy.anchor import Step
from common.privacy.ledger import Ledger
from common.records import ARRAYS, HEADER, arrays_digest
from common.schema import parse_schema
from common.study import Protocol, Study
from server.checkpoint import build_decoder
from tests.packed import unpack

SECRET = "Zq7731"
MARKED = "61.7731"  # a number that stands for a patient: no reply and no log may hold it
ROWS, RADIUS, ROUNDS = 40, 0.5, 3
PAYLOADS = {
    TRAIN: "update",
    RELEASE: "rows",
    EVALUATE: "aggregates",
    ANCHOR: "statistics",
}  # what a reply of each kind carries
SCHEMA = {
    "fields": [
        {"name": "age", "type": "number", "constraints": {"minimum": 0, "maximum": 120}},
        {"name": "sex", "type": "string", "constraints": {"enum": ["f", "m"]}},
        {"name": "dead", "type": "boolean", "constraints": {"required": True}},
    ]
}


def table(rows: int = ROWS) -> str:
    random = np.random.default_rng(0)
    lines = [f"{MARKED},f,true"]
    for _ in range(rows - 1):
        age = random.uniform(20, 90)
        lines.append(f"{age:.1f},{'fm'[random.integers(2)]},{'true' if random.random() < age / 100 else 'false'}")
    return "\n".join(["age,sex,dead", *lines]) + "\n"


def study(**sections: dict[str, Any]) -> Protocol:
    document: dict[str, Any] = {
        "study": {"name": "s", "schema": "schema.json"},
        "model": {"latent_dim": 2, "hidden": [8], "decoder_lipschitz": 12.0},
        "training": {"rounds": ROUNDS, "batch_size": 16, "update_norm": RADIUS, "learning_rate": 0.05},
    }
    for name, values in sections.items():
        document[name] = document.get(name, {}) | values
    return Protocol(Study.model_validate(document), parse_schema(SCHEMA))


PROTOCOL = study()
COORDINATOR = Ed25519PrivateKey.generate()


def decoder_of(protocol: Protocol, seed: int = 0) -> dict[str, torch.Tensor]:
    return build_decoder(protocol, seed).arrays()


def join_request(protocol: Protocol = PROTOCOL) -> RecordDict:
    return JoinRequest(protocol.to_json()).to_record()


def train_request(number: int = 1, protocol: Protocol = PROTOCOL, seed: int = 0, weight: float = 0.25) -> RecordDict:
    return TrainRequest(protocol.digest, number, weight, decoder_of(protocol, seed)).to_record()


def anchor_request(protocol: Protocol, step: Step, marginals: np.ndarray | None = None) -> RecordDict:
    return AnchorRequest(protocol.digest, step, marginals).to_record()


def evaluate_request(protocol: Protocol, cohort: np.ndarray) -> RecordDict:
    return EvaluateRequest(protocol.digest, cohort).to_record()


def release_request(protocol: Protocol, rows: int, seed: int = 0) -> RecordDict:
    return ReleaseRequest(protocol.digest, rows, decoder_of(protocol, seed)).to_record()


class Hospital:
    """A site on disk, every reply of which is checked on its way out, as the coordinator will receive it."""

    def __init__(
        self, folder: Path, policy: str = "", state: str = "state", source: str = 'data = "patients.csv"'
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.data = folder.resolve() / "patients.csv"
        self.data.write_text(table())
        (folder / "site.toml").write_text(
            f'[site]\nname = "anna"\nstate = "{state}"\ndevice = "cpu"\nthreads = 1\n{source}\n[policy]\n{policy}\n'
        )
        self.folder = folder
        self.config: SiteConfig = load_site(folder / "site.toml")
        self.state = self.config.site.state

    @property
    def site(self) -> Site:
        return Site(self.config)  # a new one each time: a SuperNode may have been started anew

    def join(self, record: RecordDict) -> JoinReply:
        sent = self.site.join(record).to_record()
        self.inspect(JOIN, sent)
        return JoinReply.from_record(sent)

    def train(self, record: RecordDict, protocol: Protocol = PROTOCOL) -> TrainReply:
        sent = self.site.train(record).to_record()
        self.inspect(TRAIN, sent)
        return TrainReply.from_record(sent, {n: tuple(a.shape) for n, a in decoder_of(protocol).items()})

    def release(self, record: RecordDict, protocol: Protocol, rows: int) -> ReleaseReply:
        sent = self.site.release(record).to_record()
        self.inspect(RELEASE, sent)
        return ReleaseReply.from_record(sent, (rows, len(protocol.schema.columns)))

    def anchor(self, record: RecordDict, values: int) -> AnchorReply:
        sent = self.site.anchor(record).to_record()
        self.inspect(ANCHOR, sent)
        return AnchorReply.from_record(sent, values)

    def evaluate(self, record: RecordDict, protocol: Protocol) -> EvaluateReply:
        sent = self.site.evaluate(record).to_record()
        self.inspect(EVALUATE, sent)
        return EvaluateReply.from_record(sent, values_expected(protocol))

    def joined(self, protocol: Protocol = PROTOCOL) -> "Hospital":
        assert self.join(join_request(protocol)).status is Status.OK
        return self

    def inspect(self, kind: str, record: RecordDict) -> None:
        """Nothing but classified fields, known codes, and what the coordinator knows already."""
        allowed = REPLY_FIELDS[kind]
        assert set(record) <= {HEADER, ARRAYS}
        header = record.config_records[HEADER]
        assert set(header) <= set(allowed) - set(PAYLOADS.values())
        status = Status(str(header["status"]))
        assert (ARRAYS in record) == (status is Status.OK and kind in PAYLOADS)
        if ARRAYS in record:
            payload = set(decoder_of(PROTOCOL)) if kind == TRAIN else {PAYLOADS[kind]}
            assert PAYLOADS[kind] in allowed
            assert set(unpack(record.config_records[ARRAYS])) == payload
        text = repr(dict(header))
        for forbidden in (SECRET, MARKED, "Error", "Traceback", str(self.folder), "patients.csv", "column"):
            assert forbidden not in text

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.state / "audit.jsonl").read_text().splitlines()]

    def reason(self, status: Status) -> str:
        """What the site's own log says about its last answer, which was `status`."""
        last = self.log()[-1]
        assert (last["action"], last["outcome"]) == ("refused", status.value)
        text = (self.state / "audit.jsonl").read_text()
        assert SECRET not in text and MARKED not in text
        return last["reason"]

    def spends(self) -> list[tuple[int, str]]:
        path = self.state / "ledger.sqlite"
        if not path.exists():
            return []
        with Ledger(path, "anna") as ledger:
            ledger.verify()
            return [(entry.round, entry.payload_digest) for entry in ledger.entries()]


def digest_of(update: Mapping[str, torch.Tensor] | None) -> str:
    assert update is not None
    return arrays_digest(update)
