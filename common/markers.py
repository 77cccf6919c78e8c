"""Columns that mark every released row as synthetic and say which release it is of, wherever the row is copied to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MARKER_COLUMNS = ("cohortium_study", "cohortium_release", "cohortium_synthetic")
RELEASE_DIGITS = 16


@dataclass(frozen=True)
class Markers:
    """The same in every row: the study's name, the first digits of its digest, and that the row is synthetic."""

    study: str
    digest: str

    def values(self) -> dict[str, str | bool]:
        """By column name, in the order of the columns, which stand behind those of the schema."""
        return dict(zip(MARKER_COLUMNS, (self.study, self.digest[:RELEASE_DIGITS], True), strict=True))


def colliding(names: Iterable[str]) -> list[str]:
    """The columns among `names` that a marker would be mistaken for."""
    return [name for name in names if name in MARKER_COLUMNS]
