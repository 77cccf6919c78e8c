"""Who is admitted: the site's refusals, each with the fixed code that may leave and the words that stay."""

from __future__ import annotations

from datetime import UTC, datetime

from client.policy import PolicySection
from client.site import SiteConfig
from client.state import StateError
from client.trainers.base import NonFiniteLossError
from common.errors import CohortiumError, DataError, LedgerError, OutputError, SchemaError, SiteError, StudyError
from common.messages import Status
from common.privacy.accountant import BudgetError, check_delta
from common.privacy.channel_release import fit_patients
from common.privacy.holdout import holdout_patients
from common.records import MessageError
from common.study import Protocol

CODES: tuple[tuple[type[Exception], Status], ...] = (
    (MessageError, Status.BAD_REQUEST),
    (BudgetError, Status.REFUSED_BY_POLICY),
    (NonFiniteLossError, Status.NON_FINITE_LOSS),
    (DataError, Status.DATA_UNUSABLE),
    (StudyError, Status.BAD_REQUEST),
    (SchemaError, Status.BAD_REQUEST),
    (LedgerError, Status.LEDGER_FAILED),
    (OutputError, Status.STORAGE_FAILED),
    (StateError, Status.STORAGE_FAILED),
    (SiteError, Status.SITE_MISCONFIGURED),
    (OSError, Status.STORAGE_FAILED),
)


class RefusedError(CohortiumError):
    """The site answers with `status` instead of doing the work."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


def status_of(error: Exception) -> Status:
    """The code that may leave the site for this error."""
    if isinstance(error, RefusedError):
        return error.status
    return next((code for kind, code in CODES if isinstance(error, kind)), Status.INTERNAL_ERROR)


def clock() -> datetime:
    """Now, by this machine's clock."""
    return datetime.now(UTC)


def require_open(policy: PolicySection) -> None:
    """`RefusedError` (closed-now) outside the site's opening hours, before a request is even read."""
    if not policy.open_at(clock()):
        hours = ", ".join(policy.opening_hours)
        raise RefusedError(Status.CLOSED_NOW, f"outside opening_hours = {hours} ({policy.timezone})")


def require_allowed(config: SiteConfig, protocol: Protocol) -> None:
    """`RefusedError` naming everything in the study that this site's policy forbids."""
    objections = config.objections(protocol)
    if objections:
        raise RefusedError(Status.REFUSED_BY_POLICY, "; ".join(objections))


def require_patients(config: SiteConfig, protocol: Protocol, patients: int) -> None:
    """`RefusedError` unless their number may leave, suffices for the study, and is the one it declares."""
    name = config.site.name
    try:
        fit_patients(protocol.study, patients)
    except StudyError as error:
        raise RefusedError(Status.TOO_FEW_PATIENTS, error.message) from None
    held_out = holdout_patients(patients, protocol.study.evaluation.holdout)
    if 0 < held_out < config.policy.min_count:
        raise RefusedError(
            Status.TOO_FEW_PATIENTS, f"{held_out} patients are held out, min_count is {config.policy.min_count}"
        )
    least = max(config.policy.least_patients, protocol.study.release.min_patients_per_site)
    if patients < least:
        raise RefusedError(Status.TOO_FEW_PATIENTS, f"{patients} patients, at least {least} are needed")
    declared = protocol.study.sites.get(name)
    if declared is not None and declared != patients:
        raise RefusedError(
            Status.DATA_UNUSABLE, f"the study declares {declared} patients for this site, the file has {patients}"
        )


def delta_warning(protocol: Protocol, patients: int, site: str) -> str | None:
    """A warning if the study's δ is large for this many patients; `RefusedError` if it is too large."""
    try:
        return check_delta(protocol.study.privacy.delta, patients, site)
    except StudyError as error:
        raise RefusedError(Status.REFUSED_BY_POLICY, error.message) from None
