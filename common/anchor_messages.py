"""The messages of the anchor: which statistics are asked for, and the noised ones that come back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from numpy.typing import NDArray

from common.messages import (
    ANCHOR,
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
from common.privacy.anchor import Step
from common.records import (
    ARRAYS,
    HEADER,
    PROTOCOL_VERSION,
    MessageError,
    read_header,
    values_from_record,
    values_to_record,
)

MARGINALS, STATISTICS = "marginals", "statistics"


@dataclass(frozen=True)
class AnchorRequest(Countersigned):
    """`step` "marginals" asks for the counts; "moments" for the second moments, of rows encoded with `marginals`.

    `marginals` are probabilities, one entry a cell of every column, (cells,), made from the noised counts of all sites;
    None in the first step.
    """

    study: str
    step: Step
    marginals: NDArray[np.float64] | None = None

    def to_record(self) -> RecordDict:
        """As Flower records."""
        header: dict[str, Any] = {"version": PROTOCOL_VERSION, "study": self.study, "step": self.step}
        header |= {name: getattr(self, name) for name in WITNESS_FIELDS}
        records = {HEADER: ConfigRecord(header)}
        if self.marginals is not None:
            records[ARRAYS] = values_to_record(MARGINALS, self.marginals[None, :])
        return RecordDict(records)  # type: ignore[arg-type]

    @classmethod
    def from_record(cls, record: RecordDict, cells: int) -> AnchorRequest:
        """Read and check: `cells` finite values in the second step, none in the first; `MessageError` otherwise.

        Whether they are probabilities is for `check_marginals`.
        """
        header = read_anchor_header(record)
        step, arrays = header["step"], record.config_records.get(ARRAYS)
        if step == "marginals":
            if arrays is not None:
                raise MessageError("the first message of the anchor carries no arrays")
            return cls(str(header["study"]), step, **witness_of(header))
        marginals = values_from_record(arrays, MARGINALS, (1, cells))[0]
        return cls(str(header["study"]), step, marginals, **witness_of(header))


def read_anchor_header(record: RecordDict) -> dict[str, Any]:
    """Study, step and countersignature of a request, checked without touching its arrays."""
    header = read_request(record, {"step": str})
    if header["step"] not in get_args(Step):
        raise MessageError("the anchor has no such step")
    return header


@dataclass(frozen=True)
class AnchorReply:
    """Noised statistics, float64 (1, values), or the code that says why there are none.

    With them goes the end of the ledger in which they were spent; otherwise the ledger's fields are empty.
    """

    status: Status
    site: str
    study: str
    statistics: NDArray[np.float64] | None = None
    ledger_length: int = 0
    ledger_head: str = ""
    ledger_signature: str = ""

    def to_record(self) -> RecordDict:
        """As Flower records."""
        if self.statistics is not None and self.status is not Status.OK:
            raise MessageError("only a reply with status ok carries statistics")
        payload = None if self.statistics is None else (STATISTICS, values_to_record(STATISTICS, self.statistics))
        return reply_record(
            ANCHOR, self.status, {"site": self.site, "study": self.study} | ledger_fields(self), payload
        )

    @classmethod
    def from_record(cls, record: RecordDict, values: int) -> AnchorReply:
        """Read and check; for `Status.OK` there are exactly so many `values`, all finite."""
        header = read_header(record, {"version": int, "status": str, "site": str, "study": str} | LEDGER_FIELDS)
        status = read_status(header)
        check_ledger_fields(header, status)
        found = None
        if status is Status.OK:
            found = values_from_record(record.config_records.get(ARRAYS), STATISTICS, (1, values))
            if not np.isfinite(found).all():
                raise MessageError("statistics that are not finite")
        ledger = {name: header[name] for name in LEDGER_FIELDS}
        return cls(status, str(header["site"]), str(header["study"]), found, **ledger)
