"""The study: the protocol that every site approves, read from study.toml.

Every key has a default except the study's name and schema. An unknown key is an error that suggests the nearest one.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from common.anchor.section import AnchorSection
from common.config import Section, read_toml, validate
from common.digest import sha256_of
from common.errors import StudyError
from common.gates_section import GatesSection, check_gates
from common.licences import Address, Licence, Line
from common.markers import Markers, colliding
from common.schema import Schema, load_schema, parse_schema

Mode = Literal["constrained", "dpsgd", "anchored", "none"]
SITE_NAME = r"\w[\w.\-]{0,63}"
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# strict: `rounds = true` and `rounds = "20"` are mistakes, not numbers
Count = Annotated[int, Field(ge=1, strict=True)]


class StudySection(Section):
    """What the study is called and which table it models."""

    name: str = Field(min_length=1, max_length=80, pattern=r"^[\w][\w .\-]*$", description="short name of the study")
    schema_path: str = Field(
        alias="schema", min_length=1, description="data dictionary (Frictionless Table Schema), relative to this file"
    )
    target: str | None = Field(default=None, description="outcome column; default: the schema's cohortium:target")
    seed: int | None = Field(
        default=None, ge=0, strict=True, description="fixes every random choice; simulation only, refused by a hospital"
    )


class ModelSection(Section):
    """The constrained variational autoencoder (privacy.md, section 1)."""

    latent_dim: int = Field(default=16, strict=True, ge=1, le=256, description="dimension of the latent code")
    hidden: tuple[Annotated[int, Field(ge=4, le=4096, multiple_of=2, strict=True)], ...] = Field(
        default=(128, 128), min_length=1, max_length=6, description="widths of the hidden layers, even numbers"
    )
    decoder_lipschitz: Positive = Field(
        default=20.0, description="the decoder's whole Lipschitz certificate, logit_scale included"
    )
    encoder_lipschitz: Positive = Field(default=4.0, description="the encoder's Lipschitz certificate")
    logit_scale: float = Field(
        default=5.0, ge=1, allow_inf_nan=False, description="fixed factor on every logit the decoder emits"
    )

    @model_validator(mode="after")
    def _certificate_has_room(self) -> ModelSection:
        if self.decoder_lipschitz < self.logit_scale:
            raise ValueError(
                f"decoder_lipschitz ({self.decoder_lipschitz:g}) is the whole certificate and includes logit_scale"
                f" ({self.logit_scale:g}); it must be at least as large"
            )
        return self


class TrainingSection(Section):
    """How the sites train and what they may send."""

    mode: Mode = Field(
        default="constrained",
        description='"constrained"; with finite epsilon for the weights "dpsgd", or "anchored", which has no rounds and'
        ' needs [anchor] epsilon; "none": non-private, simulation only',
    )
    rounds: int = Field(
        default=40, strict=True, ge=0, description="rounds of federated training, fixed beforehand; anchored: 0"
    )
    local_epochs: Count = Field(default=2, description="passes over the site's rows in each round")
    batch_size: int = Field(default=128, strict=True, ge=2, description="patients in a training step")
    learning_rate: Positive = Field(default=2e-3, description="Adam's peak learning rate; cosine over the study")
    kl_weight: Positive = Field(default=1.0, description="weight of the KL term in the ELBO")
    update_norm: Positive = Field(
        default=1.0, description="C: Euclidean radius onto which every site projects its decoder update"
    )
    gradient_clip: Positive = Field(
        default=1.0, description="dpsgd: Euclidean norm to which the gradient of every patient's loss is clipped"
    )
    min_sites: Count = Field(default=2, description="a round needs this many valid replies, else the study stops")
    round_timeout: Positive = Field(default=1800.0, description="seconds until a round closes without late sites")
    join_timeout: Positive = Field(default=300.0, description="seconds to wait for the sites before round 1")

    @model_validator(mode="before")
    @classmethod
    def _no_rounds_when_anchored(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("mode") == "anchored" and "rounds" not in values:
            return {**values, "rounds": 0}
        return values


class PrivacySection(Section):
    """What is promised and what is spent (privacy.md, sections 0 and 4)."""

    update_noise: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="noise multiplier z: constrained updates carry N(0, (z C)^2 I); 0: none, epsilon infinite",
    )
    accept_useless_noise: bool = Field(
        default=False,
        description="run with an update_noise that is refused because it protects or preserves too little",
    )
    delta: float = Field(default=1e-5, gt=0, lt=1, description="delta of every (epsilon, delta) statement")
    max_epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)] | None = Field(
        default=None,
        description="a site refuses the study if its total, all its studies together, would exceed this; default: none",
    )
    epsilon: Positive | None = Field(
        default=None, description="dpsgd, required there: epsilon of every site over the whole study; fixes its noise"
    )


class ReleaseSection(Section):
    """The synthetic cohort."""

    rows: int = Field(default=10_000, strict=True, ge=1, description="number of synthetic rows")
    method: Literal["prior", "channel"] = Field(
        default="prior",
        description='"prior": the coordinator samples the latent prior; "channel": every site draws rows from its own'
        " patients through the stochastic channel, see [channel]",
    )
    min_patients_per_site: Count = Field(default=1, description="a site with fewer patients is left out by name")
    markers: bool = Field(
        default=True, strict=True, description="every row carries study, release and that it is synthetic, in 3 columns"
    )
    license: Licence | None = Field(
        default=None, description="licence of the release: an SPDX identifier or the address of its text; default: none"
    )
    creators: tuple[Line, ...] = Field(
        default=(), max_length=100, description="whom to name as creators of the release; default: the consortium"
    )
    citation: Line | None = Field(default=None, description="how to cite the release")
    url: Address | None = Field(default=None, description="web page of the release")


class ChannelSection(Section):
    """The stochastic channel of release.method = "channel" (privacy.md, section 2)."""

    epsilon: Positive | None = Field(
        default=None,
        description="required by the channel: epsilon of every site's rows; fixes its noise",
    )
    latent_radius: Positive = Field(default=3.0, description="R: radius of the ball onto which every code is projected")
    release_share: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        allow_inf_nan=False,
        description="share of patient slots that only release and never train; 0: all do both, conditionally",
    )
    encoder: Literal["patients", "synthetic"] = Field(
        default="patients",
        description='"patients": the encoder of the training; "synthetic": a new one, fitted to the decoder\'s samples',
    )


class EvaluationSection(Section):
    """How the sites score the cohort against their own patients (privacy.md, section 0: a query)."""

    method: Literal["none", "accounted", "unnoised"] = Field(
        default="none",
        description='"accounted": noised counts, an event in every site\'s ledger; "unnoised": exact counts under the'
        ' site\'s floor, which no epsilon covers and a site must allow; "none": no evaluation',
    )
    epsilon: Positive = Field(default=3.0, description="accounted: epsilon of every site's counts; fixes their noise")
    holdout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        allow_inf_nan=False,
        description="share of patient slots that are held out of training and release, for utility and attacks",
    )
    pairs: Literal["target", "all", "none"] = Field(
        default="target", description="which pairs of columns are counted: the target with every other, all, or none"
    )
    groups: tuple[str, ...] = Field(
        default=(), description="columns by whose groups the utility is counted as well, such as sex or age"
    )
    secrets: tuple[str, ...] = Field(
        default=(), description="columns that the inference attack guesses; default: the target"
    )
    rows: Count = Field(default=10_000, description="rows of the cohort that are evaluated, at most")
    min_count: Count = Field(
        default=11, description="unnoised: no smaller count leaves a site; the larger of this and the site's own wins"
    )


class Study(Section):
    """The whole protocol. `sites` optionally declares the number of patients of each site, which fixes the weights."""

    study: StudySection = Field(description="what the study is called and which table it models")
    model: ModelSection = Field(default_factory=ModelSection, description="the constrained variational autoencoder")
    anchor: AnchorSection = Field(
        default_factory=AnchorSection, description="noised statistics before training; none by default"
    )
    training: TrainingSection = Field(
        default_factory=TrainingSection, description="how the sites train and what they may send"
    )
    privacy: PrivacySection = Field(default_factory=PrivacySection, description="what is promised and what is spent")
    release: ReleaseSection = Field(default_factory=ReleaseSection, description="the synthetic cohort")
    channel: ChannelSection = Field(default_factory=ChannelSection, description="the channel of the release")
    evaluation: EvaluationSection = Field(
        default_factory=EvaluationSection, description="how the sites score the cohort against their own patients"
    )
    gates: GatesSection = Field(
        default_factory=GatesSection, description="what the cohort has to show before it is released"
    )
    sites: dict[Annotated[str, Field(pattern=f"^{SITE_NAME}$")], Count] = Field(
        default_factory=dict, description="optional: patients of every site, declared beforehand (name = number)"
    )

    def document(self) -> dict[str, Any]:
        """The study as plain JSON data; `Study.model_validate` reads it back."""
        return self.model_dump(mode="json", by_alias=True)


class Protocol:
    """A study together with its schema: all that a site needs to know, and what it approves by digest."""

    def __init__(self, study: Study, schema: Schema) -> None:
        self.study = study
        self.schema = schema
        target = study.study.target or schema.target
        if target is not None and (target not in schema.names or len(schema[target].levels) < 2):
            raise StudyError(
                f"[study] target = {target!r} is not a column of the schema with two or more categories",
                fix=f"name one of: {', '.join(c.name for c in schema.columns if len(c.levels) > 1)}",
            )
        self.target = target
        if study.privacy.update_noise > 0 and study.training.mode != "constrained":
            raise StudyError(
                f'[privacy] update_noise = {study.privacy.update_noise:g} needs training.mode = "constrained"'
                f" (found {study.training.mode!r})",
                fix="set update_noise = 0 or change the mode",
            )
        if study.release.markers and (taken := colliding(schema.names)):
            raise StudyError(
                f"the schema has a column {taken[0]!r}, a name that marks the rows of a release",
                fix="rename the column, or set [release] markers = false",
            )
        _check_anchor(study)
        _check_dpsgd(study)
        _check_channel(study)
        _check_evaluation(study, schema, target)
        covered = study.training.mode == "dpsgd" or study.privacy.update_noise > 0
        check_gates(study.gates, study.sites, covered=covered)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over the study and its schema, without the schema's file name.

        A study that declares no gates of its own has the digest that it had before there were any.
        """
        document = self.study.document()
        document["study"].pop("schema")
        if self.study.gates == GatesSection():
            document.pop("gates")
        return sha256_of({"study": document, "schema": dict(self.schema.descriptor)})

    @property
    def markers(self) -> Markers | None:
        """What every released row is marked with; None if the study wants no markers."""
        return Markers(self.study.study.name, self.digest) if self.study.release.markers else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Protocol) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data that `from_json` turns back into an equal protocol."""
        return {"study": self.study.document(), "schema": dict(self.schema.descriptor)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Protocol:
        """Read what `to_json` wrote; `StudyError` or `SchemaError` if it is not valid."""
        return cls(
            validate(Study, document.get("study"), "received study", StudyError), parse_schema(document.get("schema"))
        )


def _check_anchor(study: Study) -> None:
    """`StudyError` if mode, rounds and anchor do not go together, or the anchor has settings that nothing reads."""
    mode, rounds, anchor = study.training.mode, study.training.rounds, study.anchor
    if (mode == "anchored") != (rounds == 0):
        raise StudyError(
            f'[training] rounds = {rounds} does not go with mode = "{mode}": an anchored study has no rounds, every'
            " other at least 1",
            fix="set rounds = 0, or choose the mode of the rounds that follow the anchor",
        )
    if anchor.epsilon is None:
        if mode == "anchored":
            raise StudyError(
                '[anchor] epsilon is missing: training.mode = "anchored" releases what its statistics allow',
                fix="set epsilon to what every site may spend on them, for example epsilon = 3.0",
            )
        if anchor != AnchorSection():
            raise StudyError("[anchor] has settings and no epsilon", fix="set epsilon or remove the section")
        return
    if mode == "none":
        raise StudyError(
            '[anchor] epsilon does not go with training.mode = "none", the reference without any protection',
            fix="remove the section or change the mode",
        )
    if mode == "anchored" and study.release.method == "channel":
        raise StudyError(
            'release.method = "channel" needs encoders at the sites; training.mode = "anchored" trains none there',
            fix='set release.method = "prior"',
        )
    if mode != "anchored" and anchor.generator != "nearest":
        raise StudyError(
            f'[anchor] generator = "{anchor.generator}" needs training.mode = "anchored" (found {mode!r}): rounds go on'
            " from the decoder",
            fix="remove generator or change the mode",
        )


def _check_dpsgd(study: Study) -> None:
    """`StudyError` if dpsgd lacks its target, or another mode has a setting that only dpsgd reads."""
    mode, epsilon, clip = study.training.mode, study.privacy.epsilon, study.training.gradient_clip
    if mode == "dpsgd":
        if epsilon is None:
            raise StudyError(
                '[privacy] epsilon is missing: training.mode = "dpsgd" calibrates its noise to it',
                fix="set epsilon to what every site may spend over the whole study, for example epsilon = 3.0",
            )
        return
    if epsilon is not None:
        raise StudyError(
            f'[privacy] epsilon = {epsilon:g} needs training.mode = "dpsgd" (found {mode!r}): no other mode has noise'
            " that could be calibrated to it",
            fix="remove epsilon or change the mode",
        )
    if clip != TrainingSection.model_fields["gradient_clip"].default:
        raise StudyError(
            f'[training] gradient_clip = {clip:g} needs training.mode = "dpsgd" (found {mode!r})',
            fix="remove gradient_clip or change the mode",
        )


def _check_channel(study: Study) -> None:
    """`StudyError` if the channel lacks its target or its bound, or another method has a setting only it reads."""
    channel = study.channel
    if study.release.method == "channel":
        if channel.epsilon is None:
            raise StudyError(
                '[channel] epsilon is missing: release.method = "channel" calibrates its noise to it',
                fix="set epsilon to what the rows of every site may spend, for example epsilon = 1.0",
            )
        if study.training.mode == "none":
            raise StudyError(
                'release.method = "channel" needs an encoder with a bound; training.mode = "none" has none',
                fix='change the mode, or set release.method = "prior"',
            )
        return
    default = ChannelSection()
    changed = [name for name in ChannelSection.model_fields if getattr(channel, name) != getattr(default, name)]
    if changed:
        raise StudyError(
            f'[channel] {", ".join(changed)} needs release.method = "channel" (found {study.release.method!r})',
            fix='set release.method = "channel" or remove the section',
        )


def _check_evaluation(study: Study, schema: Schema, target: str | None) -> None:
    """`StudyError` if the evaluation names columns that are not there, or one without method has settings."""
    evaluation = study.evaluation
    if evaluation.method == "none":
        default = EvaluationSection()
        changed = [
            name for name in type(evaluation).model_fields if getattr(evaluation, name) != getattr(default, name)
        ]
        if changed:
            raise StudyError(
                f'[evaluation] {", ".join(changed)} needs a method (found "none")',
                fix='set method = "accounted" or remove the section',
            )
        return
    for key, names in (("groups", evaluation.groups), ("secrets", evaluation.secrets)):
        unknown = [name for name in names if name not in schema.names]
        if unknown or len(set(names)) != len(names):
            raise StudyError(
                f"[evaluation] {key} names {unknown[0]!r}, which is not a column of the schema"
                if unknown
                else f"[evaluation] {key} names a column twice",
                fix=f"name columns of the schema: {', '.join(schema.names)}",
            )
    if evaluation.groups and (target is None or target in evaluation.groups):
        raise StudyError(
            "[evaluation] groups needs a target of the study, and cannot contain it",
            fix="set [study] target, or remove groups",
        )


def load_protocol(path: str | Path, overrides: Iterable[str] = ()) -> Protocol:
    """Read study.toml and the schema it names; `overrides` are "section.key=value" as in `--set`.

    Raises `StudyError` or `SchemaError` with one message that lists every problem found.
    """
    path = Path(path)
    document = read_toml(path, StudyError, fix="check the path, or write a study with `cohortium init`")
    for override in overrides:
        _apply_override(document, override)
    study = validate(Study, document, str(path), StudyError)
    return Protocol(study, load_schema(path.parent / study.study.schema_path))


def parse_override(text: str, option: str = "--set") -> tuple[str, str, Any]:
    """Section, key and value of "section.key=value"; `StudyError` naming `option` for another form."""
    name, separator, written = text.partition("=")
    section, dot, key = (part.strip() for part in name.partition("."))
    if not separator or not dot or not section or not key:
        raise StudyError(f"{option} {text!r} is not section.key=value", fix=f"for example {option} training.rounds=20")
    try:
        return section, key, tomllib.loads(f"value = {written}")["value"]
    except tomllib.TOMLDecodeError:
        return section, key, written.strip()  # a bare word is meant as a string, as on any command line


def _apply_override(document: dict[str, Any], override: str) -> None:
    section, key, value = parse_override(override)
    target = document.setdefault(section, {})
    if not isinstance(target, dict):
        raise StudyError(f"--set {override!r}: {section!r} is not a section", fix="use section.key=value")
    target[key] = value
