"""compare.json: what every run of a comparison promised and measured, and the table over its seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal

from pydantic import Field

from common.config import Section
from common.privacy.statement import epsilon_in_words, largest_epsilon
from common.study import Mode, Protocol

SCHEMA_VERSION: Literal[1] = 1
INFINITE: Literal["infinity"] = "infinity"
Epsilon = float | Literal["infinity"]
# The measurements of the table, with the headings of their columns.
METRICS = {
    "tstr_gradient_boosting": "AUROC gb",
    "tstr_logistic_regression": "AUROC lr",
    "ks": "KS",
    "tv": "TV",
    "correlation": "Δcorr",
}


class Privacy(Section):
    """What the accountant says of a run: the largest ε over sites and adversaries, and what it is an ε of."""

    epsilon: Epsilon
    delta: float
    unit: str
    neighbouring_relation: str
    adversary: str
    randomness: str
    in_words: str


class Auroc(Section):
    """AUROC on held-out patients; None where it is not defined."""

    gradient_boosting: float | None
    logistic_regression: float | None


class Utility(Section):
    """Classifiers trained on the synthetic rows (tstr) and on the real ones (trtr)."""

    tstr: Auroc
    trtr: Auroc


class Fidelity(Section):
    """Mean distances of synthetic from real columns, and of their correlations."""

    ks: float | None
    tv: float | None
    correlation: float | None


class RunResult(Section):
    """What a finished run promised and measured."""

    privacy: Privacy
    exposure: str
    utility: Utility | None
    utility_reason: str
    fidelity: Fidelity
    seconds: dict[str, float]
    not_joined: dict[str, str]


class RunRecord(Section):
    """One run: what was asked for, and its result or why there is none. `folder` is relative to compare.json."""

    run: str
    mode: Mode
    seed: int | None
    requested_epsilon: float | None
    settings: dict[str, Any]
    study_digest: str
    folder: str
    failed: str | None = None
    result: RunResult | None = None


class Spread(Section):
    """Mean and range over the seeds with a defined value, of which there are `count`."""

    mean: float
    low: float
    high: float
    count: int


class Line(Section):
    """A line of the table: one kind of run over all its seeds. `epsilon` is the largest of them."""

    run: str
    mode: Mode
    requested_epsilon: float | None
    epsilon: Epsilon | None
    exposure: str
    runs: int
    finished: int
    failed: list[str]
    metrics: dict[str, Spread | None]
    seconds: Spread | None
    folders: list[str]


class Comparison(Section):
    """The whole document."""

    schema_version: Literal[1] = SCHEMA_VERSION
    software: str
    study: str
    study_digest: str
    caution: str
    notes: list[str]
    patients: dict[str, int]
    target: str | None
    seeds: list[int | None] = Field(min_length=1)
    utility_reason: str
    real: dict[str, Spread | None]
    table: list[Line]
    runs: list[RunRecord]

    @property
    def seeded(self) -> bool:
        """Whether every random number came from a seed: then an ε holds "as if" only."""
        return None not in self.seeds

    @property
    def has_utility(self) -> bool:
        """Whether any run has an AUROC."""
        return any(line.metrics[name] for line in self.table for name in METRICS if name.startswith("tstr_"))


def read_result(summary: Mapping[str, Any], statement: Mapping[str, Any], metrics: Mapping[str, Any]) -> RunResult:
    """The result of a run from what it left: its summary, privacy.json and metrics.json."""
    entries = statement["entries"]
    largest = largest_epsilon(statement)
    against = dict.fromkeys(entry["adversary"] for entry in entries if entry["epsilon"] == largest)
    utility = metrics["utility"]
    fidelity = metrics["fidelity"]
    return RunResult(
        privacy=Privacy(
            epsilon=INFINITE if isinstance(largest, str) else largest,
            delta=entries[0]["delta"],
            unit=statement["unit"],
            neighbouring_relation=statement["neighbouring_relation"],
            adversary=", ".join(against),
            randomness=statement["randomness"],
            in_words=epsilon_in_words(statement),
        ),
        exposure=exposure_in_words(statement["mode"], [entry["exposure"] for entry in entries]),
        utility=None if utility is None else Utility(tstr=_auroc(utility["tstr"]), trtr=_auroc(utility["trtr"])),
        utility_reason=metrics["utility_reason"] or (utility["tstr"]["reason"] if utility else ""),
        fidelity=Fidelity(
            ks=fidelity["ks_mean"], tv=fidelity["tv_mean"], correlation=fidelity["correlation_difference"]
        ),
        seconds={name: float(value) for name, value in summary["seconds"].items()},
        not_joined=dict(summary["not_joined"]),
    )


def exposure_in_words(mode: str, exposures: Sequence[Mapping[str, Any]]) -> str:
    """What the sites let out, in declared constants; the largest over sites."""
    if mode == "none":
        return "updates neither projected nor noised: nothing bounds what a site lets out"
    exposures = [exposure for exposure in exposures if exposure["rounds"]] or exposures
    moves = [exposure["largest_move_of_decoder_per_round"] for exposure in exposures]
    rounds, norm = (max(exposure[key] for exposure in exposures) for key in ("rounds", "update_norm"))
    words = (
        f"at most {rounds} updates a site, each of norm at most {norm:g}; a site moves the global decoder by at most"
        f" {max(moves):.3g} a round (2wC)"
    )
    if mode == "dpsgd":
        clip, noise = (
            [exposure[key] for exposure in exposures if key in exposure]
            for key in ("gradient_clip", "noise_multiplier")
        )
        if clip and noise:
            words += (
                f"; made of steps in which every patient's gradient was clipped to {max(clip):g} and noised (multiplier"
                f" at least {min(noise):.3g})"
            )
    elif min(exposure.get("noise_multiplier", 0.0) for exposure in exposures) > 0:
        words += "; every update carries noise"
    else:
        words += "; no noise"
    return words


def assemble(
    base: Protocol,
    records: Sequence[RunRecord],
    *,
    patients: Mapping[str, int],
    caution: str,
    notes: Sequence[str],
    has_test: bool,
) -> Comparison:
    """The document with its table, one line a kind of run, in the order in which they first ran."""
    finished = [record.result for record in records if record.result is not None]
    # The real rows are the same in every run: one value a seed.
    real = {r.seed: r.result.utility.trtr for r in records if r.result is not None and r.result.utility is not None}
    reason = next((result.utility_reason for result in finished if result.utility_reason), "")
    if not has_test:
        reason = "no held-out patients were given (--test)"
    return Comparison(
        software=f"cohortium {version('cohortium')}",
        study=base.study.study.name,
        study_digest=base.digest,
        caution=caution,
        notes=[*notes, *_absences(records)],
        patients=dict(patients),
        target=base.target,
        seeds=list(dict.fromkeys(record.seed for record in records)),
        utility_reason=reason,
        real={name: spread(getattr(scores, name) for scores in real.values()) for name in Auroc.model_fields},
        table=[_line([r for r in records if r.run == name]) for name in dict.fromkeys(r.run for r in records)],
        runs=list(records),
    )


def spread(values: Iterable[float | None]) -> Spread | None:
    """Mean and range of the defined values; None if there is none."""
    defined = [value for value in values if value is not None]
    if not defined:
        return None
    # The mean of equal numbers may round beyond them.
    low, high = min(defined), max(defined)
    return Spread(mean=min(max(sum(defined) / len(defined), low), high), low=low, high=high, count=len(defined))


def _line(records: Sequence[RunRecord]) -> Line:
    finished = [record.result for record in records if record.result is not None]
    epsilons = [result.privacy.epsilon for result in finished]
    finite = [epsilon for epsilon in epsilons if not isinstance(epsilon, str)]
    largest: Epsilon | None = None
    if epsilons:
        largest = max(finite) if len(finite) == len(epsilons) else INFINITE
    return Line(
        run=records[0].run,
        mode=records[0].mode,
        requested_epsilon=records[0].requested_epsilon,
        epsilon=largest,
        exposure=finished[0].exposure if finished else "",
        runs=len(records),
        finished=len(finished),
        failed=list(dict.fromkeys(record.failed for record in records if record.failed)),
        metrics={name: spread(_metric(result, name) for result in finished) for name in METRICS},
        seconds=spread(result.seconds.get("federation") for result in finished),
        folders=[record.folder for record in records if record.result is not None],
    )


def _metric(result: RunResult, name: str) -> float | None:
    if name.startswith("tstr_"):
        return getattr(result.utility.tstr, name.removeprefix("tstr_")) if result.utility else None
    return getattr(result.fidelity, name)


def _absences(records: Sequence[RunRecord]) -> list[str]:
    found = []
    for record in records:
        missing = record.result.not_joined if record.result is not None else {}
        if missing:
            reasons = ", ".join(f"{site} ({reason})" for site, reason in missing.items())
            found.append(f"In {record.folder} a site took no part: {reasons}.")
    return found


def _auroc(utility: Mapping[str, Any]) -> Auroc:
    return Auroc(gradient_boosting=utility["gradient_boosting"], logistic_regression=utility["logistic_regression"])
