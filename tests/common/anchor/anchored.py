"""A schema with every kind of column, and patients of it, for the tests of the anchor."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.encoding import TableEncoding
from common.schema import parse_schema
from common.study import Protocol, Study
from common.table import Table

SCHEMA = parse_schema(
    {
        "fields": [
            {"name": "dead", "type": "boolean", "constraints": {"required": True}},
            {"name": "age", "type": "integer", "constraints": {"minimum": 18, "maximum": 98, "required": True}},
            {"name": "crea", "type": "number", "constraints": {"minimum": 0, "maximum": 14}, "cohortium:scale": "log"},
            {"name": "ward", "type": "string", "constraints": {"enum": ["a", "b", "c", "d"], "required": True}},
            {"name": "smoker", "type": "string", "constraints": {"enum": ["no", "yes"]}},
            {"name": "grade", "type": "integer", "constraints": {"minimum": 0, "maximum": 2}},
        ],
        "cohortium:target": "dead",
    }
)


def protocol(epsilon: float | None = 3.0, rounds: int = 0, seed: int | None = 1, **sections: Any) -> Protocol:
    mode = "anchored" if rounds == 0 else "constrained"
    document: dict[str, Any] = {
        "study": {"name": "s", "schema": "schema.json", "seed": seed},
        "model": {"latent_dim": 4, "hidden": [16], "decoder_lipschitz": 20.0},
        "training": {"mode": mode, "rounds": rounds, "batch_size": 64},
        "anchor": {"epsilon": epsilon},
        "release": {"rows": 500},
    }
    for name, values in sections.items():
        document[name] = document.get(name, {}) | values
    return Protocol(Study.model_validate(document), SCHEMA)


def patients(rows: int, seed: int) -> Table:
    """Patients in whom age, creatinine and ward go with death, and missing values with the ward."""
    rng = np.random.default_rng(seed)
    illness = rng.normal(size=rows)
    age = np.clip(np.round(60 + 12 * rng.normal(size=rows) + 4 * illness), 18, 98)
    crea = np.clip(np.exp(0.2 + 0.5 * illness + 0.3 * rng.normal(size=rows)), 0, 14)
    ward = np.clip(np.digitize(illness + 0.5 * rng.normal(size=rows), [-0.8, 0.2, 1.2]), 0, 3).astype(float)
    dead = (rng.random(rows) < 1 / (1 + np.exp(-(1.5 * illness + 0.05 * (age - 60))))).astype(float)
    smoker = (rng.random(rows) < 0.3).astype(float)
    smoker[rng.random(rows) < np.where(ward == 3, 0.6, 0.1)] = np.nan
    crea[rng.random(rows) < 0.15] = np.nan
    grade = rng.integers(0, 3, rows).astype(float)
    grade[rng.random(rows) < 0.5] = np.nan
    return Table(SCHEMA, np.column_stack([dead, age, crea, ward, smoker, grade]))


def levels_of(table: Table) -> NDArray[np.int64]:
    return TableEncoding(table.schema).encode(table).levels.numpy()


def corners() -> Table:
    """Every combination of the ends of all columns, missing values included where they may be."""
    ends = []
    for column in SCHEMA.columns:
        low, high = (column.minimum, column.maximum) if column.is_numeric else (0.0, len(column.levels) - 1.0)
        ends.append([low, high] if column.required else [low, high, np.nan])
    return Table(SCHEMA, np.array(np.meshgrid(*ends)).reshape(len(ends), -1).T)
