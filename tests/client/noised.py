"""Studies in the mode dpsgd for the tests of its steps, rounds and audit."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from client.trainers import MODES, RoundInputs, RoundResult
from common.privacy.noise import RandomNumbers
from common.schema import Schema, parse_schema
from common.study import Study
from common.table import Table

SCHEMA = parse_schema(
    {
        "fields": [
            {"name": "age", "type": "number", "constraints": {"minimum": 0, "maximum": 100}},
            {"name": "ward", "type": "string", "constraints": {"enum": list("abcd"), "required": True}},
            {"name": "dead", "type": "boolean"},
        ]
    }
)
COIN = parse_schema({"fields": [{"name": "dead", "type": "boolean", "constraints": {"required": True}}]})
BETA = 0.9  # of Adam: after its first step the first moment is (1 - BETA) times the gradient
DECODER_BOUND, ENCODER_BOUND, RADIUS, CLIP = 15.0, 3.0, 0.3, 0.7


def make_study(seed: int | None = 5, *, privacy: Mapping[str, Any] | None = None, **training: Any) -> Study:
    return Study.model_validate(
        {
            "study": {"name": "s", "schema": "schema.json", "seed": seed},
            "model": {
                "latent_dim": 3,
                "hidden": [16, 16],
                "decoder_lipschitz": DECODER_BOUND,
                "encoder_lipschitz": ENCODER_BOUND,
            },
            "training": {
                "mode": "dpsgd",
                "rounds": 4,
                "local_epochs": 2,
                "batch_size": 32,
                "learning_rate": 0.02,
                "update_norm": RADIUS,
                "gradient_clip": CLIP,
                **training,
            },
            "privacy": {"epsilon": 3.0, **(privacy or {})},
        }
    )


def make_table(rows: int, seed: int = 0, schema: Schema = SCHEMA) -> Table:
    random = np.random.default_rng(seed)
    ward = random.integers(0, 4, rows).astype(float)
    age = np.clip(20 + 20 * ward + random.normal(0, 5, rows), 0, 100)
    age[random.random(rows) < 0.1] = np.nan
    return Table(schema, np.column_stack([age, ward, (random.random(rows) < ward / 4).astype(float)]))


def run(inputs: RoundInputs) -> RoundResult:
    return MODES["dpsgd"].train(inputs)


def flat(arrays: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([arrays[name].double().flatten() for name in sorted(arrays)])


def gradient(result: RoundResult) -> Tensor:
    """The noised, divided gradient of a study of one step, read from Adam's first moment."""
    prefix = "adam.exp_avg."
    return flat({n.removeprefix(prefix): a for n, a in result.state.items() if n.startswith(prefix)}) / (1 - BETA)


class Chosen(RandomNumbers):
    """A given sample, and no noise: what the mechanism does apart from its randomness."""

    def __init__(self, chosen: list[int]) -> None:
        super().__init__(0)
        self.chosen = np.array(chosen, dtype=np.int64)

    def sample(self, size: int, probability: float) -> np.ndarray:
        return self.chosen

    def normal(self, size: int) -> np.ndarray:
        return np.zeros(size)


def one_step(seed: int | None = 5, privacy: Mapping[str, Any] | None = None, **training: Any) -> Study:
    return make_study(seed, privacy=privacy, **({"rounds": 1, "local_epochs": 1, "batch_size": 40} | training))
