"""The messages of a federated evaluation: the cohort to a site, its aggregates back; `common.messages` classifies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from common.messages import (
    EVALUATE,
    LEDGER_FIELDS,
    WITNESS_FIELDS,
    Countersigned,
    Status,
    check_ledger_fields,
    ledger_fields,
    read_request,
    read_status,
    reply_record,
    witness_of,
)
from common.records import (
    ARRAYS,
    HEADER,
    PROTOCOL_VERSION,
    MessageError,
    read_header,
    values_from_record,
    values_to_record,
)

COHORT, AGGREGATES = "cohort", "aggregates"


@dataclass(frozen=True)
class EvaluateRequest(Countersigned):
    """Rows of the cohort, float64 (rows, columns) with NaN for missing, to be scored against the site's patients."""

    study: str
    cohort: np.ndarray

    def to_record(self) -> RecordDict:
        """As Flower records."""
        header = {"version": PROTOCOL_VERSION, "study": self.study, "rows": len(self.cohort)}
        header |= {name: getattr(self, name) for name in WITNESS_FIELDS}
        return RecordDict({HEADER: ConfigRecord(header), ARRAYS: values_to_record(COHORT, self.cohort)})

    @classmethod
    def from_record(cls, record: RecordDict, columns: int, most_rows: int) -> EvaluateRequest:
        """Read and check; `MessageError` if malformed or longer. Whether the rows fit the schema is not checked."""
        header = read_evaluate_header(record)
        if not 1 <= int(header["rows"]) <= most_rows:
            raise MessageError(f"{int(header['rows'])} rows to evaluate, the study allows 1 to {most_rows}")
        cohort = values_from_record(record.config_records.get(ARRAYS), COHORT, (int(header["rows"]), columns))
        return cls(str(header["study"]), cohort, **witness_of(header))


def read_evaluate_header(record: RecordDict) -> dict[str, Any]:
    """Study, rows and countersignature of an evaluation request, checked without touching its arrays."""
    return read_request(record, {"rows": int})


@dataclass(frozen=True)
class EvaluateReply:
    """The site's aggregates, float64 (1, values) with NaN for what it hides, or the code that says why there are none.

    With them goes the end of the ledger in which they were spent; otherwise the ledger's fields are empty.
    """

    status: Status
    site: str
    study: str
    aggregates: np.ndarray | None = None
    ledger_length: int = 0
    ledger_head: str = ""
    ledger_signature: str = ""

    def to_record(self) -> RecordDict:
        """As Flower records."""
        if self.aggregates is not None and self.status is not Status.OK:
            raise MessageError("only a reply with status ok carries aggregates")
        payload = None if self.aggregates is None else (AGGREGATES, values_to_record(AGGREGATES, self.aggregates))
        fields = {"site": self.site, "study": self.study}
        return reply_record(EVALUATE, self.status, fields | ledger_fields(self), payload)

    @classmethod
    def from_record(cls, record: RecordDict, values: int) -> EvaluateReply:
        """Read and check; for `Status.OK` there are exactly so many `values`."""
        header = read_header(record, {"version": int, "status": str, "site": str, "study": str} | LEDGER_FIELDS)
        status = read_status(header)
        check_ledger_fields(header, status)
        found = None
        if status is Status.OK:
            found = values_from_record(record.config_records.get(ARRAYS), AGGREGATES, (1, values))
        ledger = {name: header[name] for name in LEDGER_FIELDS}
        return cls(status, str(header["site"]), str(header["study"]), found, **ledger)
