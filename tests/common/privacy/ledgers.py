"""Ledgers on disk for the tests of them, and what goes wrong with one."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from common.errors import ExitCode, LedgerError
from common.privacy.events import BoundedInfluence
from common.privacy.ledger import Ledger
from common.privacy.ledger_entries import Entry

STUDY = "a" * 64


def spend(ledger: Ledger, number: int, study: str = STUDY) -> Entry:
    return ledger.record(study, BoundedInfluence(number, 0.5, 0.25), f"payload {number}")


def filled(path: Path, rounds: int = 5) -> Path:
    with Ledger(path, "north") as ledger:
        for number in range(1, rounds + 1):
            spend(ledger, number)
    return path


def execute(path: Path, statement: str, *values: Any) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute(statement, values)


def error_of(path: Path, site: str = "north") -> str:
    """The message of the LedgerError with which opening or verifying fails."""
    with pytest.raises(LedgerError) as caught, Ledger(path, site) as ledger:
        ledger.verify()
    assert str(path) in str(caught.value) and "How to mend it" in str(caught.value)
    assert caught.value.exit_code is ExitCode.LEDGER
    return str(caught.value)
