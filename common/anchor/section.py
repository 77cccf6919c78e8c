"""The [anchor] section of study.toml."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from common.config import Section


class AnchorSection(Section):
    """Noised statistics before training, from which a generator is made (privacy.md, section 5)."""

    epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None,
        description="epsilon of every site's two messages together, at privacy.delta; fixes their noise; default: none",
    )
    generator: Literal["nearest", "decoder", "copula"] = Field(
        default="nearest",
        description='anchored: what the cohort is sampled from: the certified decoder, the copula, or "nearest", the'
        " one whose rows are nearer to the noised statistics",
    )
    accept_useless_noise: bool = Field(
        default=False, description="run with an epsilon that is refused because too little would be left of the data"
    )
