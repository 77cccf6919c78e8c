from __future__ import annotations

from typing import Any

import pytest

from common.errors import StudyError
from common.study import Protocol, Study
from tests.common.anchor.anchored import SCHEMA, protocol


def of(**sections: Any) -> Protocol:
    document: dict[str, Any] = {"study": {"name": "s", "schema": "schema.json"}} | sections
    return Protocol(Study.model_validate(document), SCHEMA)


def test_an_anchored_study_has_no_rounds_without_saying_so() -> None:
    assert of(training={"mode": "anchored"}, anchor={"epsilon": 3.0}).study.training.rounds == 0
    assert of(training={"mode": "constrained"}, anchor={"epsilon": 3.0}).study.training.rounds == 40


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"mode": "anchored"}}, r"\[anchor\] epsilon is missing"),
        ({"training": {"mode": "anchored", "rounds": 5}, "anchor": {"epsilon": 3.0}}, "rounds = 5 does not go"),
        ({"training": {"rounds": 0}, "anchor": {"epsilon": 3.0}}, "rounds = 0 does not go"),
        ({"training": {"mode": "none"}, "anchor": {"epsilon": 3.0}}, "without any protection"),
        ({"anchor": {"generator": "copula"}}, "settings and no epsilon"),
        ({"anchor": {"epsilon": 3.0, "generator": "copula"}}, 'needs training.mode = "anchored"'),
        (
            {
                "training": {"mode": "anchored"},
                "anchor": {"epsilon": 3.0},
                "release": {"method": "channel"},
                "channel": {"epsilon": 1.0},
            },
            "encoders at the sites",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        of(**sections)


@pytest.mark.parametrize("epsilon", [0, -1, float("inf"), float("nan"), "many"])
def test_epsilon_is_positive_and_finite(epsilon: Any) -> None:
    with pytest.raises(ValueError, match="epsilon"):
        Study.model_validate(
            {"study": {"name": "s", "schema": "x"}, "training": {"mode": "anchored"}, "anchor": {"epsilon": epsilon}}
        )


def test_the_digest_depends_on_it() -> None:
    assert protocol(3.0).digest != protocol(2.0).digest
    assert Protocol.from_json(protocol(3.0).to_json()) == protocol(3.0)
