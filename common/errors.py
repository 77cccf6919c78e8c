"""Errors a person reads, and the exit codes both command lines share (docs/exit-codes.md)."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes of `cohortium` and `cohortium-site`."""

    OK = 0
    INTERNAL = 1
    USAGE = 2
    SCHEMA = 3
    DATA = 4
    STUDY = 5
    SITE = 6
    OUTPUT = 7
    FEDERATION = 8
    CERTIFICATE = 9
    LEDGER = 10
    VERIFY = 11
    GATES = 12
    INTERRUPTED = 130


class CohortiumError(Exception):
    """A failure with one clear message for the person who can mend it.

    `message` says what was found and what was expected; `fix` says how to mend it. Neither ever holds a patient
    value. The process exits with `exit_code`.
    """

    exit_code: ExitCode = ExitCode.INTERNAL

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  How to mend it: {self.fix}" if self.fix else self.message


class UsageError(CohortiumError):
    """The command line itself is wrong."""

    exit_code = ExitCode.USAGE


class SchemaError(CohortiumError):
    """The data dictionary is unusable; the message lists every problem found."""

    exit_code = ExitCode.SCHEMA


class DataError(CohortiumError):
    """A table does not fit its schema, or cannot be read."""

    exit_code = ExitCode.DATA


class StudyError(CohortiumError):
    """study.toml is unusable."""

    exit_code = ExitCode.STUDY


class SiteError(CohortiumError):
    """site.toml is unusable, or the site's policy forbids what was asked."""

    exit_code = ExitCode.SITE


class OutputError(CohortiumError):
    """Results cannot be written where they were asked for."""

    exit_code = ExitCode.OUTPUT


class FederationError(CohortiumError):
    """The federation stopped: too few sites, a time-out, a runtime that did not start."""

    exit_code = ExitCode.FEDERATION


class CertificateError(CohortiumError):
    """A network exceeds its declared Lipschitz bound."""

    exit_code = ExitCode.CERTIFICATE


class LedgerError(CohortiumError):
    """A site's ledger cannot be used as it is."""

    exit_code = ExitCode.LEDGER


class VerifyError(CohortiumError):
    """A bundle does not match its signed manifest."""

    exit_code = ExitCode.VERIFY
