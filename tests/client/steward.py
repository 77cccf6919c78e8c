"""A hospital with a key, a gate, and a steward who decides."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from client.approvals import Approvals, Kind, Verdict
from client.gate import Gate
from common.audit import read_audit
from common.messages import JOIN, Status
from common.privacy.ledger_keys import load_or_create_key
from tests.client.hospital import PROTOCOL, Hospital, join_request

BUNDLE = b"PK bundle"


def digest_of(bundle: bytes) -> str:
    return hashlib.sha256(bundle).hexdigest()


class Stewarded:
    """A hospital with a key, a gate, and a steward who decides."""

    def __init__(self, folder: Path, policy: str = "") -> None:
        self.hospital = Hospital(folder, policy)
        self.state = self.hospital.state
        self.state.mkdir(exist_ok=True)
        self.key = load_or_create_key(self.state / "ledger.key")
        self.approvals = Approvals(self.state, "anna")
        self.reports: list[dict[str, Any]] = []
        self.gate = Gate(folder / "site.toml", self.report)

    def report(self, event: str, **fields: Any) -> None:
        self.reports.append({"event": event} | fields)

    def judge(self, kind: str, record: RecordDict, bundle: bytes = BUNDLE) -> Status | None:
        asked, status = self.gate.judge(kind, record, bundle)
        if status is not None:
            self.gate.note(asked, status, digest_of(bundle))
        return status

    def decide(self, kind: Kind, digest: str, verdict: Verdict = "approved") -> None:
        self.approvals.decide(kind, digest, verdict, by="steward", reason="", key=self.key)

    def approve_all(self) -> None:
        self.judge(JOIN, join_request())
        self.decide("bundle", digest_of(BUNDLE))
        self.judge(JOIN, join_request())
        self.decide("study", PROTOCOL.digest)

    def audit(self) -> list[tuple[str, str]]:
        return [(line["action"], line["outcome"]) for line in read_audit(self.state / "audit.jsonl")]
