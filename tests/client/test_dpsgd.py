import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from opacus.optimizers import DPOptimizer
from scipy import stats
from torch import Tensor, nn

import client.trainers.dpsgd
from client.handlers import Site
from client.site import load_site
from client.state import SiteState, load_state, save_state
from client.trainers import MODES, RoundInputs, RoundResult
from client.trainers.base import NonFiniteLossError
from client.trainers.clipping import RowGradients, row_gradients
from client.trainers.local import named_parameters
from common.encoding import TableEncoding
from common.errors import DataError
from common.messages import JoinRequest, Status, TrainReply, TrainRequest
from common.model.vae import Decoder, Encoder, negative_elbo
from common.privacy.accountant import account
from common.privacy.dpsgd import dpsgd_schedule
from common.privacy.events import SampledGaussianSteps
from common.privacy.ledger import Ledger
from common.privacy.noise import RandomNumbers
from common.privacy.update import update_norm
from common.schema import Schema, parse_schema
from common.study import Protocol, Study
from common.table import Table
from server.checkpoint import build_decoder
from server.strategy import LipschitzFedAvg, Member
from server.witness import Witness

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


def round_inputs(study: Study, table: Table, number: int = 1, seed: int = 7, **rest: Any) -> RoundInputs:
    encoding = TableEncoding(table.schema)
    start = Decoder(encoding, study.model, torch.Generator().manual_seed(99))
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


def run(inputs: RoundInputs) -> RoundResult:
    return MODES["dpsgd"].train(inputs)


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


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


# ---------------------------------------------------------------- gradients of single rows


@pytest.fixture(scope="module")
def networks() -> tuple[Encoder, Decoder, TableEncoding]:
    encoding, study = TableEncoding(SCHEMA), make_study()
    generator = torch.Generator().manual_seed(3)
    encoder, decoder = Encoder(encoding, study.model, generator), Decoder(encoding, study.model, generator)
    with torch.no_grad():
        for parameter in named_parameters(encoder, decoder).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return encoder, decoder, encoding


Networks = tuple[Encoder, Decoder, TableEncoding]


def slow_gradients(networks: Networks, table: Table) -> list[dict[str, Tensor]]:
    """One backward pass a row, with PyTorch's ordinary gradients."""
    encoder, decoder, encoding = networks
    data, parameters, found = encoding.encode(table), named_parameters(encoder, decoder), []
    for row in range(len(data)):
        losses = negative_elbo(
            encoder, decoder, data.inputs, data.levels, 0.5, generator=torch.Generator().manual_seed(1)
        )
        gradients = torch.autograd.grad(losses[row], list(parameters.values()))
        found.append(dict(zip(parameters, gradients, strict=True)))
    return found


def fast_gradients(networks: Networks, table: Table) -> RowGradients:
    encoder, decoder, encoding = networks
    data = encoding.encode(table)
    return row_gradients(encoder, decoder, data.inputs, data.levels, 0.5, torch.Generator().manual_seed(1))


def test_gradients_of_rows_equal_a_slow_loop(networks: Networks) -> None:
    table = make_table(9)
    slow, fast = slow_gradients(networks, table), fast_gradients(networks, table)
    assert torch.allclose(fast.norms(), torch.stack([flat(g).norm() for g in slow]), rtol=1e-5)
    for row, wanted in enumerate(slow):
        affine = {name: (a[[row]], b[[row]]) for name, (a, b) in fast.affine.items()}
        single = RowGradients(affine, {name: rows[[row]] for name, rows in fast.vectors.items()}).clipped_sum(1e9)
        assert single.keys() == wanted.keys()
        assert all(torch.allclose(single[name], wanted[name], rtol=1e-4, atol=1e-5) for name in wanted)


@pytest.mark.parametrize("quantile", [0.0, 0.5, 1.0])
def test_the_clipped_sum_equals_that_of_opacus(networks: Networks, quantile: float) -> None:
    table = make_table(40)
    slow, fast = slow_gradients(networks, table), fast_gradients(networks, table)
    clip = float(fast.norms().quantile(quantile)) * 1.01
    parameters = named_parameters(networks[0], networks[1])
    copies = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}
    opacus = DPOptimizer(
        torch.optim.SGD(copies.values()), noise_multiplier=0.0, max_grad_norm=clip, expected_batch_size=1
    )
    for name, parameter in copies.items():
        parameter.grad_sample = torch.stack([row[name] for row in slow])  # pyright: ignore[reportAttributeAccessIssue]
    opacus.clip_and_accumulate()
    wanted = {name: parameter.summed_grad for name, parameter in copies.items()}  # pyright: ignore[reportAttributeAccessIssue]
    error = (flat(fast.clipped_sum(clip)) - flat(wanted)).norm()
    assert float(error) < 1e-4 * clip


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e6, 1e14, 1e17, 1e37, math.inf, math.nan])
@pytest.mark.parametrize("clip", [1e-4, 1.0, 50.0])
def test_no_row_moves_the_sum_by_more_than_the_clip(scale: float, clip: float) -> None:
    generator = torch.Generator().manual_seed(0)

    def rows(width: int, factor: float) -> Tensor:
        calm = torch.randn(6, width, generator=generator)
        calm[2] *= factor
        return calm

    inverse = 1.0 / scale if scale else 1.0
    for inputs, outputs, base in ((scale, 1, 1), (1, scale, 1), (1, 1, scale), (scale, inverse, 1)):
        gradients = RowGradients({"layer": (rows(5, inputs), rows(4, outputs))}, {"base": rows(3, base)})
        whole = gradients.clipped_sum(clip)
        assert all(torch.isfinite(array).all() for array in whole.values())
        others = torch.zeros_like(flat(whole))
        for row in range(6):
            single = flat(
                RowGradients(
                    {name: (a[[row]], b[[row]]) for name, (a, b) in gradients.affine.items()},
                    {name: values[[row]] for name, values in gradients.vectors.items()},
                ).clipped_sum(clip)
            )
            assert float(single.norm()) <= clip
            others += single
        assert torch.allclose(flat(whole), others, rtol=1e-4, atol=1e-6 * clip)


def test_a_parameter_whose_gradients_would_be_missed_is_refused(networks: Networks) -> None:
    encoder, decoder, encoding = networks
    data = encoding.encode(make_table(3))

    class Extra(Encoder):
        def __init__(self) -> None:
            super().__init__(encoding, make_study().model)
            self.scale = nn.Parameter(torch.ones(1))

    with pytest.raises(TypeError, match=r"single patients for encoder\.scale"):
        row_gradients(Extra(), decoder, data.inputs, data.levels, 1.0)

    class Twice(Encoder):
        def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
            super().forward(inputs)
            return super().forward(inputs)

    with pytest.raises(TypeError, match="map every row once"):
        row_gradients(Twice(encoding, make_study().model), decoder, data.inputs, data.levels, 1.0)
    assert not encoder.network.linears[0]._forward_hooks and not decoder.network.linears[0]._forward_hooks


# ---------------------------------------------------------------- one step


def one_step(seed: int | None = 5, privacy: Mapping[str, Any] | None = None, **training: Any) -> Study:
    return make_study(seed, privacy=privacy, **({"rounds": 1, "local_epochs": 1, "batch_size": 40} | training))


@pytest.mark.parametrize("chosen", [[3], [0, 1, 2, 3, 4], list(range(60))])
def test_the_sum_is_divided_by_the_expected_batch(chosen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = round_inputs(one_step(batch_size=40), make_table(60))  # q = 2/3; round(60 / 40) = 2 steps
    inputs = replace(inputs, study=one_step(batch_size=45))  # round(60 / 45) = 1
    monkeypatch.setattr(client.trainers.dpsgd, "RandomNumbers", lambda _seed: Chosen(chosen))
    encoder = Encoder(inputs.encoding, inputs.study.model, torch.Generator().manual_seed(7))
    decoder = Decoder(inputs.encoding, inputs.study.model)
    decoder.load_arrays(inputs.decoder)
    data, generator = inputs.data, torch.Generator().manual_seed(7)
    rows = row_gradients(encoder, decoder, data.inputs[chosen], data.levels[chosen], 1.0, generator)
    assert float(rows.norms().min()) > CLIP
    wanted = flat(rows.clipped_sum(CLIP)) / 45.0
    assert torch.allclose(gradient(run(inputs)), wanted, rtol=1e-4, atol=1e-7)


def test_a_large_sample_is_worked_through_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without latent noise, which pieces draw in another order, the pieces must add up to the whole.
    monkeypatch.setattr(client.trainers.dpsgd, "RandomNumbers", lambda _seed: Chosen(list(range(30))))
    monkeypatch.setattr("common.model.vae.torch.randn", lambda shape, **_: torch.zeros(shape))
    inputs = round_inputs(one_step(), make_table(30))
    whole = gradient(run(inputs))
    monkeypatch.setattr(client.trainers.dpsgd, "LARGEST_PIECE", 7)
    assert torch.allclose(gradient(run(inputs)), whole, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize(("chosen", "rows"), [(None, 30), ([], 30), (None, 1)])
def test_the_noise_has_the_calibrated_size(
    seed: int | None, chosen: list[int] | None, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a sample of nobody, whose step is noise alone, and for a single patient."""
    study = one_step(seed=seed)
    inputs = round_inputs(study, make_table(rows))
    clean = Chosen(list(range(rows)) if chosen is None else chosen)
    with monkeypatch.context() as patch:
        patch.setattr(client.trainers.dpsgd, "RandomNumbers", lambda _seed: clean)
        quiet = gradient(run(inputs))
    assert (float(quiet.norm()) == 0) == (chosen == [])
    if chosen == []:
        monkeypatch.setattr(RandomNumbers, "sample", lambda *_: np.array([], dtype=np.int64))
    event = MODES["dpsgd"].event(study, 1, 0.5, rows)
    assert isinstance(event, SampledGaussianSteps) and event.sampling_probability == 1 and event.steps == 1
    noise = (gradient(run(inputs)) - quiet) * rows / (CLIP * event.noise_multiplier)
    count = noise.numel()
    assert abs(float(noise.mean())) < 5 / math.sqrt(count)
    assert abs(float(noise.square().mean()) - 1) < 5 * math.sqrt(2 / count)
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-6


def test_randomness_is_the_systems_in_production_and_repeatable_in_simulation() -> None:
    table = make_table(50)
    first, again, other = (run(round_inputs(make_study(), table, seed=seed)) for seed in (1, 1, 2))
    assert same(first.update, again.update) and same(first.state, again.state)
    assert not same(first.update, other.update)
    # Without the study's seed the same request gives other noise, though the networks start alike.
    production = [run(round_inputs(make_study(seed=None), table, seed=1)) for _ in range(2)]
    assert not same(production[0].update, production[1].update)


def test_poisson_samples_have_independent_members() -> None:
    for seed in (None, 3):
        random = RandomNumbers(seed)
        samples = np.zeros((4000, 5))
        for row in samples:
            row[random.sample(5, 0.3)] = 1
        assert np.all(np.abs(samples.mean(axis=0) - 0.3) < 5 * math.sqrt(0.21 / 4000))
        assert np.abs(np.corrcoef(samples.T) - np.eye(5)).max() < 5 / math.sqrt(4000)
        sizes = np.bincount(samples.sum(axis=1).astype(int), minlength=6) / 4000
        assert np.abs(sizes - stats.binom.pmf(range(6), 5, 0.3)).max() < 0.04
    assert RandomNumbers(None).sample(4, 1.0).tolist() == [0, 1, 2, 3]


# ---------------------------------------------------------------- rounds


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


# ---------------------------------------------------------------- the handlers


@pytest.fixture
def hospital(tmp_path: Path) -> Iterator[tuple[Site, Protocol]]:
    rows = ["age,ward,dead", *(f"{20 + i},{'abcd'[i % 4]},{'true' if i % 3 else 'false'}" for i in range(30))]
    (tmp_path / "patients.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "site.toml").write_text(
        '[site]\nname = "anna"\ndata = "patients.csv"\nstate = "state"\ndevice = "cpu"\n[policy]\nmodes = ["dpsgd"]\n'
    )
    yield Site(load_site(tmp_path / "site.toml")), Protocol(make_study(seed=None), SCHEMA)


def answer(site: Site, protocol: Protocol, number: int) -> TrainReply:
    request = TrainRequest(protocol.digest, number, 0.5, build_decoder(protocol, 0).arrays())
    return site.train(request.to_record())


def test_a_site_of_thirty_patients_spends_what_was_calibrated(hospital: tuple[Site, Protocol]) -> None:
    site, protocol = hospital
    assert site.join(JoinRequest(protocol.to_json()).to_record()).status is Status.OK
    assert [answer(site, protocol, number).status for number in (1, 2, 3, 4)] == [Status.OK] * 4
    assert answer(site, protocol, 5).status is Status.WRONG_ROUND  # no more than the schedule
    with Ledger(site.config.site.state / "ledger.sqlite", "anna") as ledger:
        events = [entry.event for entry in ledger.entries(protocol.digest)]
    assert events == [dpsgd_schedule(protocol.study, 30).event(number) for number in (1, 2, 3, 4)]
    assert 0.98 * 3.0 < account(events, protocol.study.privacy.delta).epsilon <= 3.0


@pytest.mark.parametrize(("limit", "status"), [(3.0, Status.OK), (2.9, Status.REFUSED_BY_POLICY)])
def test_the_whole_schedule_is_held_against_the_budget_before_round_1(
    hospital: tuple[Site, Protocol], limit: float, status: Status
) -> None:
    site, _ = hospital
    protocol = Protocol(make_study(seed=None, privacy={"max_epsilon": limit}), SCHEMA)
    assert site.join(JoinRequest(protocol.to_json()).to_record()).status is status


def test_a_resent_request_gets_the_same_bytes_though_the_noise_is_not_repeatable(
    hospital: tuple[Site, Protocol],
) -> None:
    site, protocol = hospital
    site.join(JoinRequest(protocol.to_json()).to_record())
    first, again = answer(site, protocol, 1), answer(site, protocol, 1)
    assert first.update is not None and again.update is not None and same(first.update, again.update)


def test_a_site_that_lost_its_state_takes_no_further_part(hospital: tuple[Site, Protocol]) -> None:
    site, protocol = hospital
    site.join(JoinRequest(protocol.to_json()).to_record())
    assert answer(site, protocol, 2).status is Status.OK  # a site that missed round 1 has lost nothing
    for path in site.config.site.state.glob("studies/*/state.safetensors"):
        path.unlink()
    assert answer(site, protocol, 3).status is Status.STORAGE_FAILED
    with Ledger(site.config.site.state / "ledger.sqlite", "anna") as ledger:
        assert len(ledger.entries(protocol.digest)) == 1


# ---------------------------------------------------------------- the audit


REPETITIONS = 1000
# A large δ, because how fast a violation shows depends on both, and 10^-5 would need millions of repetitions.
AUDIT_EPSILON, AUDIT_DELTA = 1.0, 0.2


def audited_sums(study: Study, values: list[float], direction: Tensor | None, seed: int) -> Tensor:
    """Noised gradients of many independent runs of one round: all of them (1, d), or their parts along `direction`."""
    inputs = round_inputs(study, Table(COIN, np.array(values)[:, None]))
    # From a decoder of zeros, which an active coordinator may send, the two outcomes pull in opposite directions.
    inputs = replace(inputs, decoder={name: torch.zeros_like(array) for name, array in inputs.decoder.items()})
    count = 1 if direction is None else REPETITIONS
    found = []
    for repetition in range(count):
        client_random = RandomNumbers(seed * REPETITIONS + repetition)
        with pytest.MonkeyPatch.context() as patch:
            source = client_random if direction is not None else Chosen(list(range(len(values))))
            patch.setattr(client.trainers.dpsgd, "RandomNumbers", lambda _seed, source=source: source)
            found.append(gradient(run(inputs)))
    stacked = torch.stack(found)
    return stacked if direction is None else stacked @ direction


def largest_epsilon_shown(left: np.ndarray, right: np.ndarray) -> float:
    """The largest ε that tests of one table against the other refute at δ, at 99.9 % over all tests together.

    For the likelihood ratio of normals every threshold on the statistic is an optimal test; (ε, δ)-DP demands
    P(S) ≤ e^ε P'(S) + δ of each. Clopper-Pearson bounds with a Bonferroni correction.
    """
    thresholds = np.quantile(np.concatenate([left, right]), np.linspace(0.05, 0.95, 10))
    level = 0.001 / (2 * 2 * len(thresholds))  # two bounds, two directions
    largest = 0.0
    for first, second in ((left, right), (right, left)):
        for threshold in thresholds:
            sign = 1.0 if first.mean() > second.mean() else -1.0
            hits = int((sign * first > sign * threshold).sum())
            false = int((sign * second > sign * threshold).sum())
            least = stats.beta.ppf(level, hits, len(first) - hits + 1) if hits else 0.0
            most = stats.beta.ppf(1 - level, false + 1, len(second) - false) if false < len(second) else 1.0
            if least > AUDIT_DELTA:
                largest = max(largest, math.log((least - AUDIT_DELTA) / most))
    return largest


def test_an_audit_stays_below_the_claim_and_finds_halved_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tables that differ in one patient, the real trainer, and a likelihood-ratio test between them."""
    document = one_step(
        batch_size=6, kl_weight=1e-6, privacy={"epsilon": AUDIT_EPSILON, "delta": AUDIT_DELTA}
    ).document()
    study = Study.model_validate(document | {"model": document["model"] | {"hidden": [4], "latent_dim": 1}})
    left, right = [0.0, 1.0, 0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    event = MODES["dpsgd"].event(study, 1, 1.0, 6)
    claim = account([event], AUDIT_DELTA).epsilon
    assert 0.98 * AUDIT_EPSILON < claim <= AUDIT_EPSILON

    difference = (audited_sums(study, left, None, 0) - audited_sums(study, right, None, 0))[0]
    distance = float(difference.norm()) * 6
    assert 1.99 * CLIP < distance <= 2 * CLIP  # the worst pair: their clipped gradients are opposite

    direction = difference / difference.norm()
    honest = [audited_sums(study, values, direction, seed).numpy() for seed, values in ((1, left), (2, right))]
    shown = largest_epsilon_shown(*honest)
    assert shown < claim

    schedule = dpsgd_schedule(study, 6)
    weakened = replace(schedule, noise_multiplier=schedule.noise_multiplier / 2)
    monkeypatch.setattr(client.trainers.dpsgd, "dpsgd_schedule", lambda *_: weakened)
    halved = [audited_sums(study, values, direction, seed).numpy() for seed, values in ((3, left), (4, right))]
    assert largest_epsilon_shown(*halved) > claim
