import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from client.state import SiteState, load_state, save_state
from client.trainers import MODES
from client.trainers.base import NonFiniteLossError
from common.errors import DataError
from common.model.vae import Decoder
from common.privacy.accountant import account
from common.privacy.dpsgd import dpsgd_schedule
from common.privacy.update import update_norm
from common.schema import parse_schema
from common.study import Protocol
from common.table import Table
from server.checkpoint import build_decoder
from server.strategy import LipschitzFedAvg, Member
from server.witness import Witness
from tests.client.noised import (
    DECODER_BOUND,
    ENCODER_BOUND,
    RADIUS,
    SCHEMA,
    make_study,
    make_table,
    run,
)
from tests.client.rounds import round_inputs, same


@pytest.mark.parametrize("rows", [1, 2, 30, 31, 33, 200])
def test_small_sites_train(rows: int) -> None:
    study, state = make_study(learning_rate=0.1), {}
    inputs = round_inputs(study, make_table(rows))
    for number in (1, 2, 3):
        result = run(replace(inputs, round=number, state=state))
        assert all(torch.isfinite(array).all() for array in [*result.update.values(), *result.state.values()])
        assert 0 < update_norm(result.update) <= RADIUS
        assert result.diagnostics["steps"] == max(1, round(2 * rows / 32))
        # Nothing that is not a function of declared constants and noised gradients, time apart.
        assert result.diagnostics.keys() == {
            "update_norm_before",
            "update_norm",
            "noise_multiplier",
            "steps",
            "training_seconds",
        }
        state = result.state


def test_certificates_hold_at_the_site_and_after_aggregation(tmp_path: Path) -> None:
    study = make_study(learning_rate=0.3, update_norm=5.0)
    protocol = Protocol(study, SCHEMA)
    tables = {"a": make_table(60, 1), "b": make_table(200, 2)}
    decoder = build_decoder(protocol, 0)
    members = tuple(Member(i, name, len(table.values)) for i, (name, table) in enumerate(tables.items()))
    witness = Witness(tmp_path / "heads.json", Ed25519PrivateKey.generate())
    strategy = LipschitzFedAvg(protocol, decoder, members, lambda *_: None, witness)
    states: dict[str, Mapping[str, Tensor]] = {name: {} for name in tables}
    for number in (1, 2):
        updates = {}
        for name, table in tables.items():
            inputs = round_inputs(study, table, number, decoder=decoder.arrays(), state=states[name])
            result = run(inputs)
            updates[name], states[name] = result.update, result.state
            weights = [a for n, a in result.state.items() if n.startswith("encoder.") and n.endswith("weight")]
            assert math.prod(float(torch.linalg.matrix_norm(w.double(), 2)) for w in weights) <= ENCODER_BOUND
        strategy.aggregate(updates)
        weights = [layer.weight.detach().double() for layer in decoder.network.linears]
        largest = [float(torch.linalg.matrix_norm(weight, 2)) for weight in weights]
        assert 0.5 * DECODER_BOUND < 5.0 * math.prod(largest) <= DECODER_BOUND
        assert decoder.require_certificate(DECODER_BOUND) <= DECODER_BOUND


def test_a_round_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    study, table = make_study(), make_table(100)
    live: Mapping[str, Tensor] = {}
    stored = SiteState()
    for number in (1, 2, 3):
        inputs = round_inputs(study, table, number, seed=number)
        first = run(replace(inputs, state=live))
        second = run(replace(inputs, state=stored.trainer))
        assert same(first.update, second.update) and same(first.state, second.state)
        save_state(tmp_path / "state", "s", SiteState(number, "", second.state, second.update))
        live, stored = first.state, load_state(tmp_path / "state", "s")
        assert float(live["adam.step.encoder.network.layers.0.weight"]) == 6 * number
    assert not same(run(replace(inputs, state={})).update, second.update)


def test_a_table_that_changes_size_ends_the_participation() -> None:
    study = make_study()
    state = run(round_inputs(study, make_table(100))).state
    with pytest.raises(DataError, match="has 99 patients and had 100"):
        run(round_inputs(study, make_table(99), 2, state=state))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["encoder.network.layers.1.weight", "encoder.network.layers.2.bias", "adam.exp_avg."])
def test_a_state_that_is_not_finite_stops_training(value: float, part: str) -> None:
    study, table = make_study(), make_table(50)
    state = run(round_inputs(study, table)).state
    spoilt = {n: torch.full_like(a, value) if n.startswith(part) else a for n, a in state.items()}
    with pytest.raises(NonFiniteLossError, match="in round 2"):
        run(round_inputs(study, table, 2, state=spoilt))


def test_training_learns_where_noise_allows() -> None:
    """Patients with one and the same ward: at a generous ε the decoder must come to prefer it."""
    schema = parse_schema({"fields": [SCHEMA.descriptor["fields"][1]]})
    table = Table(schema, np.full((400, 1), 2.0))
    study = make_study(rounds=6, learning_rate=0.05, update_norm=5.0, privacy={"epsilon": 10.0})
    inputs = round_inputs(study, table)
    for number in range(1, 7):
        result = run(replace(inputs, round=number))
        moved = {name: array + result.update[name] for name, array in inputs.decoder.items()}
        inputs = replace(inputs, decoder=moved, state=result.state)
    decoder = Decoder(inputs.encoding, study.model)
    decoder.load_arrays(inputs.decoder)
    with torch.no_grad():
        levels = decoder.head.sample(
            decoder(torch.randn(2000, 3, generator=torch.Generator().manual_seed(0))), torch.Generator().manual_seed(1)
        )
    assert float((levels == 2).double().mean()) > 0.9


def test_the_events_of_a_study_compose_to_its_target() -> None:
    study = make_study()
    events = [MODES["dpsgd"].event(study, number, 0.5, 300) for number in range(1, 5)]
    assert {replace(event, round=1) for event in events} == {dpsgd_schedule(study, 300).event(1)}
    assert 0.98 * 3.0 < account(events, study.privacy.delta).epsilon <= 3.0
