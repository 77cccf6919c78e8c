"""[gates] of study.toml: what a cohort has to show before anybody may have it.

Certificate, ledgers, budget, schema and the minimum numbers of sites and patients are gates of every study and cannot
be switched off. Those that look at patients or at an audit are declared: what decides about a release then depends on
patients, and every ε says so (privacy.md, section 0).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from common.config import Section
from common.errors import StudyError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Whole = Annotated[int, Field(ge=1, strict=True)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)]
KeyId = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

# The gates that need the patients or an audit, by the key that declares them.
DECLARED: Mapping[str, str] = {
    "max_copies": "copies",
    "max_singling_out": "singling_out",
    "max_linkability": "linkability",
    "max_inference": "inference",
    "max_membership": "membership",
    "audit": "audit",
}


class GatesSection(Section):
    """Limits of the gates; a key that is left out takes the limit named, or declares no gate."""

    max_epsilon: Positive | None = Field(
        default=None, description="budget: largest unconditional epsilon of a site; default: privacy.max_epsilon alone"
    )
    min_sites: Whole | None = Field(
        default=None, description="sites that answered a round, at least; default: training.min_sites"
    )
    min_patients: Whole = Field(default=1, description="patients of these sites together, at least")
    min_patients_per_site: Whole | None = Field(
        default=None, description="patients of each of them, at least; default: release.min_patients_per_site"
    )
    max_copies: Share | None = Field(
        default=None,
        description="share of patients with a copy in the cohort beyond what held-out patients have by chance, exact,"
        " in all but one column or near; of this and the four below the upper end of the 95 % interval counts, and"
        " without the key there is no such gate",
    )
    max_singling_out: Share | None = Field(default=None, description="risk of being singled out, such as 0.09")
    max_linkability: Share | None = Field(default=None, description="risk that two halves of a record are linked")
    max_inference: Share | None = Field(default=None, description="risk that a secret is inferred")
    max_membership: Share | None = Field(
        default=None, description="advantage of an attacker who calls patients members of the study"
    )
    audit: bool = Field(
        default=False, strict=True, description="no lower bound of `cohortium audit` may exceed the study's epsilon"
    )
    override_keys: tuple[KeyId, ...] = Field(
        default=(),
        description="key ids (SHA-256 of the raw Ed25519 key) of those who may sign an override; default: anybody but"
        " the release key",
    )

    @property
    def declared(self) -> tuple[str, ...]:
        """The gates that are declared here and look at patients or at an audit."""
        default = GatesSection.model_fields
        return tuple(name for key, name in DECLARED.items() if getattr(self, key) != default[key].default)


def check_gates(gates: GatesSection, sites: Mapping[str, int], *, covered: bool) -> None:
    """`StudyError` for a gate that nothing could pass: `sites` are the declared patients, if any.

    `covered`: the training has noise, so that ε can be finite.
    """
    if gates.max_epsilon is not None and not covered:
        raise StudyError(
            f"[gates] max_epsilon = {gates.max_epsilon:g} could never be kept: the updates carry no noise, and every"
            " epsilon is infinite",
            fix='remove it, set privacy.update_noise, or training.mode = "dpsgd"',
        )
    if sites and gates.min_sites is not None and gates.min_sites > len(sites):
        raise StudyError(
            f"[gates] min_sites = {gates.min_sites}, but [sites] declares {len(sites)}",
            fix="lower it or declare more sites",
        )
    if sites and gates.min_patients > sum(sites.values()):
        raise StudyError(
            f"[gates] min_patients = {gates.min_patients}, but [sites] declares {sum(sites.values())} patients",
            fix="lower it or declare more patients",
        )
    twice = [key for key, number in Counter(gates.override_keys).items() if number > 1]
    if twice:
        raise StudyError(f"[gates] override_keys names {twice[0][:16]}… twice", fix="name every key once")
