"""Synthetic rows from latent codes through a decoder; from the latent prior in batches of constant memory."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from common.encoding import TableEncoding
from common.errors import CohortiumError
from common.model.vae import Decoder
from common.table import Table

BATCH_ROWS = 16_384
# Within a batch the networks run on so few rows that their logits stay in the processor's cache.
CHUNK_ROWS = 1024


def sample_prior(decoder: Decoder, encoding: TableEncoding, rows: int, seed: int | None = None) -> Iterator[Table]:
    """Yield `rows` synthetic rows in tables of at most `BATCH_ROWS`.

    z ~ N(0, I), θ = g(z), levels ~ p(· | θ), values uniform within their levels.
    `seed=None` seeds the generators from the operating system's CSPRNG. Given the decoder's weights this is
    post-processing: it costs no privacy (privacy.md, section 2, scope iv).
    """
    seed = secrets.randbits(63) if seed is None else seed
    generator = torch.Generator().manual_seed(seed)
    uniform = np.random.Generator(np.random.PCG64(seed))
    latent_dim = decoder.network.linears[0].in_features
    for start in range(0, rows, BATCH_ROWS):
        latent = torch.randn(min(BATCH_ROWS, rows - start), latent_dim, generator=generator)
        yield decode_latent(decoder, encoding, latent, generator, uniform)


def decode_latent(
    decoder: Decoder,
    encoding: TableEncoding,
    latent: Tensor,
    generator: torch.Generator,
    uniform: np.random.Generator,
) -> Table:
    """One synthetic row a latent code (n, latent_dim), float32; checked against the schema."""
    decoder = decoder.cpu().eval()
    with torch.inference_mode():
        levels = torch.cat([decoder.head.sample(decoder(chunk), generator) for chunk in latent.split(CHUNK_ROWS)])
    table = encoding.decode(levels.numpy(), uniform.random((len(latent), len(encoding.columns))))
    check_rows(table)
    return table


def check_rows(table: Table) -> None:
    """Every value against its column: bounds, whole numbers, declared levels, missing only where allowed.

    Encodings guarantee this by construction; a violation is a defect and raises `CohortiumError` naming the column.
    """
    for j, column in enumerate(table.schema.columns):
        values = table.values[:, j]
        missing = np.isnan(values)
        known = values[~missing]
        low, high = (column.minimum, column.maximum) if column.is_numeric else (0.0, len(column.levels) - 1.0)
        whole = column.kind != "number"
        if (missing.any() and column.required) or (
            known.size and (known.min() < low or known.max() > high or (whole and (known != np.floor(known)).any()))
        ):
            raise CohortiumError(
                f"a synthetic value of column {column.name!r} breaks the schema",
                fix="this is a defect of the encoding; report it. Nothing was released",
            )
