import json
from collections.abc import Iterator
from typing import Any

import pytest

from common.privacy.events import BoundedInfluence, Event, GaussianUpdate, UnboundedInfluence
from common.privacy.statement import ADVERSARIES, ASSUMPTIONS, epsilon_in_words, largest_epsilon, privacy_statement
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
    assert len(found) == len(EVENTS) * len(ADVERSARIES) and set(found) == {"infinity"}
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
