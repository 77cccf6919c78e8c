"""What the metadata of a release says of it, gathered once from the run's own files: croissant.json and
ro-crate-metadata.json spell it, and the same files give the same bytes.

Nothing here is a claim about privacy beyond a pointer to privacy.json. Neither file names the manifest's digest, since
the manifest signs both.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow.parquet as pq

from common.digest import sha256_of_file
from common.files import write_atomic
from common.markers import MARKER_COLUMNS, RELEASE_DIGITS
from common.schema import Column, Schema
from common.study import Protocol
from server.run import RunFiles

CROISSANT, RO_CRATE, SCHEMA = "croissant.json", "ro-crate-metadata.json", "schema.json"
KEYWORDS = ("synthetic data", "health", "tabular data", "federated learning")
NO_LICENCE = "No licence is declared: ask the consortium which use is allowed."
LIMITS = (
    "These rows are drawn from a model. Effects, rare subgroups and interactions can be lost or blurred; confirm a"
    " finding on real patients before acting on it.",
    "No claim of legal status of the cohort is made. Whether it may be used for a purpose is the consortium's"
    " decision.",
)
PRIVACY = (
    "The columns describe patients; the rows are drawn from a model that was trained on real ones. What is claimed for"
    " those patients, against whom and under which assumptions, is in privacy.json. Nothing is claimed here."
)
BIASES = (
    "Whatever is peculiar to the patients of the sites is learned with everything else; what is rare there can be lost."
)
MARKED = {
    MARKER_COLUMNS[0]: "the study that the row is of",
    MARKER_COLUMNS[1]: f"the first {RELEASE_DIGITS} digits of the study's digest",
    MARKER_COLUMNS[2]: "that the row is synthetic",
}
MEDIA_TYPES = {
    ".csv": "text/csv",
    ".html": "text/html",
    ".json": "application/json",
    ".jsonl": "application/jsonlines",
    ".parquet": "application/x-parquet",
    ".txt": "text/plain",
}


@dataclass(frozen=True)
class FileFacts:
    """A released file: size in bytes and SHA-256 (hex)."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileFacts:
        """Of a file on disk."""
        return cls(path.stat().st_size, sha256_of_file(path))


@dataclass(frozen=True)
class ReleaseFacts:
    """All that either file states. `consortium` is None in a simulation, `ended` if the run noted no time."""

    protocol: Protocol
    consortium: str | None
    sites: tuple[str, ...]
    rows: int
    ended: str | None
    files: Mapping[str, FileFacts]

    @property
    def name(self) -> str:
        """The study's name, as a title."""
        return f"{self.protocol.study.study.name}: synthetic cohort"

    @property
    def description(self) -> str:
        """One paragraph for whoever finds the data set."""
        schema = self.protocol.schema
        made = f" of {self.consortium}" if self.consortium else ""
        where = "" if self.consortium else " A simulation on one machine, which held all patients."
        about = f" {schema.title}." if schema.title else ""
        return (
            f"{self.rows} synthetic rows of {len(schema.columns)} columns, from the study"
            f" {self.protocol.study.study.name}{made} with {len(self.sites)} sites.{about}{where} {self.collection}"
        )

    @property
    def collection(self) -> str:
        """How the rows came about."""
        how = (
            "the latent prior of one model, which the sites trained together"
            if self.protocol.study.release.method == "prior"
            else "models that the sites trained together, each site through its own stochastic channel"
        )
        return f"No row was collected from a person: every row is drawn from {how}."

    @property
    def date(self) -> str | None:
        """The day (UTC) on which the last round ended, after which the cohort is drawn."""
        return None if self.ended is None else self.ended[:10]

    @property
    def version(self) -> str:
        """A study has one release; the study's digest tells it from others (Semantic Versioning, build metadata)."""
        return f"1.0.0+{self.protocol.digest[:RELEASE_DIGITS]}"

    @property
    def creators(self) -> tuple[str, ...]:
        """Whom the study names, or else the consortium."""
        return self.protocol.study.release.creators or ((self.consortium,) if self.consortium else ())

    @property
    def missing(self) -> str:
        """How a missing value is written."""
        spelled = self.protocol.schema.missing_values
        word = "" if "" in spelled and len(self.protocol.schema.columns) > 1 else spelled[0]
        written = f'"{word}"' if word else "an empty field"
        return f"A missing value is null in cohort.parquet and {written} in cohort.csv; it was modelled, not imputed."


def gather(files: RunFiles, protocol: Protocol, names: Iterable[str], consortium: str | None) -> ReleaseFacts:
    """Read what the run left; `names` are the released files to describe."""
    sites: dict[str, Any] = json.loads(files.sites.read_text(encoding="utf-8"))
    last = json.loads(files.rounds.read_text(encoding="utf-8").splitlines()[-1])
    return ReleaseFacts(
        protocol,
        consortium,
        tuple(sorted(sites["joined"])),
        pq.read_metadata(files.cohort_parquet).num_rows,
        last.get("ended"),
        {name: FileFacts.of(files.out / name) for name in sorted(names)},
    )


def write_schema(files: RunFiles, protocol: Protocol) -> None:
    """Write schema.json: the study's Table Schema, and the marker columns behind its fields if there are any.

    So it describes cohort.csv column by column. The schema as every site approved it is in study.json.
    """
    descriptor = dict(protocol.schema.descriptor)
    markers = protocol.markers.values() if protocol.markers else {}
    descriptor["fields"] = [
        *descriptor["fields"],
        *(
            {
                "name": name,
                "type": "boolean" if isinstance(value, bool) else "string",
                "description": MARKED[name],
                "constraints": {"required": True} | ({} if isinstance(value, bool) else {"enum": [value]}),
            }
            for name, value in markers.items()
        ),
    ]
    write_atomic(files.schema, json.dumps(descriptor, indent=1, ensure_ascii=False) + "\n")


def write_metadata(files: RunFiles, protocol: Protocol, names: Iterable[str], consortium: str | None = None) -> None:
    """Write croissant.json over the released files in `names`, then ro-crate-metadata.json over those and it.

    Neither asks a network for anything. `OutputError` if mlcroissant finds a fault in what it made.
    """
    # Here, since the two libraries take a second to import, which no other command should pay.
    from server.croissant import data_card
    from server.ro_crate import crate_metadata

    described = sorted({*names} - {CROISSANT, RO_CRATE})
    facts = gather(files, protocol, described, consortium)
    write_atomic(files.croissant, _text(data_card(facts)))
    facts = gather(files, protocol, [*described, CROISSANT], consortium)
    write_atomic(files.ro_crate, _text(crate_metadata(facts)))


def identifier(name: str) -> str:
    """A name as a part of an @id, one id for every name: letters and digits as they are, the rest percent-encoded."""
    # JSON-LD resolves an id like an address, where "." and ".." are folders.
    if set(name) <= {"."}:
        return name.replace(".", "%2E")
    return "".join(letter if letter.isalnum() else quote(letter, safe="") for letter in name)


def about(column: Column, schema: Schema) -> str:
    """What the schema says of a column in words: title, and description; empty if it says nothing."""
    field = next(field for field in schema.descriptor["fields"] if field["name"] == column.name)
    said = [" ".join(str(field[key]).split()) for key in ("title", "description") if field.get(key)]
    return ". ".join(dict.fromkeys(text.rstrip(".") for text in said))


def licence_url(licence: str) -> str:
    """An SPDX identifier as the address of its text; an address as it is."""
    return licence if "://" in licence else f"https://spdx.org/licenses/{licence}"


def _text(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"
