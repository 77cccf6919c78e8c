"""The gate before the worker: which messages may reach the installed client.app, and the answer to all others.

A message passes if the SHA-256 of its app bundle and the digest of its study are both approved here. What nobody has
decided is noted for `cohortium-site review` and answered at once, so that the coordinator can ask again. Everything is
read afresh for every message: a decision, a withdrawal and a changed site.toml count at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import RecordDict

from client.approvals import Approvals, Kind
from client.bundles import BundleStore
from client.site import SiteConfig, load_site
from common.anchor_messages import AnchorReply, read_anchor_header
from common.audit import AUDIT_LOG, AuditLog
from common.errors import CohortiumError, LedgerError, OutputError, SchemaError, SiteError, StudyError
from common.evaluation_messages import EvaluateReply, read_evaluate_header
from common.messages import (
    ANCHOR,
    EVALUATE,
    JOIN,
    RELEASE,
    TRAIN,
    JoinReply,
    JoinRequest,
    ReleaseReply,
    Status,
    TrainReply,
    read_release_header,
    read_train_header,
)
from common.privacy.ledger_keys import load_key
from common.records import MessageError
from common.study import Protocol

LARGEST_PROTOCOL = 1 << 20  # bytes of JSON
MOST_WAITING = 32
MOST_REMEMBERED = 1000
LONGEST_REASON = 2000  # characters in the audit log: a stranger's message must not make its line too long to be written
CODES: tuple[tuple[type[Exception], Status], ...] = (
    (MessageError, Status.BAD_REQUEST),
    (StudyError, Status.BAD_REQUEST),
    (SchemaError, Status.BAD_REQUEST),
    (LedgerError, Status.LEDGER_FAILED),
    (OutputError, Status.STORAGE_FAILED),
    (SiteError, Status.SITE_MISCONFIGURED),
    (OSError, Status.STORAGE_FAILED),
)
Report = Callable[..., None]


@dataclass(frozen=True)
class Asked:
    """What a message is about, as far as it can be read."""

    kind: str
    site: str = ""
    study: str = ""
    round: int = 0


class Gate:
    """The decisions of one site, applied to messages."""

    def __init__(self, site_toml: Path, report: Report) -> None:
        self._path = site_toml
        self._report = report
        self._last: dict[tuple[str, str], tuple[int, Status]] = {}

    def judge(self, kind: str, content: RecordDict, bundle: bytes) -> tuple[Asked, Status | None]:
        """None if the message may pass, else the code to answer with; never raises."""
        asked, status, reason = Asked(kind), None, ""
        digest = hashlib.sha256(bundle).hexdigest()  # of the bytes, whatever anybody calls them
        try:
            config = load_site(self._path)
            asked = Asked(kind, config.site.name)
            key = load_key(config.site.state / "ledger.key")
            approvals = Approvals(config.site.state, config.site.name)
            status = self._bundle(config, approvals, bundle, digest, key)
            asked, protocol = _read(asked, content)
            if status is None:
                status = self._message(config, approvals, asked, protocol, key)
            if status is Status.REFUSED_BY_POLICY and protocol is not None:
                reason = "; ".join(config.objections(protocol))
        except Exception as error:
            if status is None:  # else the bundle has decided already
                status = next((code for type_, code in CODES if isinstance(error, type_)), Status.INTERNAL_ERROR)
            # Texts of our own errors hold no patient value.
            reason = str(error) if isinstance(error, CohortiumError | MessageError) else type(error).__name__
        if reason and status is not None:
            self._report("held-back", study=asked.study, status=status.value, reason=reason)
        if status is not None:
            self.note(asked, status, digest, reason)
        return asked, status

    def note(self, asked: Asked, status: Status, bundle: str, reason: str = "") -> None:
        """One line in the audit log about an answer; a coordinator that keeps asking adds no more. Never raises."""
        key, value = (asked.kind, asked.study), (asked.round, status)
        if self._last.get(key) == value:
            return
        if len(self._last) > MOST_REMEMBERED:
            self._last.clear()
        self._last[key] = value
        try:
            config = load_site(self._path)
            fields: dict[str, Any] = {"round": asked.round} if asked.round else {}
            fields |= {"reason": reason[:LONGEST_REASON]} if reason else {}
            _audit(config).append(
                f"answer {asked.kind}", study=asked.study, digest=bundle, outcome=status.value, **fields
            )
        except Exception as error:
            self._report("audit-failed", reason=str(error) if isinstance(error, CohortiumError) else "unforeseen")

    def _message(
        self, config: SiteConfig, approvals: Approvals, asked: Asked, protocol: Protocol | None, key: Ed25519PrivateKey
    ) -> Status | None:
        if asked.kind not in (JOIN, ANCHOR, TRAIN, RELEASE, EVALUATE):
            return Status.BAD_REQUEST
        if config.policy.simulation:
            return None
        if protocol is not None:
            return self._study(config, approvals, protocol, key)
        standing = approvals.standing("study", asked.study, key)
        if standing in ("approved", "denied"):
            return None if standing == "approved" else Status.DENIED
        known = approvals.request("study", asked.study) is not None
        return Status.AWAITING_APPROVAL if known else Status.UNKNOWN_STUDY

    def _bundle(
        self, config: SiteConfig, approvals: Approvals, bundle: bytes, digest: str, key: Ed25519PrivateKey
    ) -> Status | None:
        standing = approvals.standing("bundle", digest, key)
        if standing in ("approved", "denied"):
            return None if standing == "approved" else Status.DENIED
        decided = [
            request.digest
            for request in approvals.requests()
            if request.kind == "bundle" and approvals.decision("bundle", request.digest, key) is not None
        ]
        kept = BundleStore(config.site.state).keep(bundle, decided)
        self._ask(config, approvals, "bundle", digest, {"bytes": len(bundle), "kept": kept}, key)
        return Status.AWAITING_APPROVAL

    def _study(
        self, config: SiteConfig, approvals: Approvals, protocol: Protocol, key: Ed25519PrivateKey
    ) -> Status | None:
        standing = approvals.standing("study", protocol.digest, key)
        if standing in ("approved", "denied"):
            return None if standing == "approved" else Status.DENIED
        document = protocol.to_json()
        if len(json.dumps(document)) > LARGEST_PROTOCOL:
            raise MessageError("the study and its schema are larger than 1 MiB")
        self._ask(config, approvals, "study", protocol.digest, {"protocol": document}, key)
        if config.objections(protocol):  # an answer now, instead of days of waiting for a yes that could not help
            return Status.REFUSED_BY_POLICY
        return Status.AWAITING_APPROVAL

    def _ask(
        self,
        config: SiteConfig,
        approvals: Approvals,
        kind: Kind,
        digest: str,
        content: Mapping[str, Any],
        key: Ed25519PrivateKey,
    ) -> None:
        """Note the request, once while it waits, unless too many wait already."""
        known = approvals.request(kind, digest)
        if known is not None and approvals.standing(kind, digest, key) == "waiting":
            return
        waiting = [
            r for r in approvals.requests() if r.kind == kind and approvals.decision(kind, r.digest, key) is None
        ]
        if known is None and len(waiting) >= MOST_WAITING:
            self._report("held-back", digest=digest, reason=f"{MOST_WAITING} requests wait for a decision already")
            return
        request = approvals.ask(kind, digest, content)
        study = digest if kind == "study" else ""
        outcome = "waiting" if known is None else "expired, waiting anew"
        _audit(config).append(f"asked {kind}", study=study, digest=digest, outcome=outcome, expires=request.expires)
        self._report("asked", kind=kind, digest=digest, expires=request.expires)


def refusal(asked: Asked, status: Status) -> RecordDict | None:
    """The reply of the message's own kind with this code and nothing else; None for a kind we do not know."""
    if asked.kind == JOIN:
        return JoinReply(status, asked.site).to_record()
    if asked.kind == TRAIN:
        return TrainReply(status, asked.site, asked.study, asked.round).to_record()
    if asked.kind == RELEASE:
        return ReleaseReply(status, asked.site, asked.study).to_record()
    if asked.kind == EVALUATE:
        return EvaluateReply(status, asked.site, asked.study).to_record()
    if asked.kind == ANCHOR:
        return AnchorReply(status, asked.site, asked.study).to_record()
    return None


def status_in(reply: RecordDict) -> Status:
    """The code in a reply of the worker."""
    try:
        return Status(str(reply.config_records["header"]["status"]))
    except (KeyError, ValueError):
        return Status.INTERNAL_ERROR


_HEADERS = {
    ANCHOR: read_anchor_header,
    TRAIN: read_train_header,
    RELEASE: read_release_header,
    EVALUATE: read_evaluate_header,
}


def _read(asked: Asked, content: RecordDict) -> tuple[Asked, Protocol | None]:
    """Study and round of a message; for a join its protocol, checked. Arrays are not touched."""
    if asked.kind == JOIN:
        protocol = Protocol.from_json(JoinRequest.from_record(content).protocol)
        return Asked(asked.kind, asked.site, protocol.digest), protocol
    if asked.kind in _HEADERS:
        header = _HEADERS[asked.kind](content)
        study = str(header["study"])
        if len(study) != 64 or not set(study) <= set("0123456789abcdef"):
            raise MessageError("the study is not named by a SHA-256")
        return Asked(asked.kind, asked.site, study, int(header.get("round", 0))), None
    return asked, None


def _audit(config: SiteConfig) -> AuditLog:
    return AuditLog(config.site.state / AUDIT_LOG, config.site.name)
