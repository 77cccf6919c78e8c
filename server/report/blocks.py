"""What a page of the report is made of: plain data that one set of templates turns into HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

# What a line of the first page rests on, with what the words mean.
BASES = {
    "proven": "follows from a theorem of the privacy statement, under its assumptions",
    "measured": "an empirical number of this run; another patient, seed or attacker may give another",
    "assumed": "nobody here can check it",
    "recorded": "stands in the files of this run",
    "no claim": "nothing is promised",
}
Basis = Literal["proven", "measured", "assumed", "recorded", "no claim"]
State = Literal["", "good", "part", "bad", "none"]


@dataclass(frozen=True)
class Verdict:
    """One line of the first page: a question, the finding, the sentence it rests on, and the section with the rest.

    `state` colours the finding; its words say the same.
    """

    question: str
    finding: str
    sentence: str
    basis: Basis
    anchor: str
    state: State = ""


@dataclass(frozen=True)
class Reader:
    """The lines for one reader."""

    id: str
    title: str
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True)
class Paragraph:
    """Running text."""

    kind: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True)
class Note:
    """What must not be overlooked; an `alarm` is worse."""

    kind: ClassVar[str] = "note"
    text: str
    alarm: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list."""

    kind: ClassVar[str] = "bullets"
    items: tuple[str, ...]


@dataclass(frozen=True)
class DataTable:
    """A table whose first column names the row; `numbers` are the positions of the columns that hold numbers.

    `folded` is the line under which it is folded away until asked for; it is printed unless `screen_only`.
    """

    kind: ClassVar[str] = "table"
    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[int] = frozenset()
    folded: str = ""
    screen_only: bool = False


@dataclass(frozen=True)
class Picture:
    """An SVG with its caption; the picture itself carries its description for those who do not see it."""

    kind: ClassVar[str] = "picture"
    svg: str
    caption: str
    table: DataTable | None = None


@dataclass(frozen=True)
class Gallery:
    """Several pictures, as many beside each other as fit."""

    kind: ClassVar[str] = "gallery"
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    kind: ClassVar[str] = "heading"
    text: str


Block = Paragraph | Note | Bullets | DataTable | Picture | Gallery | Heading


@dataclass(frozen=True)
class Section:
    """A part of the page that the first page and the contents can name."""

    id: str
    title: str
    blocks: tuple[Block, ...]


def table(
    caption: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    folded: str = "",
    screen_only: bool = False,
) -> DataTable:
    """A table; a column whose head begins with "#" holds numbers."""
    found = tuple(tuple(row) for row in rows)
    if any(len(row) != len(heads) for row in found):
        raise ValueError(f"{caption}: a row has not as many cells as there are heads")
    numbers = frozenset(index for index, head in enumerate(heads) if head.startswith("#"))
    return DataTable(caption, tuple(head.removeprefix("#") for head in heads), found, numbers, folded, screen_only)
