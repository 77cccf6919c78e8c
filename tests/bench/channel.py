"""Quality against ε: rows of the stochastic channel, at several targets and radii, beside rows of the latent prior.

The networks are trained once a seed, federated, in this process; then every release is made from the same ones, so that
the differences are the channel's. ε is that of each site's rows at the study's δ, one patient, replace-one, conditional
on the encoder and decoder: constrained training without noise adds an infinite ε for the weights.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from client.generation import ChannelInputs, channel_rows, synthetic_encoder
from client.trainers import MODES, RoundInputs
from common.encoding import TableEncoding
from common.evaluation.metrics import evaluate
from common.generation import sample_prior
from common.model.training import load_encoder
from common.model.vae import Decoder
from common.privacy.channel_release import channel_event, release_patients
from common.study import Protocol
from common.table import Table
from server.checkpoint import build_decoder
from server.rows import share_rows
from server.strategy import LipschitzFedAvg, Member
from server.witness import Witness
from tests.bench.inputs import Inputs, load_inputs, protocol_for
from tests.bench.quality import scores_of

METRICS = ("gb", "lr", "ks", "tv", "correlation")


def run(arguments: argparse.Namespace) -> None:
    inputs = load_inputs(arguments.data)
    torch.set_num_threads(1)
    scores: dict[tuple[str, str], list[dict[str, float]]] = {}
    noise: dict[tuple[str, str], list[float]] = {}
    for seed in range(arguments.seeds):
        overrides = [*arguments.overrides, f"study.seed={seed}", f"release.rows={arguments.rows}"]
        protocol = protocol_for(inputs.folder, overrides)
        encoding = TableEncoding(protocol.schema)
        decoder, states = train(protocol, encoding, inputs)
        prior = np.vstack([t.values for t in sample_prior(decoder, encoding, arguments.rows, seed)])
        scores.setdefault(("prior", ""), []).append(_scores(prior, inputs, seed))
        for radius in arguments.radius:
            for epsilon in arguments.epsilon:
                key = (f"channel, R = {radius:g}", f"{epsilon:g}")
                chosen = [f"channel.epsilon={epsilon}", f"channel.latent_radius={radius}", "release.method=channel"]
                variant = protocol_for(inputs.folder, [*overrides, *chosen])
                rows, ratios = release(variant, encoding, inputs, decoder, states)
                scores.setdefault(key, []).append(_scores(rows, inputs, seed))
                noise.setdefault(key, []).extend(ratios)
                print(seed, *key, scores[key][-1], flush=True)
    print(_markdown(inputs, arguments, scores, noise))


def train(protocol: Protocol, encoding: TableEncoding, inputs: Inputs) -> tuple[Decoder, dict[str, dict[str, Tensor]]]:
    """The rounds of the study without Flower: the global decoder, and what every site keeps."""
    study = protocol.study
    data = {name: encoding.encode(table) for name, table in inputs.sites.items()}
    states: dict[str, dict[str, Tensor]] = {name: {} for name in data}
    seed = study.study.seed or 0
    decoder = build_decoder(protocol, seed)
    members = tuple(Member(i, name, len(rows)) for i, (name, rows) in enumerate(data.items()))
    with tempfile.TemporaryDirectory() as scratch:
        witness = Witness(Path(scratch) / "heads.json", Ed25519PrivateKey.generate())
        strategy = LipschitzFedAvg(protocol, decoder, members, lambda report, current: None, witness)
    trainer = MODES[study.training.mode]
    for number in range(1, study.training.rounds + 1):
        arrays, updates = decoder.arrays(), {}
        for i, (name, rows) in enumerate(data.items()):
            own = seed * 1_000_003 + number * 1009 + i
            result = trainer.train(
                RoundInputs(study, encoding, rows, arrays, number, states[name], own, torch.device("cpu"))
            )
            states[name], updates[name] = dict(result.state), result.update
        strategy.aggregate(updates)
    return decoder, states


def release(
    protocol: Protocol, encoding: TableEncoding, inputs: Inputs, decoder: Decoder, states: dict[str, dict[str, Tensor]]
) -> tuple[np.ndarray, list[float]]:
    """The pooled rows of all sites, and the standard deviation of the noise over that of the prior, site by site."""
    study, parts, ratios = protocol.study, [], []
    members = [Member(i, name, len(table)) for i, (name, table) in enumerate(inputs.sites.items())]
    shares = share_rows(study.release.rows, members)
    for i, (name, table) in enumerate(inputs.sites.items()):
        assert release_patients(len(table), study.channel.release_share) == len(table), "no roles in this benchmark"
        event = channel_event(study, encoding.diameter, len(table), shares[name])
        seed = (study.study.seed or 0) * 1_000_003 + i
        encoder = (
            synthetic_encoder(decoder, encoding, study, seed)
            if study.channel.encoder == "synthetic"
            else load_encoder(encoding, study, states[name])
        )
        parts.append(
            channel_rows(ChannelInputs(study, encoding, encoding.encode(table), encoder, decoder, event, seed))
        )
        ratios.append(event.latent_noise)
    return np.vstack(parts), ratios


def _scores(rows: np.ndarray, inputs: Inputs, seed: int) -> dict[str, float]:
    metrics: dict[str, Any] = evaluate(Table(inputs.schema, rows), inputs.pooled, inputs.test, seed, thorough=False)
    found = scores_of(metrics, seconds=0.0)
    return {name: found[name] for name in METRICS}


def _markdown(
    inputs: Inputs,
    arguments: argparse.Namespace,
    scores: dict[tuple[str, str], list[dict[str, float]]],
    noise: dict[tuple[str, str], list[float]],
) -> str:
    lines = [
        f"\n{inputs.folder.name}: {arguments.rows} rows, {arguments.seeds} seeds, mean; ε of one patient at the study's"
        " δ, replace-one, conditional on the encoder and decoder\n",
        "| release | ε of the rows | latent noise σ_z | TSTR gb | TSTR lr | KS | TV | Δcorr |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key, runs in scores.items():
        cells = [f"{np.mean([run[metric] for run in runs]):.3f}" for metric in METRICS]
        spread = f"{min(noise[key]):.2f}-{max(noise[key]):.2f}" if key in noise else ""
        lines.append(f"| {key[0]} | {key[1]} | {spread} | {' | '.join(cells)} |")
    return "\n".join(lines)
