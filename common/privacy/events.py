"""Privacy events: frozen values that completely document what a mechanism did; accountants consume nothing else.

Every event belongs to one round (the ledger keys on it) and states its own units. "Replace units" are noise standard
deviations over the largest shift that replacing the content of one patient slot can cause; "add/remove units", which
Opacus uses, are noise standard deviations over the clipping norm, and replacing one patient shifts by twice that norm.
`common.privacy.conventions` alone converts between them.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

Role = Literal["all", "release"]


@dataclass(frozen=True)
class BoundedInfluence:
    """One un-noised update, projected to ‖u‖₂ ≤ `update_norm`, entered the mean with `weight` (privacy.md, T2).

    A statement about sensitivity only: its ε is infinite against anyone who sees the update or a model made of it.
    """

    type: ClassVar[str] = "BoundedInfluence"
    round: int
    update_norm: float
    weight: float


@dataclass(frozen=True)
class UnboundedInfluence:
    """One update without projection or noise: the non-private reference, in simulation only. ε is infinite."""

    type: ClassVar[str] = "UnboundedInfluence"
    round: int
    weight: float


@dataclass(frozen=True)
class GaussianUpdate:
    """One projected update with noise, u + N(0, (zC)² I), entered the mean with `weight` (privacy.md, section 3).

    `update_norm` is C in the decoder's parameter space; `noise_multiplier` is z, noise standard deviation over C (0: no
    noise, infinite ε). Any two projected updates differ by at most 2C, so z is z/2 in replace units.
    """

    type: ClassVar[str] = "GaussianUpdate"
    round: int
    update_norm: float
    noise_multiplier: float
    weight: float

    def __post_init__(self) -> None:
        _check_round(self.round)
        _check_positive("update_norm", self.update_norm)
        _check_not_negative("noise_multiplier", self.noise_multiplier)
        _check_not_negative("weight", self.weight)


@dataclass(frozen=True)
class SampledGaussianSteps:
    """The DP-SGD steps of one round (privacy.md, section 3, dpsgd): all trained parameters, encoder included.

    `steps` steps, scheduled beforehand; in each, every patient enters the batch independently with
    `sampling_probability`, his gradient is clipped, and Gaussian noise is added. `noise_multiplier` is in Opacus's
    add/remove units: noise standard deviation over the clipping norm (0: no noise, infinite ε).
    """

    type: ClassVar[str] = "SampledGaussianSteps"
    round: int
    steps: int
    sampling_probability: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        _check_round(self.round)
        _check_count("steps", self.steps)
        _check_not_negative("noise_multiplier", self.noise_multiplier)
        if not 0 < self.sampling_probability <= 1:
            raise ValueError(f"sampling_probability must be in (0, 1], got {self.sampling_probability!r}")


@dataclass(frozen=True)
class GaussianStatistics:
    """Noised, clipped statistics sent once, such as the anchor's histograms or second moments (privacy.md, section 5).

    `noise_multiplier` is in replace units: noise standard deviation over `sensitivity`, the L2 distance by which
    replacing one patient can move the vector `statistics` names (0: no noise, infinite ε). `role` "fit" says that roles
    were fixed on patient slots before data were read and that only fit slots entered; "all" says nothing of the kind.
    """

    type: ClassVar[str] = "GaussianStatistics"
    round: int
    noise_multiplier: float
    sensitivity: float
    statistics: str
    role: Literal["all", "fit"] = "all"

    def __post_init__(self) -> None:
        _check_round(self.round)
        _check_not_negative("noise_multiplier", self.noise_multiplier)
        _check_positive("sensitivity", self.sensitivity)
        if self.role not in ("all", "fit"):
            raise ValueError(f"role must be all or fit, got {self.role!r}")


@dataclass(frozen=True)
class UnnoisedAggregates:
    """Exact counts and scores of an evaluation, under the site's floor but without noise (privacy.md, section 0).

    No ε covers them and none is made infinite by them: every ε of a site that sent some is of its models and cohorts
    alone, and says that it excludes them.
    """

    type: ClassVar[str] = "UnnoisedAggregates"
    round: int
    statistics: str

    def __post_init__(self) -> None:
        _check_round(self.round)


@dataclass(frozen=True)
class ChannelRelease:
    """`rows` rows, each of a patient drawn uniformly and independently, through the channel (privacy.md, section 2).

    All constants are the declared ones, never measured ones.
    `patients`: n, the patients drawn from, in fixed slots (n_release if `role` is "release").
    `sensitivity`: Δ = min(2R, L_e diam 𝒳), in latent units. `latent_noise`: σ_z, latent units.
    `observation_noise`: σ_x and `decoder_lipschitz`: L_d, in units of the encoded output.
    `all_coordinates_noised`: every output coordinate carried N(0, σ_x²) before argmax, rounding and clamping; only then
    does T4 apply.
    `role`: "release" says that the roles fit and release were fixed on patient slots before data were read, that only
    release slots were drawn, and that no training event of this study touched them; "all" says nothing of the kind.
    `networks_accounted`: encoder and decoder are both outputs of accounted mechanisms of this site's event list, or
    trained on such outputs only (section 2, scope iii).
    """

    type: ClassVar[str] = "ChannelRelease"
    round: int
    rows: int
    patients: int
    sensitivity: float
    latent_noise: float
    observation_noise: float
    decoder_lipschitz: float
    all_coordinates_noised: bool
    role: Role = "all"
    networks_accounted: bool = False

    def __post_init__(self) -> None:
        _check_round(self.round)
        _check_count("rows", self.rows)
        _check_count("patients", self.patients)
        _check_positive("sensitivity", self.sensitivity)
        _check_not_negative("latent_noise", self.latent_noise)
        _check_not_negative("observation_noise", self.observation_noise)
        _check_positive("decoder_lipschitz", self.decoder_lipschitz)
        if self.role not in get_args(Role):
            raise ValueError(f"role must be one of {', '.join(get_args(Role))}, got {self.role!r}")
        for name in ("all_coordinates_noised", "networks_accounted"):
            # A string from a hand-made document would be true; these two flags only ever lower ε.
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")

    @property
    def unconditional(self) -> bool:
        """Whether the guarantee of the patients drawn needs no "conditional on the encoder and decoder" (scope i)."""
        return self.role == "release" or self.networks_accounted


Event = (
    BoundedInfluence
    | UnboundedInfluence
    | GaussianUpdate
    | SampledGaussianSteps
    | GaussianStatistics
    | UnnoisedAggregates
    | ChannelRelease
)
EVENTS: dict[str, type[Event]] = {event.type: event for event in get_args(Event)}


def event_to_json(event: Event) -> dict[str, Any]:
    """Plain JSON data with the event's type."""
    return {"type": event.type, **asdict(event)}


def event_from_json(document: dict[str, Any]) -> Event:
    """Read what `event_to_json` wrote.

    `ValueError` for a type this version does not know or a value the type forbids, `TypeError` for other fields.
    """
    fields = dict(document)
    name = fields.pop("type", None)
    if name not in EVENTS:
        raise ValueError(f"unknown privacy event {name!r}; known: {', '.join(EVENTS)}")
    return EVENTS[name](**fields)


def _check_round(value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"round must be a whole number, at least 0, got {value!r}")


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


def _check_not_negative(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")
