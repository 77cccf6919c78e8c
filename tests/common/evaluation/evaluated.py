"""A small study with an evaluation, and patients of it, for the tests of counting."""

from __future__ import annotations

from typing import Any

import numpy as np

from common.schema import parse_schema
from common.study import Protocol, Study
from common.table import Table

SCHEMA = parse_schema(
    {
        "fields": [
            {"name": "age", "type": "number", "constraints": {"required": True, "minimum": 18, "maximum": 98}},
            {"name": "creatinine", "type": "number", "constraints": {"minimum": 0.1, "maximum": 20}},
            {"name": "sex", "type": "string", "constraints": {"required": True, "enum": ["f", "m"]}},
            {"name": "stage", "type": "string", "constraints": {"enum": ["I", "II", "III"]}},
            {"name": "died", "type": "boolean"},
        ],
        "cohortium:target": "died",
    }
)


def evaluated_protocol(**evaluation: Any) -> Protocol:
    settings = {"method": "accounted", "holdout": 0.25, "groups": ["sex"]} | evaluation
    return Protocol(Study.model_validate({"study": {"name": "s", "schema": "s.json"}, "evaluation": settings}), SCHEMA)


def patients(rows: int, seed: int) -> Table:
    """Rows whose outcome depends on age and stage, with missing values."""
    rng = np.random.default_rng(seed)
    age = rng.uniform(18, 98, rows)
    stage = rng.integers(0, 3, rows).astype(float)
    logit = (age - 60) / 12 + stage - 1
    died = (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(float)
    values = np.column_stack([age, rng.gamma(2, 0.7, rows).clip(0.1, 20), rng.integers(0, 2, rows), stage, died])
    for column, gone in ((1, 0.2), (3, 0.1), (4, 0.05)):
        values[rng.random(rows) < gone, column] = np.nan
    return Table(SCHEMA, values)
