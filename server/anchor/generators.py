"""From the noised statistics to a generator: the copula, the certified decoder trained on its rows, and a choice.

Everything is post-processing of accounted messages: it may take as long and as many rows as it likes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from common.encoding import TableEncoding
from common.generation import sample_prior
from common.model.training import RoundInputs, train_locally
from common.model.vae import Decoder
from common.privacy.anchor import STEPS, anchor_event
from common.study import Protocol
from common.table import Table
from server.anchor.copula import Copula
from server.anchor.fit import fit_copula
from server.anchor.statistics import Statistics
from server.checkpoint import build_decoder

TRAINING_ROWS = 20_000
EPOCHS = 16
BATCH = 128
COMPARED_ROWS = 20_000
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Anchored:
    """Both generators of one study, and which is nearer to the noised statistics (see `Statistics.distance`)."""

    protocol: Protocol
    copula: Copula
    decoder: Decoder
    report: dict[str, Any]

    def line(self) -> dict[str, Any]:
        """The one line of rounds.jsonl of a study without rounds: round 0, the certificate, who answered both steps."""
        sites = self.report["sites"]
        return {
            "round": 0,
            "answered": [site for site in sites["marginals"] if site in sites["moments"]],
            "dropped": {},
            "certificate": self.report["decoder_certificate"],
            "step_norm": 0.0,
            "seconds": 0.0,
            "server_seconds": 0.0,
        }

    @property
    def generator(self) -> str:
        """ "copula" or "decoder": what the study says, or the nearer one."""
        return str(self.report["generator"])

    def sample(self, rows: int, seed: int) -> Iterator[Table]:
        """Rows of the chosen generator."""
        return self.copula.sample(rows, seed) if self.generator == "copula" else self.decoder_rows(rows, seed)

    def decoder_rows(self, rows: int, seed: int) -> Iterator[Table]:
        """Rows of the decoder's prior, whichever generator was chosen."""
        return sample_prior(self.decoder, TableEncoding(self.protocol.schema), rows, seed)


def make_generators(statistics: Statistics, seed: int) -> Anchored:
    """Fit the copula, train the decoder on its rows, certify it, and compare both with the noised statistics."""
    protocol, study = statistics.protocol, statistics.protocol.study
    wide = statistics.wide_columns()
    for name in wide:
        log.warning(
            "column %r: the noised counts fill a tenth of its declared range; narrower bounds would say more", name
        )
    fit = fit_copula(statistics.features, statistics.marginals, statistics.moments, seed)
    decoder = train_decoder(protocol, fit.copula, seed)
    certificate = decoder.require_certificate(study.model.decoder_lipschitz)
    distances = {
        "copula": _distance(statistics, fit.copula.sample(COMPARED_ROWS, seed + 1)),
        "decoder": _distance(
            statistics, sample_prior(decoder, TableEncoding(protocol.schema), COMPARED_ROWS, seed + 1)
        ),
    }
    chosen = study.anchor.generator
    if study.training.rounds > 0:
        chosen = "decoder"
    elif chosen == "nearest":
        chosen = min(sorted(distances), key=lambda name: (distances[name], name == "copula"))
    report = {
        "schema_version": 1,
        "epsilon": study.anchor.epsilon,
        "delta": study.privacy.delta,
        "unit": "one patient (one row)",
        "neighbouring_relation": "replacing the content of one patient slot at one site; patient numbers are public",
        "adversary": "public, member and coordinator alike: every site adds its own noise",
        "randomness": "as if: fixed seed" if study.study.seed is not None else "the operating system's generator",
        "noise_multipliers": {step: anchor_event(study, step).noise_multiplier for step in STEPS},
        "values": {"marginals": statistics.counts.size, "moments": len(statistics.second.values)}
        if statistics.second
        else {},
        "radius": statistics.features.radius,
        "features": statistics.features.size,
        # In units of a correlation with the target's weight, and of one between two other columns.
        "noise_of_a_correlation": statistics.noise("moments") / math.sqrt(2.0) / statistics.first.total,
        "sites": {"marginals": dict(statistics.first.patients), "moments": dict(statistics.second.patients)}
        if statistics.second
        else {},
        "wide_columns": wide,
        "copula_largest_singular_value": fit.copula.largest_singular_value,
        "decoder_certificate": certificate,
        "distance_to_statistics": distances,
        "generator": chosen,
    }
    return Anchored(protocol, fit.copula, decoder, report)


def train_decoder(protocol: Protocol, copula: Copula, seed: int) -> Decoder:
    """The study's decoder, trained with a fresh encoder on rows of the copula under the study's Lipschitz bounds."""
    training = protocol.study.training.model_copy(update={"rounds": 1, "local_epochs": EPOCHS, "batch_size": BATCH})
    study = protocol.study.model_copy(update={"training": training})
    encoding = TableEncoding(protocol.schema)
    rows = np.vstack([table.values for table in copula.sample(TRAINING_ROWS, seed)])
    start = build_decoder(protocol, seed).arrays()
    data = encoding.encode(Table(protocol.schema, rows))
    inputs = RoundInputs(study, encoding, data, start, 1, {}, seed, torch.device("cpu"))
    # Networks this small gain nothing from a second thread, and on a busy machine lose minutes waiting for it.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train_locally(inputs, constrained=True).decoder
    finally:
        torch.set_num_threads(threads)


def _distance(statistics: Statistics, tables: Iterator[Table]) -> float:
    encoding = TableEncoding(statistics.protocol.schema)
    return statistics.distance(np.vstack([encoding.encode(table).levels.numpy() for table in tables]))
