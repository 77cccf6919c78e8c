import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import chi2

from common.encoding import TableEncoding
from common.errors import CohortiumError
from common.generation import BATCH_ROWS, CHUNK_ROWS, check_rows, sample_prior
from common.model.vae import Decoder
from common.schema import Schema, parse_schema
from common.study import ModelSection
from common.table import Table

SCHEMA = parse_schema(
    {
        "fields": [
            {"name": "age", "type": "number", "constraints": {"minimum": 18, "maximum": 99.5}},
            {"name": "ward", "type": "string", "constraints": {"enum": ["a", "b", "c"]}},
            {"name": "parity", "type": "integer", "constraints": {"minimum": 0, "maximum": 12, "required": True}},
            {"name": "died", "type": "boolean", "constraints": {"required": True}},
            {"name": "day", "type": "date", "constraints": {"minimum": "2020-01-01", "maximum": "2023-12-31"}},
        ]
    }
)
ENCODING = TableEncoding(SCHEMA)
MODEL = ModelSection(latent_dim=3, hidden=(8, 8))


def decoder_of(seed: int = 0, *, constant: bool = False) -> Decoder:
    """A decoder with biases and base of its own; `constant`: θ does not depend on z."""
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(ENCODING, MODEL, generator)
    with torch.no_grad():
        decoder.head.base.copy_(0.2 * torch.randn(decoder.head.base.shape, generator=generator))
        for layer in decoder.network.linears:
            layer.bias.copy_(0.2 * torch.randn(layer.bias.shape, generator=generator))
        if constant:
            decoder.network.linears[-1].weight.zero_()
    return decoder


def rows_of(decoder: Decoder, rows: int, **options: Any) -> np.ndarray:
    return np.vstack([table.values for table in sample_prior(decoder, ENCODING, rows, **options)])


@pytest.mark.parametrize("rows", [0, 1, 5, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, BATCH_ROWS, BATCH_ROWS + 1])
def test_rows_are_counted_exactly_in_batches_of_bounded_size(rows: int) -> None:
    sizes = [len(table) for table in sample_prior(decoder_of(), ENCODING, rows, seed=1)]
    assert sum(sizes) == rows and len(sizes) == math.ceil(rows / BATCH_ROWS)
    assert all(size <= BATCH_ROWS for size in sizes)


def test_memory_does_not_grow_with_the_rows_asked_for() -> None:
    parts = sample_prior(decoder_of(), ENCODING, 10**15, seed=1)
    assert [len(table) for table in itertools.islice(parts, 3)] == [BATCH_ROWS] * 3


def test_every_row_fits_the_schema() -> None:
    values = rows_of(decoder_of(), 5000, seed=2)
    for j, column in enumerate(SCHEMA.columns):
        known = values[~np.isnan(values[:, j]), j]
        assert column.nullable or len(known) == 5000
        if column.is_numeric:
            assert column.minimum <= known.min() and known.max() <= column.maximum
        else:
            assert set(known) <= set(range(len(column.levels)))
        if column.kind != "number":
            assert (known == np.round(known)).all()


def test_a_seed_reproduces_and_no_seed_does_not() -> None:
    decoder = decoder_of()
    one, two = rows_of(decoder, 300, seed=3), rows_of(decoder, 300, seed=3)
    np.testing.assert_array_equal(one, two)
    unlike = [rows_of(decoder, 300, seed=4), rows_of(decoder, 300), rows_of(decoder, 300)]
    for a, b in itertools.combinations([one, *unlike], 2):
        assert not np.array_equal(a, b, equal_nan=True)
    assert not np.array_equal(one[:150], one[150:], equal_nan=True), "rows do not repeat"


def probabilities(decoder: Decoder, latent: torch.Tensor) -> list[np.ndarray]:
    """Mean probability of every level of every block over `latent`, from θ, basis and base by hand."""
    with torch.no_grad():
        theta = decoder(latent).double().numpy()
    base = decoder.head.base.detach().double().numpy() * MODEL.logit_scale
    order = [i for members, _ in decoder.head.logits(torch.zeros(1, decoder.head.width)) for i in members]
    starts = np.cumsum([0, *(block.parameters for block in ENCODING.blocks)])
    found: dict[int, np.ndarray] = {}
    taken = 0
    for i in order:
        block = ENCODING.blocks[i]
        logits = theta[:, starts[i] : starts[i + 1]]
        if block.basis is not None:
            logits = logits @ block.basis.T + base[taken : taken + block.size]
            taken += block.size
        found[i] = softmax(logits, axis=1).mean(axis=0)
    return [found[i] for i in range(len(ENCODING.blocks))]


def chi_square_fits(counts: np.ndarray, share: np.ndarray) -> bool:
    expected = counts.sum() * share
    enough = expected >= 5
    statistic = float(((counts - expected)[enough] ** 2 / expected[enough]).sum())
    return statistic <= 1.2 * float(chi2.isf(1e-6, max(1, int(enough.sum()) - 1)))


@pytest.mark.parametrize("constant", [True, False])
def test_level_frequencies_and_missing_rates_are_those_of_the_decoder(constant: bool) -> None:
    decoder = decoder_of(5, constant=constant)
    rows = 8000
    values = rows_of(decoder, rows, seed=6)
    # For a θ that depends on z: the prior's mean over ten times as many other draws; its error is in the slack of 1.2.
    latent = torch.zeros(1, 3) if constant else torch.randn(80_000, 3, generator=torch.Generator().manual_seed(9))
    age, age_flag, ward, parity, died, day, day_flag = probabilities(decoder, latent)
    missing = np.isnan(values).mean(axis=0)
    for j, rate in ((0, age_flag[1]), (1, ward[3]), (4, day_flag[1])):
        assert missing[j] == pytest.approx(rate, abs=5.5 * math.sqrt(0.25 / rows))
    assert missing[2] == missing[3] == 0
    codes = np.where(np.isnan(values[:, 1]), 3, values[:, 1]).astype(int)
    assert chi_square_fits(np.bincount(codes, minlength=4), ward)
    assert chi_square_fits(np.bincount(values[:, 2].astype(int), minlength=13), parity)
    assert chi_square_fits(np.bincount(values[:, 3].astype(int), minlength=2), died)
    for j, share in ((0, age), (4, day)):
        known = values[~np.isnan(values[:, j]), j]
        bins = ENCODING.columns[j].levels(known)[:, 0]
        assert len(share) == ENCODING.columns[j].blocks[0].size
        if constant and j == 4:  # a number's rounded digits may cross an edge of its bin, a day's cannot
            assert chi_square_fits(np.bincount(bins, minlength=len(share)), share)
        gaps = np.abs(np.cumsum(np.bincount(bins, minlength=len(share))) / len(known) - np.cumsum(share))
        # Missing and value are dependent through z, so only a fixed θ has the same shares among the known ones.
        assert not constant or gaps.max() <= 2.7 / math.sqrt(len(known))


def broken(column: str, value: float) -> Table:
    values = np.array([[50.0, 1, 3, 0, 18500], [math.nan, math.nan, 0, 1, math.nan]])
    check_rows(Table(SCHEMA, values))
    values[1, SCHEMA.index(column)] = value
    return Table(SCHEMA, values)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("age", 17.999),
        ("age", 99.51),
        ("age", math.inf),
        ("ward", -1),
        ("ward", 3),
        ("ward", 0.5),
        ("parity", math.nan),
        ("parity", 2.5),
        ("parity", 13),
        ("died", 2),
        ("died", math.nan),
        ("day", 18500.5),
        ("day", 0),
    ],
)
def test_a_row_that_breaks_the_schema_is_a_defect(column: str, value: float) -> None:
    with pytest.raises(CohortiumError, match=f"column '{column}' breaks the schema"):
        check_rows(broken(column, value))


@pytest.mark.parametrize(
    "fields",
    [
        [{"name": "x", "type": "number", "constraints": {"minimum": 0, "maximum": 1e-9, "required": True}}],
        [{"name": "x", "type": "number", "cohortium:scale": "log", "constraints": {"minimum": 0, "maximum": 1e12}}],
        [{"name": "x", "type": "integer", "constraints": {"minimum": -(10**12), "maximum": 10**12}}],
        [{"name": "x", "type": "string", "constraints": {"enum": ["only"], "required": True}}],
        [{"name": "x", "type": "boolean"}, {"name": "y", "type": "boolean", "constraints": {"required": True}}],
    ],
)
def test_small_and_extreme_schemas(fields: list[dict[str, Any]]) -> None:
    schema: Schema = parse_schema({"fields": fields})
    encoding = TableEncoding(schema)
    decoder = Decoder(encoding, MODEL, torch.Generator().manual_seed(0))
    (table,) = sample_prior(decoder, encoding, 1500, seed=1)
    assert table.values.shape == (1500, len(fields))
