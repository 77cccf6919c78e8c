"""Typed messages between coordinator and site, and the list of every field that leaves a site (privacy.md, section 0).

Requests and replies are frozen values here; `to_record` and `from_record` are the only places that know Flower's
records. Everything that arrives is checked before it is used; what does not fit raises `MessageError`, whose text never
quotes content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from common.records import (
    ARRAYS,
    HEADER,
    PROTOCOL_VERSION,
    MessageError,
    arrays_from_record,
    arrays_to_record,
    is_signed_head,
    read_header,
    values_from_record,
    values_to_record,
)
from common.study import SITE_NAME

if TYPE_CHECKING:
    from torch import Tensor

JOIN = "query.join"
TRAIN = "train.round"
RELEASE = "query.release"
EVALUATE = "query.evaluate"
ANCHOR = "query.anchor"
ROWS = "rows"


class Exposure(StrEnum):
    """How a field of a reply is accounted for."""

    ACCOUNTED = "accounted"
    PUBLIC = "public by the protocol"


class Status(StrEnum):
    """The fixed codes with which a site answers; the reason in words stays in the site's own log."""

    OK = "ok"
    REFUSED_BY_POLICY = "refused-by-policy"
    AWAITING_APPROVAL = "awaiting-approval"
    DENIED = "denied"
    CLOSED_NOW = "closed-now"
    UNKNOWN_STUDY = "unknown-study"
    DATA_UNUSABLE = "data-unusable"
    TOO_FEW_PATIENTS = "too-few-patients"
    WRONG_ROUND = "wrong-round"
    BAD_REQUEST = "bad-request"
    NON_FINITE_LOSS = "non-finite-loss"
    STORAGE_FAILED = "storage-failed"
    LEDGER_FAILED = "ledger-failed"
    SITE_MISCONFIGURED = "site-misconfigured"
    INTERNAL_ERROR = "internal-error"


# Every field of every reply. A field that is not listed here cannot be sent: `reply_record` refuses it.
REPLY_FIELDS: dict[str, dict[str, Exposure]] = {
    JOIN: {
        "version": Exposure.PUBLIC,
        "status": Exposure.PUBLIC,
        "site": Exposure.PUBLIC,
        "study": Exposure.PUBLIC,
        "patients": Exposure.PUBLIC,
        "ledger_length": Exposure.PUBLIC,
        "ledger_head": Exposure.PUBLIC,
        "ledger_signature": Exposure.PUBLIC,
        "ledger_key": Exposure.PUBLIC,
    },
    TRAIN: {
        "version": Exposure.PUBLIC,
        "status": Exposure.PUBLIC,
        "site": Exposure.PUBLIC,
        "study": Exposure.PUBLIC,
        "round": Exposure.PUBLIC,
        "ledger_length": Exposure.PUBLIC,
        "ledger_head": Exposure.PUBLIC,
        "ledger_signature": Exposure.PUBLIC,
        "update": Exposure.ACCOUNTED,
    },
    RELEASE: {
        "version": Exposure.PUBLIC,
        "status": Exposure.PUBLIC,
        "site": Exposure.PUBLIC,
        "study": Exposure.PUBLIC,
        "ledger_length": Exposure.PUBLIC,
        "ledger_head": Exposure.PUBLIC,
        "ledger_signature": Exposure.PUBLIC,
        "rows": Exposure.ACCOUNTED,
    },
    EVALUATE: {
        "version": Exposure.PUBLIC,
        "status": Exposure.PUBLIC,
        "site": Exposure.PUBLIC,
        "study": Exposure.PUBLIC,
        "ledger_length": Exposure.PUBLIC,
        "ledger_head": Exposure.PUBLIC,
        "ledger_signature": Exposure.PUBLIC,
        # Noised, or exact under the site's floor if its policy allows that; either way an event in the ledger.
        "aggregates": Exposure.ACCOUNTED,
    },
    ANCHOR: {
        "version": Exposure.PUBLIC,
        "status": Exposure.PUBLIC,
        "site": Exposure.PUBLIC,
        "study": Exposure.PUBLIC,
        "ledger_length": Exposure.PUBLIC,
        "ledger_head": Exposure.PUBLIC,
        "ledger_signature": Exposure.PUBLIC,
        # Counts or second moments of clipped rows, with Gaussian noise: an event each.
        "statistics": Exposure.ACCOUNTED,
    },
}
LEDGER_FIELDS: dict[str, type] = {"ledger_length": int, "ledger_head": str, "ledger_signature": str}
WITNESS_FIELDS: dict[str, type] = {
    "witness_length": int,
    "witness_head": str,
    "witness_signature": str,
    "witness_key": str,
}
NEVER_SENT = (
    "patient rows",
    "which patients a synthetic row was drawn from",
    "encoder weights",
    "optimiser state",
    "losses and KL terms",
    "update norms before projection",
    "realised batch sizes",
    "certificates measured at the site",
    "texts and types of exceptions",
)


class WithLedger(Protocol):
    """A reply that says where the ledger of its site ends."""

    @property
    def ledger_length(self) -> int: ...  # noqa: D102
    @property
    def ledger_head(self) -> str: ...  # noqa: D102
    @property
    def ledger_signature(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class JoinRequest:
    """The coordinator presents the protocol (study and schema) and asks who takes part."""

    protocol: Mapping[str, Any]

    def to_record(self) -> RecordDict:
        """As Flower records."""
        return RecordDict(
            {HEADER: ConfigRecord({"version": PROTOCOL_VERSION, "protocol": json.dumps(dict(self.protocol))})}
        )

    @classmethod
    def from_record(cls, record: RecordDict) -> JoinRequest:
        """Read and check; `MessageError` if malformed."""
        header = read_header(record, {"version": int, "protocol": str})
        try:
            document = json.loads(str(header["protocol"]))
        except (ValueError, RecursionError):
            raise MessageError("the protocol is not JSON") from None
        if not isinstance(document, dict):
            raise MessageError("the protocol is not a JSON object")
        return cls(document)


@dataclass(frozen=True)
class JoinReply:
    """A site says who it is, which study it accepts (by digest) and how many patients it declares.

    A site that joins also says where its ledger ends, signed, and with which key; otherwise these fields are empty.
    """

    status: Status
    site: str
    study: str = ""
    patients: int = 0
    ledger_length: int = 0
    ledger_head: str = ""
    ledger_signature: str = ""
    ledger_key: str = ""

    def to_record(self) -> RecordDict:
        """As Flower records."""
        fields = {"site": self.site, "study": self.study, "patients": self.patients}
        return reply_record(JOIN, self.status, fields | ledger_fields(self) | {"ledger_key": self.ledger_key})

    @classmethod
    def from_record(cls, record: RecordDict) -> JoinReply:
        """Read and check; `MessageError` if malformed."""
        kinds = {"version": int, "status": str, "site": str, "study": str, "patients": int}
        header = read_header(record, kinds | LEDGER_FIELDS | {"ledger_key": str})
        status = read_status(header)
        check_ledger_fields(header, status)
        reply = cls(status, **{name: header[name] for name in header if name not in ("version", "status")})
        if reply.site and not re.fullmatch(SITE_NAME, reply.site):
            raise MessageError("the site's name is not one")
        if reply.status is Status.OK and (not reply.site or reply.patients < 1):
            raise MessageError("a site that joins needs a name and at least one patient")
        return reply


@dataclass(frozen=True, kw_only=True)
class Countersigned:
    """What every request for a result carries as well: the end of the site's ledger as the coordinator last saw it.

    With his signature and key; empty if he keeps none.
    """

    witness_length: int = 0
    witness_head: str = ""
    witness_signature: str = ""
    witness_key: str = ""

    def _record(self, decoder: Mapping[str, Tensor], **fields: Any) -> RecordDict:
        header = {"version": PROTOCOL_VERSION, **fields} | {name: getattr(self, name) for name in WITNESS_FIELDS}
        return RecordDict({HEADER: ConfigRecord(header), ARRAYS: arrays_to_record(decoder)})


@dataclass(frozen=True)
class TrainRequest(Countersigned):
    """One round: the certified global decoder, and the weight with which the site's update will enter the mean."""

    study: str
    round: int
    weight: float
    decoder: Mapping[str, Tensor]

    def to_record(self) -> RecordDict:
        """As Flower records."""
        return self._record(self.decoder, study=self.study, round=self.round, weight=self.weight)

    @classmethod
    def from_record(cls, record: RecordDict, expected: Mapping[str, tuple[int, ...]]) -> TrainRequest:
        """Read and check against the shapes the study implies; `MessageError` if malformed."""
        header = read_train_header(record)
        decoder = arrays_from_record(record.config_records.get(ARRAYS), expected)
        study, number, weight = str(header["study"]), int(header["round"]), float(header["weight"])
        return cls(study, number, weight, decoder, **witness_of(header))


@dataclass(frozen=True)
class TrainReply:
    """A site's projected decoder update, or the code that says why there is none.

    With an update goes the end of the ledger in which it was spent; otherwise the ledger's fields are empty.
    """

    status: Status
    site: str
    study: str
    round: int
    update: Mapping[str, Tensor] | None = None
    ledger_length: int = 0
    ledger_head: str = ""
    ledger_signature: str = ""

    def to_record(self) -> RecordDict:
        """As Flower records."""
        if self.update is not None and self.status is not Status.OK:
            raise MessageError("only a reply with status ok carries an update")
        fields: dict[str, Any] = {"site": self.site, "study": self.study, "round": self.round}
        payload = None if self.update is None else ("update", arrays_to_record(self.update))
        return reply_record(TRAIN, self.status, fields | ledger_fields(self), payload)

    @classmethod
    def from_record(cls, record: RecordDict, expected: Mapping[str, tuple[int, ...]]) -> TrainReply:
        """Read and check: fields, types, and for `Status.OK` names, shapes, dtype and finiteness of the update."""
        kinds = {"version": int, "status": str, "site": str, "study": str, "round": int}
        header = read_header(record, kinds | LEDGER_FIELDS)
        status = read_status(header)
        check_ledger_fields(header, status)
        update = arrays_from_record(record.config_records.get(ARRAYS), expected) if status is Status.OK else None
        ledger = {name: header[name] for name in LEDGER_FIELDS}
        return cls(status, str(header["site"]), str(header["study"]), int(header["round"]), update, **ledger)


def read_train_header(record: RecordDict) -> dict[str, Any]:
    """Study, round, weight and countersignature of a training request, checked without touching its arrays."""
    header = read_request(record, {"round": int, "weight": float})
    if int(header["round"]) < 1 or not 0.0 < float(header["weight"]) <= 1.0:
        raise MessageError("the round must be at least 1 and the weight in (0, 1]")
    return header


@dataclass(frozen=True)
class ReleaseRequest(Countersigned):
    """After the last round: the final global decoder, and how many rows the site shall draw through its channel."""

    study: str
    rows: int
    decoder: Mapping[str, Tensor]

    def to_record(self) -> RecordDict:
        """As Flower records."""
        return self._record(self.decoder, study=self.study, rows=self.rows)

    @classmethod
    def from_record(cls, record: RecordDict, expected: Mapping[str, tuple[int, ...]]) -> ReleaseRequest:
        """Read and check against the shapes the study implies; `MessageError` if malformed."""
        header = read_release_header(record)
        decoder = arrays_from_record(record.config_records.get(ARRAYS), expected)
        return cls(str(header["study"]), int(header["rows"]), decoder, **witness_of(header))


@dataclass(frozen=True)
class ReleaseReply:
    """Synthetic rows of one site, float64 (rows, columns) with NaN for missing, or the code that says why not.

    With rows goes the end of the ledger in which they were spent; otherwise the ledger's fields are empty.
    """

    status: Status
    site: str
    study: str
    rows: np.ndarray | None = None
    ledger_length: int = 0
    ledger_head: str = ""
    ledger_signature: str = ""

    def to_record(self) -> RecordDict:
        """As Flower records."""
        if self.rows is not None and self.status is not Status.OK:
            raise MessageError("only a reply with status ok carries rows")
        payload = None if self.rows is None else (ROWS, values_to_record(ROWS, self.rows))
        fields = {"site": self.site, "study": self.study}
        return reply_record(RELEASE, self.status, fields | ledger_fields(self), payload)

    @classmethod
    def from_record(cls, record: RecordDict, shape: tuple[int, int]) -> ReleaseReply:
        """Read and check; for `Status.OK` the rows have exactly `shape`. Whether they fit the schema is not checked."""
        header = read_header(record, {"version": int, "status": str, "site": str, "study": str} | LEDGER_FIELDS)
        status = read_status(header)
        check_ledger_fields(header, status)
        rows = values_from_record(record.config_records.get(ARRAYS), ROWS, shape) if status is Status.OK else None
        ledger = {name: header[name] for name in LEDGER_FIELDS}
        return cls(status, str(header["site"]), str(header["study"]), rows, **ledger)


def read_release_header(record: RecordDict) -> dict[str, Any]:
    """Study, rows and countersignature of a release request, checked without touching its arrays."""
    header = read_request(record, {"rows": int})
    if int(header["rows"]) < 1:
        raise MessageError("the number of rows must be at least 1")
    return header


def reply_record(
    kind: str, status: Status, fields: Mapping[str, Any], payload: tuple[str, ConfigRecord] | None = None
) -> RecordDict:
    """A reply's records; `payload` is the name under which its arrays are classified, and the arrays."""
    header = {"version": PROTOCOL_VERSION, "status": status.value, **fields}
    names = set(header) | ({payload[0]} if payload is not None else set())
    unclassified = names - set(REPLY_FIELDS[kind])
    if unclassified:
        raise MessageError(f"fields {sorted(unclassified)} are not classified and must not leave the site")
    records = {HEADER: ConfigRecord(header)}
    if payload is not None:
        records[ARRAYS] = payload[1]
    return RecordDict(records)  # type: ignore[arg-type]


def ledger_fields(reply: WithLedger) -> dict[str, Any]:
    """Where the ledger of the site that replies ends."""
    return {name: getattr(reply, name) for name in LEDGER_FIELDS}


def check_ledger_fields(header: Mapping[str, Any], status: Status) -> None:
    """A reply that is ok says where the site's ledger ends; one that is not says nothing about it."""
    fields = [header[name] for name in LEDGER_FIELDS] + ([header["ledger_key"]] if "ledger_key" in header else [])
    if status is Status.OK and not is_signed_head(*fields):
        raise MessageError("the signed head of the site's ledger is missing or malformed")
    if status is not Status.OK and any(fields):
        raise MessageError("a reply without result carries the head of a ledger")


def read_request(record: RecordDict, kinds: Mapping[str, type]) -> dict[str, Any]:
    """The header of a request for a result: version, study, its own fields, and a countersignature or none."""
    header = read_header(record, {"version": int, "study": str, **kinds} | WITNESS_FIELDS)
    signed = [header[name] for name in WITNESS_FIELDS]
    if signed != [0, "", "", ""] and not is_signed_head(*signed):
        raise MessageError("the countersignature of the ledger's head is malformed")
    return header


def witness_of(header: Mapping[str, Any]) -> dict[str, Any]:
    """The countersignature's fields of a request's header."""
    return {name: header[name] for name in WITNESS_FIELDS}


def read_status(header: Mapping[str, Any]) -> Status:
    """The status of a reply's header."""
    try:
        return Status(str(header["status"]))
    except ValueError:
        raise MessageError("unknown status code") from None
