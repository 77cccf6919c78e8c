"""The format of privacy.json: what does not fit is refused, and the published schema is the one in the code."""

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from common.privacy.events import BoundedInfluence, ChannelRelease, GaussianUpdate
from common.privacy.statement import privacy_statement
from common.privacy.statement_schema import SCHEMA_FILE, SCHEMA_VERSION, json_schema, problem_of, schema_text
from common.schema import parse_schema
from common.study import Protocol, Study


@pytest.fixture
def document() -> dict[str, Any]:
    """A statement with a finite, an infinite and a conditional ε."""
    schema = parse_schema({"fields": [{"name": "x", "type": "boolean"}]})
    study = Study.model_validate({"study": {"name": "trial", "schema": "s.json"}})
    events = {
        "north": [GaussianUpdate(1, 1.0, 6.3, 0.5)],
        "south": [BoundedInfluence(1, 1.0, 0.5), ChannelRelease(2, 100, 100, 4.0, 4.0, 0.0, 20.0, False)],
    }
    return privacy_statement(Protocol(study, schema), events, {"north": 100, "south": 100})


def test_what_is_written_fits(document: dict[str, Any]) -> None:
    assert problem_of(document) is None
    assert problem_of(json.loads(json.dumps(document, allow_nan=False))) is None
    assert document["schema_version"] == SCHEMA_VERSION == 3
    Draft202012Validator(json_schema()).validate(document)


def test_the_published_schema_is_the_one_in_the_code() -> None:
    text = SCHEMA_FILE.read_text(encoding="utf-8")
    assert text == schema_text(), "run `python -m common.privacy.statement_schema`"
    schema = json.loads(text)
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_every_field_of_the_schema_is_described_and_closed() -> None:
    schema = json_schema()
    for model in (schema, *schema["$defs"].values()):
        assert model["additionalProperties"] is False
        assert all(field.get("description") for field in model["properties"].values())


def entry(document: dict[str, Any]) -> dict[str, Any]:
    return document["entries"][0]


def line(document: dict[str, Any]) -> dict[str, Any]:
    return entry(document)["lines"][0]


# In words of JSON Schema as well as in ours.
BROKEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "negative epsilon": lambda d: line(d).update(epsilon=-0.1),
    "epsilon in letters": lambda d: line(d).update(epsilon="3.0"),
    "another infinity": lambda d: line(d).update(epsilon="inf"),
    "no epsilon": lambda d: entry(d).pop("epsilon"),
    "no delta": lambda d: entry(d).pop("delta"),
    "delta of one": lambda d: entry(d).update(delta=1.0),
    "unknown adversary": lambda d: entry(d).update(adversary="insider"),
    "no adversary": lambda d: entry(d).pop("adversary"),
    "no unit": lambda d: d.pop("unit"),
    "empty relation": lambda d: d.update(neighbouring_relation=""),
    "unknown accountant": lambda d: line(d).update(accountant="hope"),
    "no accountant": lambda d: line(d).pop("accountant"),
    "empty basis": lambda d: line(d).update(basis=""),
    "unknown population": lambda d: line(d).update(applies_to="some patients"),
    "extra key": lambda d: d.update(note="fine"),
    "extra key of an entry": lambda d: entry(d).update(note="fine"),
    "extra key of a line": lambda d: line(d).update(note="fine"),
    "extra key of the exposure": lambda d: entry(d)["exposure"].update(loss=1.0),
    "no lines": lambda d: entry(d).update(lines=[]),
    "conditional entry": lambda d: entry(d).update(conditional=True),
    "another version": lambda d: d.update(schema_version=1),
    "unknown mode": lambda d: d.update(mode="magic"),
    "negative rows": lambda d: entry(d)["exposure"].update(released_rows=-1),
    "digest": lambda d: d.update(study_digest="abc"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_is_refused_by_models_and_schema(document: dict[str, Any], name: str) -> None:
    broken = copy.deepcopy(document)
    BROKEN[name](broken)
    assert problem_of(broken) is not None
    assert not Draft202012Validator(json_schema()).is_valid(broken)


# What only the models check, because JSON has no such number or the rule spans fields.
INCONSISTENT: dict[str, Callable[[dict[str, Any]], object]] = {
    "NaN": lambda d: line(d).update(epsilon=math.nan),
    "infinite number": lambda d: line(d).update(epsilon=math.inf),
    "NaN in the exposure": lambda d: entry(d)["exposure"].update(update_norm=math.nan),
    "finite without accountant": lambda d: line(d).update(accountant="none"),
    "infinite with accountant": lambda d: line(d).update(epsilon="infinity"),
    "condition without being conditional": lambda d: line(d).update(condition="given that"),
    "conditional without condition": lambda d: line(d).update(conditional=True),
    "smaller than its line": lambda d: entry(d).update(epsilon=0.01),
    "only conditional lines": lambda d: [one.update(conditional=True, condition="if") for one in entry(d)["lines"]],
    "an entry twice": lambda d: d["entries"].append(entry(d)),
}


@pytest.mark.parametrize("name", INCONSISTENT)
def test_what_contradicts_itself_is_refused(document: dict[str, Any], name: str) -> None:
    INCONSISTENT[name](document)
    assert problem_of(document) is not None


def test_the_problem_names_the_place(document: dict[str, Any]) -> None:
    entry(document)["adversary"] = "insider"
    problem = problem_of(document)
    assert problem is not None and problem.startswith("entries.0.adversary: ")


@pytest.mark.parametrize("document_", [None, [], "text", {}, 3])
def test_what_is_no_statement_at_all_is_refused(document_: object) -> None:
    assert problem_of(document_) is not None
