from typing import Any

import pytest

from common.digest import sha256_of
from common.errors import StudyError
from common.gates import limits_in_words
from common.gates_section import DECLARED, GatesSection
from common.schema import parse_schema
from common.study import Protocol, Study

SCHEMA = {"fields": [{"name": "died", "type": "boolean", "constraints": {"required": True}}]}
KEY = "ab" * 32


def protocol_of(gates: dict[str, Any] | None = None, **sections: Any) -> Protocol:
    document: dict[str, Any] = {"study": {"name": "s", "schema": "schema.json"}, **sections}
    if gates is not None:
        document["gates"] = gates
    return Protocol(Study.model_validate(document), parse_schema(SCHEMA))


def test_a_study_without_gates_keeps_the_digest_it_had_before_there_were_any() -> None:
    plain = protocol_of()
    document = plain.study.document()
    document["study"].pop("schema")
    assert document.pop("gates") == GatesSection().model_dump(mode="json")
    assert plain.digest == sha256_of({"study": document, "schema": SCHEMA})
    assert protocol_of({}).digest == protocol_of(GatesSection().model_dump(mode="json")).digest == plain.digest
    assert Protocol.from_json(plain.to_json()).digest == plain.digest


@pytest.mark.parametrize(
    "gates",
    [
        {"min_sites": 2},
        {"min_patients": 2},
        {"min_patients_per_site": 1},
        {"max_copies": 0.0},
        {"max_singling_out": 0.09},
        {"max_linkability": 0.09},
        {"max_inference": 0.09},
        {"max_membership": 0.09},
        {"audit": True},
        {"override_keys": [KEY]},
    ],
)
def test_every_key_is_part_of_what_sites_approve(gates: dict[str, Any]) -> None:
    changed = protocol_of(gates)
    assert changed.digest != protocol_of().digest
    assert Protocol.from_json(changed.to_json()).digest == changed.digest
    declared = {DECLARED[key] for key in gates if key in DECLARED}
    assert set(changed.study.gates.declared) == declared
    assert any("look at patients" in line for line in limits_in_words(changed.study)) == bool(declared)


@pytest.mark.parametrize(
    ("gates", "sections", "words"),
    [
        ({"max_epsilon": 3.0}, {}, "could never be kept"),
        ({"max_epsilon": 3.0}, {"training": {"mode": "none"}}, "could never be kept"),
        ({"min_sites": 3}, {"sites": {"a": 10, "b": 10}}, "declares 2"),
        ({"min_patients": 21}, {"sites": {"a": 10, "b": 10}}, "declares 20 patients"),
        ({"override_keys": [KEY, KEY]}, {}, "twice"),
    ],
)
def test_a_gate_that_nothing_could_pass_is_refused(gates: dict[str, Any], sections: dict[str, Any], words: str) -> None:
    with pytest.raises(StudyError, match=words):
        protocol_of(gates, **sections)


@pytest.mark.parametrize(
    "gates",
    [
        {"certificate": False}, {"ledgers": False}, {"max_copies": 1.1}, {"max_copies": True}, {"audit": 1},
        {"min_sites": 0}, {"override_keys": ["abc"]}, {"max_epsilon": float("inf")},
    ],
)  # fmt: skip
def test_nothing_switches_off_what_every_release_has(gates: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="gates"):
        protocol_of(gates)


def test_a_budget_is_possible_where_the_training_has_noise() -> None:
    noised = protocol_of({"max_epsilon": 3.0}, training={"mode": "dpsgd"}, privacy={"epsilon": 2.0, "max_epsilon": 9.0})
    assert "budget: no site's epsilon above 3" in limits_in_words(noised.study)
