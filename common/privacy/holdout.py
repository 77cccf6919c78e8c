"""Patient slots that take no part in training or release, so that the cohort can be scored against them."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from common.errors import StudyError
from common.study import Study


@lru_cache(maxsize=64)
def holdout_slots(digest: str, patients: int, holdout: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The slots (row numbers, ascending) that take part in the study's training and release, and those held out.

    round(holdout · n) slots are held out: those whose SHA-256 of study digest and slot number is smallest. Never a
    function of what a slot holds (privacy.md, section 0). `StudyError` if nobody would be left on either side.
    """
    everyone = np.arange(patients)
    count = holdout_patients(patients, holdout)
    order = sorted(range(patients), key=lambda slot: hashlib.sha256(f"{digest}/holdout/{slot}".encode()).digest())
    held_out = np.sort(np.asarray(order[:count], dtype=np.int64))
    return np.setdiff1d(everyone, held_out), held_out


def holdout_patients(patients: int, holdout: float) -> int:
    """How many patients are held out; `StudyError` if the share leaves nobody on one side."""
    count = round(holdout * patients)
    if holdout > 0 and not 0 < count < patients:
        raise StudyError(
            f"[evaluation] holdout = {holdout:g} holds out {count} of {patients} patients",
            fix="choose a share that leaves patients on both sides, or 0 to hold out nobody",
        )
    return count


def participants(study: Study, patients: int) -> int:
    """How many of a site's patients take part in training and release: all but those held out."""
    return patients - holdout_patients(patients, study.evaluation.holdout)
