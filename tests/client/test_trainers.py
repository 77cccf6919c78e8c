import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from scipy import stats

from client.state import SiteState, load_state, save_state
from client.trainers import MODES, RoundInputs, RoundResult
from client.trainers.base import NonFiniteLossError
from common.model.training import ADAM_BETAS, learning_rate, train_locally
from common.model.vae import Decoder, Encoder, negative_elbo
from common.privacy.events import BoundedInfluence, GaussianUpdate, UnboundedInfluence
from common.privacy.update import update_norm
from common.schema import Schema, parse_schema
from common.study import Mode, Study
from common.table import Table
from tests.client.rounds import round_inputs, same

SCHEMA = parse_schema(
    {
        "fields": [
            {"name": "age", "type": "number", "constraints": {"minimum": 0, "maximum": 100}},
            {"name": "visits", "type": "integer", "constraints": {"minimum": 0, "maximum": 9}},
            {"name": "ward", "type": "string", "constraints": {"enum": list("abcd"), "required": True}},
            {"name": "grade", "type": "string", "constraints": {"enum": list("abcd"), "required": True}},
            {"name": "dead", "type": "boolean"},
        ]
    }
)
ENCODER_BOUND, DECODER_BOUND, LOGIT_SCALE, RADIUS = 3.0, 15.0, 5.0, 0.3


def make_study(**sections: dict[str, Any]) -> Study:
    document: dict[str, Any] = {
        "study": {"name": "s", "schema": "schema.json"},
        "model": {
            "latent_dim": 3,
            "hidden": [16, 16],
            "decoder_lipschitz": DECODER_BOUND,
            "encoder_lipschitz": ENCODER_BOUND,
            "logit_scale": LOGIT_SCALE,
        },
        "training": {"rounds": 4, "local_epochs": 2, "batch_size": 32, "learning_rate": 0.02, "update_norm": RADIUS},
    }
    return Study.model_validate({name: values | sections.get(name, {}) for name, values in document.items()})


def make_table(rows: int = 100, seed: int = 0, schema: Schema = SCHEMA) -> Table:
    """Ward and grade are always equal; the rest depends on them; some cells are missing."""
    random = np.random.default_rng(seed)
    ward = random.integers(0, 4, rows).astype(float)
    age = np.clip(20 + 20 * ward + random.normal(0, 5, rows), 0, 100)
    visits = np.clip(np.round(2 * ward + random.normal(0, 1, rows)), 0, 9)
    dead = (random.random(rows) < ward / 4).astype(float)
    values = np.column_stack([age, visits, ward, ward, dead])
    values[random.random(rows) < 0.1, 0] = np.nan
    values[random.random(rows) < 0.1, 4] = np.nan
    return Table(schema, values)


def first_inputs(study: Study, table: Table | None = None, **rest: Any) -> RoundInputs:
    return round_inputs(study, make_table() if table is None else table, **rest)


def run(inputs: RoundInputs) -> RoundResult:
    return MODES[inputs.study.training.mode].train(inputs)


def moved(decoder: Mapping[str, torch.Tensor], update: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: array + update[name] for name, array in decoder.items()}


def norms(arrays: Mapping[str, torch.Tensor], prefix: str) -> list[float]:
    """Spectral norms of a network's layers by numpy, independently of the certificate's code."""
    weights = [a.numpy().astype(np.float64) for n, a in arrays.items() if n.startswith(prefix) and n.endswith("weight")]
    assert len(weights) == 3
    return [float(np.linalg.svd(weight, compute_uv=False)[0]) for weight in weights]


STUDY = make_study()


def test_every_mode_of_a_study_has_a_trainer() -> None:
    assert set(MODES) == set(get_args(Mode)) - {"anchored"}  # which has no rounds


def test_the_update_stays_inside_its_ball_and_the_projection_is_what_keeps_it_there() -> None:
    result = run(first_inputs(make_study(training={"learning_rate": 0.1})))
    assert result.diagnostics["update_norm_before"] > 2 * RADIUS
    exact = math.sqrt(sum(float(np.square(a.numpy().astype(np.float64)).sum()) for a in result.update.values()))
    assert 0.999 * RADIUS < exact <= RADIUS
    assert result.diagnostics["update_norm"] == pytest.approx(exact)


def test_a_short_update_is_sent_as_it_is() -> None:
    inputs = first_inputs(make_study(training={"learning_rate": 1e-5}))
    result = run(inputs)
    assert result.diagnostics["update_norm_before"] < RADIUS
    trained = train_locally(inputs, constrained=True).decoder.arrays()
    assert same(result.update, {name: trained[name] - array for name, array in inputs.decoder.items()})


def test_both_networks_keep_their_bounds_at_every_round() -> None:
    study, state = make_study(training={"learning_rate": 0.1, "update_norm": 5.0}), {}
    inputs = first_inputs(study)
    for number in range(1, 4):
        inputs = replace(inputs, round=number, state=state)
        local = train_locally(inputs, constrained=True)
        decoder = local.decoder.arrays()
        assert LOGIT_SCALE * math.prod(norms(decoder, "network.")) <= DECODER_BOUND
        assert max(norms(decoder, "network.")) <= (DECODER_BOUND / LOGIT_SCALE) ** (1 / 3)
        assert math.prod(norms(local.state, "encoder.")) <= ENCODER_BOUND
        assert max(norms(local.state, "encoder.")) <= ENCODER_BOUND ** (1 / 3)
        assert max(norms(decoder, "network.")) > 0.98 * (DECODER_BOUND / LOGIT_SCALE) ** (1 / 3)  # it binds
        inputs, state = replace(inputs, decoder=decoder), local.state
    assert math.prod(norms(run(inputs).state, "encoder.")) <= ENCODER_BOUND


def test_equal_seeds_give_equal_bits_and_different_seeds_different_ones() -> None:
    first, again, other = (run(first_inputs(STUDY, seed=seed)) for seed in (1, 1, 2))
    assert same(first.update, again.update) and same(first.state, again.state)
    assert not any(
        torch.equal(first.update[name], other.update[name]) for name in first.update if name.endswith("weight")
    )
    torch.manual_seed(123)  # the global generator has no say
    assert same(run(first_inputs(STUDY, seed=1)).update, first.update)


def test_a_round_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    """Two rounds with the state on disk between them, against one loop whose networks and optimiser simply live on."""
    inputs = first_inputs(STUDY)
    encoder = Encoder(inputs.encoding, STUDY.model, torch.Generator().manual_seed(7))
    decoder = Decoder(inputs.encoding, STUDY.model)
    decoder.load_arrays(inputs.decoder)
    optimiser = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], betas=ADAM_BETAS, fused=True)
    global_decoder, state = dict(inputs.decoder), SiteState()
    for number in (1, 2, 3):
        seed = 100 * number if number > 1 else 7
        result = run(replace(inputs, round=number, seed=seed, decoder=global_decoder, state=state.trainer))
        save_state(tmp_path / "state", "s", SiteState(number, "", result.state, result.update))
        state = load_state(tmp_path / "state", "s")
        assert same(state.trainer, result.state)

        generator = torch.Generator().manual_seed(seed)
        step = 0
        for _ in range(2):
            for batch in torch.randperm(100, generator=generator).tensor_split(4):
                optimiser.param_groups[0]["lr"] = learning_rate(number, step, 8, 4, 0.02)
                data = inputs.data
                loss = negative_elbo(encoder, decoder, data.inputs[batch], data.levels[batch], 1.0, generator).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                encoder.network.project()
                decoder.network.project()
                step += 1
        encoder.network.project(exact=True)
        decoder.network.project(exact=True)
        assert all(torch.equal(result.state[f"encoder.{n}"], p) for n, p in encoder.named_parameters())
        # The server has moved the decoder by its own rules; the site's networks start from what it was sent.
        global_decoder = moved(global_decoder, result.update)
        decoder.load_arrays(global_decoder)


def test_without_its_state_a_site_would_not_go_on_like_that() -> None:
    first = run(first_inputs(STUDY))
    inputs = first_inputs(STUDY, number=2, seed=8)
    assert not same(run(replace(inputs, state=first.state)).update, run(inputs).update)


@pytest.mark.parametrize("mode", ["constrained", "none"])
@pytest.mark.parametrize(
    ("rows", "spoil"),
    [
        pytest.param(1, None, id="one patient"),
        pytest.param(2, None, id="two patients"),
        pytest.param(3, None, id="three patients"),
        pytest.param(33, None, id="one more than a batch"),
        pytest.param(60, (0, np.nan), id="all-missing number"),
        pytest.param(60, (1, np.nan), id="all-missing integer"),
        pytest.param(60, (4, np.nan), id="all-missing boolean"),
        pytest.param(60, (4, 1.0), id="single outcome class"),
        pytest.param(60, (0, 100.0), id="all at the maximum"),
    ],
)
def test_poor_sites_train(mode: str, rows: int, spoil: tuple[int, float] | None) -> None:
    table = make_table(rows)
    if spoil is not None:
        table.values[:, spoil[0]] = spoil[1]
    study, state = make_study(training={"mode": mode}), {}
    inputs = first_inputs(study, table)
    for number in (1, 2):
        result = run(replace(inputs, round=number, state=state))
        assert all(torch.isfinite(array).all() for array in [*result.update.values(), *result.state.values()])
        assert update_norm(result.update) > 0 and math.isfinite(result.diagnostics["loss"])
        if mode == "constrained":
            assert update_norm(result.update) <= RADIUS
        assert result.diagnostics["steps"] == 2 * math.ceil(rows / 32)
        state = result.state


def test_training_learns_the_dependence_of_columns() -> None:
    """Ward and grade are equal: a model of each alone needs 2 ln 4 nats, one that knows both can do with ln 4."""
    schema = parse_schema({"fields": [SCHEMA.descriptor["fields"][2], SCHEMA.descriptor["fields"][3]]})
    values = np.repeat(np.arange(4.0), 64)[:, None].repeat(2, axis=1)
    study = make_study(
        model={"decoder_lipschitz": 40.0},
        training={"rounds": 12, "local_epochs": 10, "learning_rate": 0.02, "update_norm": 3.0},
    )
    inputs, losses = first_inputs(study, Table(schema, values)), []
    for number in range(1, 13):
        result = run(replace(inputs, round=number))
        losses.append(result.diagnostics["loss"])
        inputs = replace(inputs, decoder=moved(inputs.decoder, result.update), state=result.state)
    assert losses[-1] < losses[0]
    assert math.log(4) < losses[-1] < 0.85 * 2 * math.log(4)  # no model can be below the entropy


def test_the_learning_rate_falls_along_a_cosine_over_the_whole_study() -> None:
    rates = [learning_rate(r, s, 5, 8, 0.3) for r in range(1, 9) for s in range(5)]
    assert rates[0] == pytest.approx(0.3) and rates == sorted(rates, reverse=True)
    assert learning_rate(8, 5, 5, 8, 0.3) == pytest.approx(0.05 * 0.3)
    assert learning_rate(5, 0, 5, 8, 0.3) == pytest.approx(0.3 * (0.05 + 0.95 / 2))  # half-way
    for r in range(1, 8):
        assert learning_rate(r, 5, 5, 8, 0.3) == pytest.approx(learning_rate(r + 1, 0, 5, 8, 0.3))
    assert learning_rate(1, 0, 0, 1, 0.3) == pytest.approx(0.3)


@pytest.mark.parametrize("number", [1, 3, 4])
def test_training_follows_the_schedule(number: int) -> None:
    """Adam's first step moves every weight by the learning rate, whatever the gradient is."""
    study = make_study(training={"mode": "none", "local_epochs": 1, "batch_size": 100, "learning_rate": 1e-3})
    result = run(first_inputs(study, number=number))
    assert result.diagnostics["steps"] == 1
    largest = max(float(array.abs().max()) for array in result.update.values())
    assert largest == pytest.approx(learning_rate(number, 0, 1, 4, 1e-3), rel=1e-2)


def test_the_reference_mode_is_really_unconstrained() -> None:
    study = make_study(training={"mode": "none", "learning_rate": 0.2, "local_epochs": 5})
    inputs = first_inputs(study)
    result = run(inputs)
    assert update_norm(result.update) > 10 * RADIUS
    assert result.diagnostics["update_norm"] == pytest.approx(update_norm(result.update))
    assert LOGIT_SCALE * math.prod(norms(moved(inputs.decoder, result.update), "network.")) > 2 * DECODER_BOUND
    assert math.prod(norms(result.state, "encoder.")) > 2 * ENCODER_BOUND


def test_events_are_functions_of_declared_constants() -> None:
    assert MODES["constrained"].event(STUDY, 3, 0.25, 100) == BoundedInfluence(3, RADIUS, 0.25)
    assert MODES["constrained"].event(noisy_study(2.0), 3, 0.25, 100) == GaussianUpdate(3, RADIUS, 2.0, 0.25)
    assert MODES["none"].event(STUDY, 3, 0.25, 100) == UnboundedInfluence(3, 0.25)


def noisy_study(noise: float, **study: Any) -> Study:
    document = STUDY.document()
    document["privacy"]["update_noise"] = noise
    document["study"] |= study
    return Study.model_validate(document)


@pytest.mark.parametrize("seed", [None, 5])
def test_update_noise_is_added_after_the_projection(seed: int | None) -> None:
    # The same training seed without noise gives the projected update, so the difference is the noise alone.
    quiet = run(first_inputs(STUDY)).update
    noisy = run(first_inputs(noisy_study(3.0, seed=seed))).update
    noise = torch.cat([(noisy[name] - quiet[name]).flatten() for name in quiet]).double() / (3.0 * RADIUS)
    count = noise.numel()
    assert abs(float(noise.mean())) < 5 / math.sqrt(count)
    assert abs(float(noise.square().mean()) - 1) < 5 * math.sqrt(2 / count)
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-6


def test_noise_is_fresh_from_the_system_and_repeatable_from_a_seed() -> None:
    def update(**study: Any) -> torch.Tensor:
        return run(first_inputs(noisy_study(3.0, **study))).update["head.base"]

    assert not torch.equal(update(), update())
    assert torch.equal(update(seed=5), update(seed=5))


@pytest.mark.parametrize("mode", ["constrained", "none"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["encoder.network.layers.1.weight", "encoder.network.layers.2.bias", "adam.exp_avg."])
def test_a_state_that_is_not_finite_stops_training(mode: str, value: float, part: str) -> None:
    study = make_study(training={"mode": mode})
    state = run(first_inputs(study)).state
    spoilt = {n: torch.full_like(a, value) if n.startswith(part) else a for n, a in state.items()}
    with pytest.raises(NonFiniteLossError, match="in round 2"):
        run(first_inputs(study, number=2, state=spoilt))


def test_a_learning_rate_beyond_reason_stops_training() -> None:
    with pytest.raises(NonFiniteLossError):
        run(first_inputs(make_study(training={"mode": "none", "learning_rate": 1e30})))
