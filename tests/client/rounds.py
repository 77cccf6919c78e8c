"""What a trainer is handed for one round, for the tests of every mode."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from client.trainers import RoundInputs
from common.encoding import TableEncoding
from common.model.vae import Decoder
from common.study import Study
from common.table import Table


def round_inputs(study: Study, table: Table, number: int = 1, seed: int = 7, **rest: Any) -> RoundInputs:
    """Round `number` from a fixed decoder, without state; `rest` replaces fields."""
    encoding = TableEncoding(table.schema)
    start = Decoder(encoding, study.model, torch.Generator().manual_seed(99), constrained=study.training.mode != "none")
    values: dict[str, Any] = {
        "study": study,
        "encoding": encoding,
        "data": encoding.encode(table),
        "decoder": start.arrays(),
        "round": number,
        "state": {},
        "seed": seed,
        "device": torch.device("cpu"),
    }
    return RoundInputs(**(values | rest))


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
