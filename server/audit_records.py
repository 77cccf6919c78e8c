"""audit.json: what every score showed of the twin, beside what is claimed of the study."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from common.config import Section
from common.privacy.accountant import Adversary
from common.study import Mode

SCHEMA_VERSION: Literal[1] = 1
INFINITE: Literal["infinity"] = "infinity"

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=0)]


class Guesses(Section):
    """One declared number of guesses: what it refutes, and the most it could have refuted."""

    guesses: Whole
    correct: Whole
    level: float = Field(gt=0, lt=1, description="probability of being wrong that this bound allows itself")
    epsilon: NotNegative = Field(description="the mechanism is not (ε', δ)-DP for any ε' below this")
    reachable: NotNegative = Field(description="what `epsilon` would be with every guess right")


class ScoreLine(Section):
    """One attack. `strongest` is the line of the table; all bounds of all lines hold together."""

    adversary: Adversary = Field(description="the weakest adversary who can compute the score")
    score: str
    strongest: Guesses
    declared: list[Guesses]
    claim: NotNegative | Literal["infinity"] = Field(description="the study's ε against this adversary, this site")
    refuted: bool = Field(description="the lower bound exceeds the claim")


class PlantedCanaries(Section):
    """How many, and where."""

    number: Whole
    site: str
    patients: Whole = Field(description="of the site, canaries included")
    seeded: bool = Field(description="slots and coins come from the study's seed, not from the operating system")


class Audit(Section):
    """One audit of one study."""

    schema_version: Literal[1] = SCHEMA_VERSION
    study: str
    study_digest: str = Field(description="of the study that the twin is a twin of")
    twin_digest: str
    mode: Mode
    delta: float
    confidence: float = Field(description="with which all bounds of all lines hold together")
    unit: str
    neighbouring_relation: str
    canaries: PlantedCanaries
    lines: list[ScoreLine]
    cautions: list[str]

    @property
    def refuted(self) -> list[ScoreLine]:
        """Lines whose lower bound exceeds the claim."""
        return [line for line in self.lines if line.refuted]
