import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from common.privacy.channel import cohort_epsilon
from common.privacy.dpsgd import calibrate_dpsgd
from common.privacy.events import (
    BoundedInfluence,
    ChannelRelease,
    Event,
    GaussianUpdate,
    SampledGaussianSteps,
    UnboundedInfluence,
)
from common.privacy.statement import (
    ADVERSARIES,
    ASSUMPTIONS,
    epsilon_in_words,
    largest_epsilon,
    largest_lines,
    privacy_statement,
)
from common.privacy.statement_schema import problem_of
from common.schema import parse_schema
from common.study import Protocol, Study

SCHEMA = parse_schema({"fields": [{"name": "x", "type": "boolean"}]})
EVENTS: dict[str, list[Event]] = {
    "south": [BoundedInfluence(1, 0.5, 0.25), BoundedInfluence(2, 0.5, 0.3)],
    "north": [BoundedInfluence(1, 1.0, 0.75)],
    "reference": [UnboundedInfluence(1, 0.5)],
    "mixed": [BoundedInfluence(1, 0.5, 0.25), UnboundedInfluence(2, 0.25)],
    "silent": [],
}
PATIENTS = {site: 100 + i for i, site in enumerate(EVENTS)}


def statement(mode: str = "constrained", **study: Any) -> dict[str, Any]:
    document = {
        "study": {"name": "trial", "schema": "s.json", **study},
        "training": {"mode": mode},
        "privacy": {"delta": 1e-6},
    }
    return privacy_statement(Protocol(Study.model_validate(document), SCHEMA), EVENTS, PATIENTS)


def walk(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    yield key, value
    if isinstance(value, dict):
        for name, item in value.items():
            yield from walk(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from walk(item, key)


@pytest.mark.parametrize("mode", ["constrained", "none"])
@pytest.mark.parametrize("seed", [None, 3])
def test_no_finite_epsilon_is_ever_printed(mode: str, seed: int | None) -> None:
    document = statement(mode, seed=seed)
    found = [value for key, value in walk(document) if "epsilon" in key.lower()]
    # One of the entry and one of its only line.
    assert len(found) == 2 * len(EVENTS) * len(ADVERSARIES) and set(found) == {"infinity"}
    text = json.dumps(document, allow_nan=False)
    assert json.loads(text) == document and "ε" not in text and "epsilon =" not in text
    assert document["mode"] == mode


def test_it_names_unit_relation_delta_adversaries_and_assumptions() -> None:
    document = statement()
    assert document["unit"] == "one patient (one row)"
    assert "replacing the content of one patient slot" in document["neighbouring_relation"]
    assert document["assumptions"] == list(ASSUMPTIONS) and len(ASSUMPTIONS) >= 3
    assert document["study"] == "trial" and len(document["study_digest"]) == 64
    pairs = [(entry["site"], entry["adversary"]) for entry in document["entries"]]
    assert len(pairs) == len(set(pairs)) == 3 * len(EVENTS)
    assert {adversary for _, adversary in pairs} == {"public", "member", "coordinator"}
    for entry in document["entries"]:
        assert entry["delta"] == 1e-6 and entry["patients"] == PATIENTS[entry["site"]]
        assert entry["adversary_sees"] == ADVERSARIES[entry["adversary"]] and entry["conditional"] is False


def entry_of(site: str) -> dict[str, Any]:
    return next(entry for entry in statement()["entries"] if entry["site"] == site)


def test_exposure_of_bounded_sites_is_the_worst_round_in_declared_constants() -> None:
    assert entry_of("south")["exposure"] == {
        "rounds": 2,
        "update_norm": 0.5,
        "weight": 0.3,
        "largest_move_of_decoder_per_round": pytest.approx(2 * 0.3 * 0.5),
        "noise_multiplier": 0.0,
    }
    assert "T2" in entry_of("south")["basis"] and "no finite epsilon" in entry_of("south")["basis"]


@pytest.mark.parametrize(("site", "rounds"), [("reference", 1), ("mixed", 2)])
def test_without_a_bound_in_every_round_none_is_claimed(site: str, rounds: int) -> None:
    exposure = entry_of(site)["exposure"]
    assert exposure["rounds"] == rounds and exposure["largest_move_of_decoder_per_round"] == "infinity"
    assert "T2" not in entry_of(site)["basis"]


def test_noised_updates_have_a_finite_epsilon_from_the_accountant() -> None:
    events = {
        "south": [GaussianUpdate(r, 1.0, 6.3, 0.5) for r in range(1, 41)],
        "north": [GaussianUpdate(1, 1.0, 6.3, 0.5)],
    }
    study = {"study": {"name": "trial", "schema": "s.json"}, "privacy": {"delta": 1e-5}}
    protocol = Protocol(Study.model_validate(study), SCHEMA)
    found = privacy_statement(protocol, events, {"south": 100, "north": 100})
    epsilons = {entry["site"]: entry["epsilon"] for entry in found["entries"]}
    # ν = z/2 composed over 40 rounds: z = 6.3 is ε = 10 in privacy.md, section 3.
    assert epsilons["south"] == pytest.approx(10.0, rel=0.012) and epsilons["north"] < epsilons["south"]
    assert largest_epsilon(found) == epsilons["south"]
    words = epsilon_in_words(found)
    assert all(part in words for part in ("one patient", "1e-05", "replace-one", "public")) and "as if" not in words
    assert "as if" in epsilon_in_words(found | {"randomness": "fixed seed 1: a simulation"})


def test_a_site_that_sent_nothing_is_said_to_have_sent_nothing() -> None:
    assert entry_of("silent")["exposure"] == {
        "rounds": 0,
        "update_norm": 0.0,
        "weight": 0.0,
        "largest_move_of_decoder_per_round": 0.0,
    }
    assert "no update" in entry_of("silent")["basis"] and entry_of("silent")["epsilon"] == "infinity"


def test_a_seeded_run_says_that_it_is_a_simulation() -> None:
    assert "simulation" in statement(seed=7)["randomness"] and "7" in statement(seed=7)["randomness"]
    assert "operating system" in statement()["randomness"] and "seed" not in statement()["randomness"].split()


BOUNDED = [BoundedInfluence(r, 0.5, 0.5) for r in (1, 2)]
UNBOUNDED = [UnboundedInfluence(r, 0.5) for r in (1, 2)]
NOISED = [GaussianUpdate(r, 1.0, 6.3, 0.5) for r in (1, 2)]
# Noise multiplier 1: privacy.md, section 7, (n, M, ν) = (1000, 1000, 1): ε = 0.180.
CHANNEL = ChannelRelease(3, 1000, 1000, 4.0, 4.0, 0.0, 20.0, False)
CHANNEL_EPSILON = 0.180


def dpsgd_steps() -> list[Event]:
    multiplier = calibrate_dpsgd(40, 0.1, 3.0, 1e-5)
    return [SampledGaussianSteps(r, 20, 0.1, multiplier) for r in (1, 2)]


def stated(events: Mapping[str, Sequence[Event]], mode: str = "constrained", seed: int | None = None) -> dict[str, Any]:
    """The statement of these sites, 1000 patients each; checked against its schema."""
    document: dict[str, Any] = {
        "study": {"name": "trial", "schema": "s.json", "seed": seed},
        "training": {"mode": mode},
        "privacy": {"delta": 1e-5} | ({"epsilon": 3.0} if mode == "dpsgd" else {}),
    }
    found = privacy_statement(Protocol(Study.model_validate(document), SCHEMA), events, dict.fromkeys(events, 1000))
    assert problem_of(json.loads(json.dumps(found, allow_nan=False))) is None
    return found


def lines_of(document: dict[str, Any], adversary: str = "coordinator") -> dict[tuple[str, bool], dict[str, Any]]:
    entry = next(entry for entry in document["entries"] if entry["adversary"] == adversary)
    return {(line["applies_to"], line["conditional"]): line for line in entry["lines"]}


def test_without_a_release_an_entry_has_one_line_that_says_the_same() -> None:
    for entry in statement()["entries"]:
        (line,) = entry["lines"]
        assert (line["applies_to"], line["conditional"], line["condition"]) == ("every patient", False, None)
        assert all(line[key] == entry[key] for key in ("epsilon", "accountant", "basis"))
        assert "released_rows" not in entry["exposure"]


@pytest.mark.parametrize(
    ("training", "mode", "why"),
    [
        (BOUNDED, "constrained", "the updates carry no noise"),
        (UNBOUNDED, "none", "the updates carry no noise"),
        (NOISED, "constrained", "an encoder or decoder that no accounted mechanism covers"),
        ([], "constrained", "an encoder or decoder that no accounted mechanism covers"),
    ],
)
def test_a_release_behind_unaccounted_networks_is_infinite_with_a_conditional_line(
    training: list[Event], mode: str, why: str
) -> None:
    document = stated({"north": [*training, CHANNEL]}, mode)
    for adversary in ADVERSARIES:
        lines = lines_of(document, adversary)
        assert set(lines) == {("every patient", False), ("every patient", True)}
        assert lines["every patient", False]["epsilon"] == "infinity"
        conditional = lines["every patient", True]
        assert conditional["epsilon"] == pytest.approx(CHANNEL_EPSILON, abs=1e-3)
        assert conditional["accountant"] == "PLD" and "T5" in conditional["basis"]
        assert "given the encoder and decoder" in conditional["condition"]
    assert largest_epsilon(document) == "infinity"
    words = epsilon_in_words(document)
    assert words.startswith("ε is infinite, for one patient, against every adversary: ") and why in words
    assert "conditional on the encoder and decoder" in words and "ε = 0.18 at δ = 1e-05, for one patient" in words
    assert "replace-one" in words and "public, member and coordinator" in words
    assert "as if" in epsilon_in_words(stated({"north": [*training, CHANNEL]}, mode, seed=1))


def test_with_roles_there_are_two_lines_and_the_words_give_both() -> None:
    document = stated({"north": [*BOUNDED, replace(CHANNEL, role="release", networks_accounted=False)]})
    lines = lines_of(document)
    assert set(lines) == {("fit patients", False), ("release patients", False)}
    assert lines["fit patients", False]["epsilon"] == "infinity"
    assert lines["release patients", False]["epsilon"] == pytest.approx(CHANNEL_EPSILON, abs=1e-3)
    assert largest_epsilon(document) == "infinity"
    words = epsilon_in_words(document)
    assert "infinite for fit patients (the updates carry no noise)" in words
    assert "ε = 0.18 for release patients; at δ = 1e-05: for one patient" in words and "conditional" not in words


def test_with_everything_accounted_there_is_one_number() -> None:
    training = dpsgd_steps()
    document = stated({"north": [*training, replace(CHANNEL, networks_accounted=True)]}, "dpsgd")
    lines = lines_of(document)
    assert set(lines) == {("every patient", False)}
    epsilon = lines["every patient", False]["epsilon"]
    assert largest_epsilon(document) == epsilon and 3.0 < epsilon <= 3.0 + CHANNEL_EPSILON
    assert epsilon_in_words(document) == (
        f"ε = {epsilon:.3g} at δ = 1e-05: for one patient of any one site, replace-one, against public, member and"
        " coordinator alike."
    )
    exposure = document["entries"][0]["exposure"]
    assert exposure["steps"] == 40 and exposure["rounds"] == 2 and "every patient took part" in exposure["in_words"]
    assert exposure["released_rows"] == 1000


def test_a_site_with_roles_beside_one_without_names_both_groups() -> None:
    with_roles = replace(CHANNEL, role="release")
    words = epsilon_in_words(stated({"north": [*BOUNDED, with_roles], "south": BOUNDED}))
    assert "every patient of a site that fixed no roles" in words and "fit patients" in words and "0.18" in words


@pytest.mark.parametrize("training", [BOUNDED, UNBOUNDED, NOISED])
def test_a_release_leaves_the_exposure_of_training_as_it_is(training: list[Event]) -> None:
    mode = "none" if training is UNBOUNDED else "constrained"
    before = stated({"north": training}, mode)["entries"][0]["exposure"]
    after = stated({"north": [*training, CHANNEL]}, mode)["entries"][0]["exposure"]
    text = after.pop("released_in_words")
    assert after == before | {"released_rows": 1000}
    for part in ("1000 rows", "1000 patients", "Δ = 4", "σ_z = 4", "σ_z/Δ = 1", "T3", "T5", "T4 is not applied"):
        assert part in text
    assert "role 'all'" in text


def test_the_words_for_a_release_follow_its_constants() -> None:
    def words(**changes: Any) -> str:
        events = [*BOUNDED, replace(CHANNEL, **changes)]
        return stated({"north": events})["entries"][0]["exposure"]["released_in_words"]

    assert "release patients, who took no part in training" in words(role="release")
    assert "T4 applies as well" in words(all_coordinates_noised=True, observation_noise=0.2)
    assert "T4 adds nothing" in words(all_coordinates_noised=True)


def test_too_little_latent_noise_is_infinite_under_the_condition_as_well() -> None:
    document = stated({"north": [*BOUNDED, replace(CHANNEL, latent_noise=0.0)]})
    assert lines_of(document)["every patient", True]["epsilon"] == "infinity"
    assert "added to nothing: ε is infinite" in epsilon_in_words(document)


def test_a_silent_site_in_dpsgd_is_not_said_to_have_sent_updates_without_noise() -> None:
    words = epsilon_in_words(stated({"north": dpsgd_steps(), "mute": []}, "dpsgd"))
    assert "infinite" in words and "no noise" not in words and "sent nothing (mute)" in words


def test_the_largest_of_every_kind_of_line_is_over_all_sites() -> None:
    document = stated({"north": [*BOUNDED, CHANNEL], "south": [*BOUNDED, replace(CHANNEL, rows=2000)]})
    largest = largest_lines(document)
    assert largest["every patient", False] == "infinity"
    assert largest["every patient", True] == pytest.approx(cohort_epsilon(2000, 1000, 1.0, 1e-5), rel=1e-6)
