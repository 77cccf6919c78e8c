"""The format of privacy.json as models; `docs/privacy.schema.json` is generated from them.

A document that does not fit is neither released nor verified. What JSON Schema cannot say in few words (which line is
the site's, when a condition is due) is checked here as well, and said in the descriptions.

`python -m common.privacy.statement_schema` writes the schema anew.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic.json_schema import GenerateJsonSchema

from common.config import Section
from common.files import write_atomic
from common.privacy.accountant import Accountant, Adversary, Population
from common.study import Mode

SCHEMA_VERSION = 3
SCHEMA_FILE = Path(__file__).parents[2] / "docs" / "privacy.schema.json"
INFINITE: Literal["infinity"] = "infinity"

NotNegative = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
Bound = NotNegative | Literal["infinity"]
Whole = Annotated[int, Field(ge=0, strict=True)]
Words = Annotated[str, Field(min_length=1, strict=True)]
Delta = Annotated[float, Field(gt=0, lt=1, strict=True)]
Probability = Annotated[float, Field(gt=0, le=1, strict=True)]
Flag = Annotated[bool, Field(strict=True)]


class Line(Section):
    """What holds for one group of patients of the site."""

    applies_to: Population = Field(description="the patients of this site for whom the line holds")
    conditional: Flag = Field(
        description="true: the line holds only under `condition`, and is added to no other number"
    )
    epsilon: Bound = Field(description='upper bound of ε in nats at the entry\'s δ; "infinity": none holds')
    accountant: Accountant = Field(
        description='who gave the smallest valid bound; "none" where ε is infinite or nothing was spent (0)'
    )
    basis: Words = Field(description="the theorems and mechanisms that the line rests on")
    condition: Words | None = Field(description="under what a conditional line holds; null for an unconditional one")

    @model_validator(mode="after")
    def _complete(self) -> Line:
        if self.conditional != (self.condition is not None):
            raise ValueError("a conditional line states its condition, an unconditional one has none")
        _check_accountant(self.epsilon, self.accountant)
        return self


class Exposure(Section):
    """What the site sent, in declared constants; never a measured one."""

    rounds: Whole = Field(description="rounds in which the site sent an update")
    update_norm: Bound = Field(description="C: largest Euclidean norm of an update")
    weight: NotNegative = Field(default=0.0, description="the site's largest weight in the mean; absent if not bounded")
    largest_move_of_decoder_per_round: Bound = Field(
        description="2 w C (T2): how far replacing all of its data moves the next decoder; not differential privacy"
    )
    noise_multiplier: NotNegative = Field(
        default=0.0, description="noise over C, or in dpsgd over the clipping norm; the smallest of all rounds"
    )
    steps: Whole = Field(default=0, description="dpsgd: steps in all rounds")
    sampling_probability: Probability = Field(default=1.0, description="dpsgd: of every patient in every step")
    gradient_clip: NotNegative = Field(default=0.0, description="dpsgd: norm to which every gradient is clipped")
    in_words: Words = Field(default="none", description="dpsgd: the training in one sentence")
    released_rows: Whole = Field(default=0, description="rows released through the stochastic channel")
    released_in_words: Words = Field(default="none", description="the channel and its constants in words")
    evaluated_in_words: Words = Field(default="none", description="the evaluation by the site, noised or not")


class Entry(Section):
    """One site against one adversary."""

    site: Words = Field(description="name of the site")
    patients: Whole = Field(description="its number of patients, which is public")
    adversary: Adversary = Field(description="against whom the entry holds")
    adversary_sees: Words = Field(description="what he sees besides the study, the software and all other patients")
    delta: Delta = Field(description="δ of every ε of the entry")
    conditional: Literal[False] = Field(description="the entry's own ε is never conditional")
    epsilon: Bound = Field(description="the largest ε of the unconditional lines: what holds for every patient")
    accountant: Accountant = Field(description="who gave it")
    basis: Words = Field(description="the theorems and mechanisms that the unconditional lines rest on")
    lines: tuple[Line, ...] = Field(min_length=1, description="the unconditional lines by population, then conditional")
    exposure: Exposure = Field(description="what the site sent, in declared constants")

    @model_validator(mode="after")
    def _largest_line(self) -> Entry:
        _check_accountant(self.epsilon, self.accountant)
        values = [_number(line.epsilon) for line in self.lines if not line.conditional]
        if not values:
            raise ValueError("an entry has at least one unconditional line")
        if max(values) != _number(self.epsilon):
            raise ValueError("the entry's epsilon is not the largest of its unconditional lines")
        return self


class PrivacyStatement(Section):
    """privacy.json: what is claimed for every site against every adversary.

    No ε stands alone: δ and the adversary are those of its entry, unit and neighbouring relation those of the document.
    """

    schema_version: Literal[3] = Field(description="version of this format")
    study: Words = Field(description="short name of the study")
    study_digest: str = Field(pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the approved protocol")
    mode: Mode = Field(description="training mode")
    unit: Words = Field(description="whose data one ε speaks of")
    neighbouring_relation: Words = Field(description="which two data sets an ε compares")
    randomness: Words = Field(description="where the noise came from; a seeded run is a simulation, its ε `as if`")
    assumptions: tuple[Words, ...] = Field(min_length=1, description="what every line takes for granted")
    excludes: Words | None = Field(
        description="what was sent that no ε of this document covers, such as an un-noised evaluation; null for nothing"
    )
    entries: tuple[Entry, ...] = Field(description="one entry a site and adversary")

    @model_validator(mode="after")
    def _one_entry_each(self) -> PrivacyStatement:
        pairs = [(entry.site, entry.adversary) for entry in self.entries]
        if len(set(pairs)) != len(pairs):
            raise ValueError("a site has two entries for one adversary")
        return self


def problem_of(document: Any) -> str | None:
    """The first thing in `document` that does not fit, in words; None if all fits."""
    try:
        PrivacyStatement.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        return f"{where}: {first['msg'].removeprefix('Value error, ')}"
    return None


def json_schema() -> dict[str, Any]:
    """The format as JSON Schema, draft 2020-12."""
    return {"$schema": GenerateJsonSchema.schema_dialect, **PrivacyStatement.model_json_schema()}


def schema_text() -> str:
    """The content of docs/privacy.schema.json."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def _number(epsilon: float | str) -> float:
    return epsilon if isinstance(epsilon, float) else math.inf


def _check_accountant(epsilon: float | str, accountant: Accountant) -> None:
    if accountant == "none" and _number(epsilon) not in (0.0, math.inf):
        raise ValueError("a finite epsilon names the accountant that gave it")
    if accountant != "none" and _number(epsilon) == math.inf:
        raise ValueError("no accountant gives an infinite epsilon")


if __name__ == "__main__":
    write_atomic(SCHEMA_FILE, schema_text())
