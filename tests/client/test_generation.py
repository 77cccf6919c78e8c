import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import client.generation
from client.generation import ChannelInputs, bounded_codes, channel_rows, synthetic_encoder
from common.encoding import EncodedTable, TableEncoding
from common.generation import check_rows
from common.model.vae import Decoder, Encoder
from common.privacy.channel_release import channel_event, latent_scale
from common.schema import parse_schema
from common.study import Study
from common.table import Table

SCHEMA = parse_schema(
    {
        "fields": [
            {"name": "age", "type": "number", "constraints": {"minimum": 0, "maximum": 100}},
            {"name": "visits", "type": "integer", "constraints": {"minimum": 0, "maximum": 9, "required": True}},
            {"name": "ward", "type": "string", "constraints": {"enum": list("abcd")}},
            {"name": "day", "type": "date", "constraints": {"minimum": "2020-01-01", "maximum": "2020-12-31"}},
        ]
    }
)
ENCODING = TableEncoding(SCHEMA)
PATIENTS, RADIUS, ENCODER_BOUND = 40, 1.5, 2.0


def make_study(**channel: Any) -> Study:
    return Study.model_validate(
        {
            "study": {"name": "s", "schema": "schema.json"},
            "model": {"latent_dim": 3, "hidden": [16], "encoder_lipschitz": ENCODER_BOUND},
            "release": {"method": "channel", "rows": 500},
            "channel": {"epsilon": 2.0, "latent_radius": RADIUS} | channel,
        }
    )


def make_data(rows: int = PATIENTS, seed: int = 0) -> EncodedTable:
    random = np.random.default_rng(seed)
    day = SCHEMA.columns[3]
    ages, visits, wards = random.uniform(0, 100, rows), random.integers(0, 10, rows), random.integers(0, 4, rows)
    values = np.column_stack([ages, visits, wards, random.integers(int(day.minimum), int(day.maximum), rows)])
    values[::7, 0] = np.nan
    return ENCODING.encode(Table(SCHEMA, values))


def make_inputs(
    rows: int = 500, seed: int | None = 1, data: EncodedTable | None = None, **channel: Any
) -> ChannelInputs:
    study, data = make_study(**channel), make_data() if data is None else data
    generator = torch.Generator().manual_seed(5)
    return ChannelInputs(
        study=study,
        encoding=ENCODING,
        data=data,
        encoder=Encoder(ENCODING, study.model, generator),
        decoder=Decoder(ENCODING, study.model, generator),
        event=channel_event(study, ENCODING.diameter, len(data), rows),
        seed=seed,
    )


@pytest.fixture
def latents(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The noised codes as they reach the decoder, which decodes them all the same."""
    seen: list[torch.Tensor] = []
    decode = client.generation.decode_latent

    def record(decoder: Any, encoding: Any, latent: torch.Tensor, *rest: Any) -> Table:
        seen.append(latent.clone())
        return decode(decoder, encoding, latent, *rest)

    monkeypatch.setattr(client.generation, "decode_latent", record)
    return seen


def test_rows_fit_the_schema_and_are_as_many_as_the_event_says() -> None:
    rows = channel_rows(make_inputs(rows=333))
    assert rows.shape == (333, 4) and rows.dtype == np.float64
    check_rows(Table(SCHEMA, rows))
    assert np.isnan(rows[:, 0]).any() and not np.isnan(rows[:, 1]).any()


def test_seeds_repeat_and_the_operating_system_does_not() -> None:
    assert np.array_equal(channel_rows(make_inputs()), channel_rows(make_inputs()), equal_nan=True)
    assert not np.array_equal(channel_rows(make_inputs(seed=2)), channel_rows(make_inputs()), equal_nan=True)
    one, two = (channel_rows(make_inputs(seed=None)) for _ in range(2))
    assert not np.array_equal(one, two, equal_nan=True)


def test_codes_are_bounded_whatever_the_encoder_became() -> None:
    """R and the encoder's bound are enforced at the release, and T3's Δ holds for every pair of patients."""
    inputs = make_inputs()
    with torch.no_grad():
        for parameter in inputs.encoder.parameters():
            parameter.mul_(50.0)
    assert inputs.encoder.network.certificate() > 100 * ENCODER_BOUND
    codes = bounded_codes(inputs.encoder, inputs.data, inputs.study)
    assert inputs.encoder.network.certificate() <= ENCODER_BOUND
    assert np.linalg.norm(codes, axis=1).max() <= RADIUS
    assert np.linalg.norm(codes, axis=1).max() > 0.9 * RADIUS  # the projection had work to do
    x = inputs.data.inputs.double().numpy()
    apart = np.linalg.norm(codes[:, None] - codes, axis=2)
    assert (apart <= np.minimum(2 * RADIUS, ENCODER_BOUND * np.linalg.norm(x[:, None] - x, axis=2)) + 1e-9).all()
    assert apart.max() <= inputs.event.sensitivity


def test_a_radius_beyond_reach_leaves_the_codes_alone() -> None:
    inputs = make_inputs(latent_radius=1e6)
    codes = bounded_codes(inputs.encoder, inputs.data, inputs.study)
    with torch.no_grad():
        mean = inputs.encoder.double()(inputs.data.inputs.double())[0].numpy()
    assert np.allclose(codes, mean, rtol=0, atol=1e-12)
    assert inputs.event.sensitivity == ENCODER_BOUND * ENCODING.diameter


@pytest.mark.parametrize("seed", [3, None])
def test_codes_carry_the_noise_of_the_event(latents: list[torch.Tensor], seed: int | None) -> None:
    """One patient: the codes are normal around Π_R μ with standard deviation σ_z, before the public scale."""
    inputs = make_inputs(rows=20_000, seed=seed, data=make_data(1))
    channel_rows(inputs)
    code = bounded_codes(inputs.encoder, inputs.data, inputs.study)[0]
    noise = inputs.event.latent_noise
    z = torch.cat(latents).double().numpy() / latent_scale(inputs.study, noise)
    standard = (z - code) / noise
    assert stats.kstest(standard.ravel(), "norm").pvalue > 1e-6
    assert standard.std() == pytest.approx(1.0, abs=0.02)
    assert np.abs(np.corrcoef(standard.T) - np.eye(3)).max() < 0.04


def test_patients_are_drawn_uniformly_with_replacement(latents: list[torch.Tensor]) -> None:
    inputs = make_inputs(rows=8000)
    # Nearly no noise, so that every code shows whose it is.
    channel_rows(replace(inputs, event=replace(inputs.event, latent_noise=1e-9)))
    z = torch.cat(latents).double().numpy() / latent_scale(inputs.study, 1e-9)
    codes = bounded_codes(inputs.encoder, inputs.data, inputs.study)
    nearest = np.linalg.norm(z[:, None] - codes, axis=2).argmin(axis=1)
    counts = np.bincount(nearest, minlength=PATIENTS)
    assert stats.chisquare(counts).pvalue > 1e-6 and counts.std() > 5  # not a fixed number each either


def audited_epsilon(latents: list[torch.Tensor], factor: float, releases: int = 60_000) -> tuple[float, float]:
    """(claimed ε, a lower bound of it at 99.9 %) of releases of one row, by the likelihood-ratio test of T3.

    Two tables of one patient, whose two contents the encoder sends as far apart as it may. `factor` scales the noise
    behind the event's back.
    """
    inputs = make_inputs(rows=1, data=make_data(2), epsilon=2.0)
    one, two = (inputs.data.take(np.array([i])) for i in (0, 1))
    event = channel_event(inputs.study, ENCODING.diameter, 1, 1)
    with torch.no_grad():  # an encoder that sends the two as far apart as R allows
        for parameter in inputs.encoder.parameters():
            parameter.mul_(50.0)
    codes = [bounded_codes(inputs.encoder, data, inputs.study)[0] for data in (one, two)]
    direction = codes[0] - codes[1]
    distance = float(np.linalg.norm(direction))
    # Δ is the largest distance there could be; the noise multiplier of this pair is larger by Δ / distance.
    scaled = replace(event, latent_noise=event.latent_noise * factor * distance / event.sensitivity)
    found = []
    for data in (one, two):
        latents.clear()
        # Many independent releases of one row at once: 1 patient, so every row is his.
        channel_rows(replace(inputs, data=data, event=replace(scaled, rows=releases), seed=len(found) + 11))
        z = torch.cat(latents).double().numpy() / latent_scale(inputs.study, scaled.latent_noise)
        found.append(z @ direction)
    threshold = float(np.quantile(found[0], 0.98))
    hits, alarms = (int((scores > threshold).sum()) for scores in found)
    true = stats.beta.ppf(0.0005, hits, releases - hits + 1)
    false = stats.beta.ppf(0.9995, alarms + 1, releases - alarms)
    return 2.0, math.log((true - 1e-5) / false)


def test_an_audit_stays_below_the_claim_and_finds_halved_noise(latents: list[torch.Tensor]) -> None:
    claimed, measured = audited_epsilon(latents, 1.0)
    assert 0.3 < measured <= claimed
    claimed, measured = audited_epsilon(latents, 0.5)
    assert measured > claimed


def test_an_event_that_counts_other_patients_is_refused() -> None:
    inputs = make_inputs()
    with pytest.raises(ValueError, match="counts 40 patients, the table has 39"):
        channel_rows(replace(inputs, data=inputs.data.take(np.arange(39))))


def test_a_synthetic_encoder_finds_the_codes_of_synthetic_rows() -> None:
    """It sees the decoder alone: no patient is among its arguments. Its codes follow those the rows were made from."""
    study = make_study()
    decoder = Decoder(ENCODING, study.model, torch.Generator().manual_seed(2))
    encoder = synthetic_encoder(decoder, ENCODING, study, seed=4)
    assert encoder.network.certificate() <= ENCODER_BOUND
    generator = torch.Generator().manual_seed(9)
    latent = torch.randn(2000, 3, generator=generator)
    rows = client.generation.decode_latent(decoder, ENCODING, latent, generator, np.random.default_rng(1))
    with torch.no_grad():
        mean = encoder(ENCODING.encode(rows).inputs)[0]
    correlations = [float(np.corrcoef(mean[:, j], latent[:, j])[0, 1]) for j in range(3)]
    assert max(correlations) > 0.5 and min(correlations) > 0.1
