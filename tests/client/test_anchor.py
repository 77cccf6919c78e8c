"""The anchor at a hospital: what it sends, what it spends, how much noise it adds, and that it says it only once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.anchor import exact_statistics, noised_statistics
from common.anchor.cells import TableCells
from common.anchor.features import FeatureMap
from common.anchor.marginals import MarginalStatistics
from common.anchor.moments import moment_sensitivity, moment_size
from common.encoding import TableEncoding
from common.messages import Status
from common.privacy.accountant import account
from common.privacy.anchor import STEPS, Step, anchor_event
from common.privacy.events import GaussianStatistics
from common.privacy.ledger import Ledger
from common.records import values_digest
from common.study import Protocol
from common.table import Table, read_table
from tests.client.hospital import Hospital, anchor_request, join_request, study, train_request
from tests.client.test_dpsgd_audit import AUDIT_DELTA, AUDIT_EPSILON, REPETITIONS, largest_epsilon_shown

EPSILON, DELTA = 2.0, 1e-4
POLICY = 'modes = ["anchored", "constrained"]'


def anchored_study(**sections: Any) -> Protocol:
    given: dict[str, Any] = {
        "study": {"target": "dead"},
        "training": {"mode": "anchored", "rounds": 0},
        "anchor": {"epsilon": EPSILON},
        "privacy": {"delta": DELTA},
    }
    return study(**{name: given.get(name, {}) | sections.get(name, {}) for name in {*given, *sections}})


PROTOCOL = anchored_study()
CELLS = TableCells(PROTOCOL.schema, PROTOCOL.target)
COUNTS = MarginalStatistics(CELLS)
UNIFORM = np.concatenate([np.full(size, 1 / size) for size in CELLS.sizes])
FEATURES = FeatureMap(CELLS, CELLS.split(UNIFORM))
MOMENTS = moment_size(FEATURES.size)


def events(hospital: Hospital) -> list[Any]:
    with Ledger(hospital.state / "ledger.sqlite") as ledger:
        return [entry.event for entry in ledger.entries()]


def test_both_messages_are_spent_before_they_leave(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path / "anna", POLICY).joined(PROTOCOL)
    first = hospital.anchor(anchor_request(PROTOCOL, "marginals"), COUNTS.size)
    second = hospital.anchor(anchor_request(PROTOCOL, "moments", UNIFORM), MOMENTS)
    assert first.statistics is not None and second.statistics is not None
    assert all(isinstance(event, GaussianStatistics) for event in events(hospital))
    assert [event.round for event in events(hospital)] == [anchor_event(PROTOCOL.study, step).round for step in STEPS]
    assert account(events(hospital), DELTA).epsilon == pytest.approx(EPSILON, rel=1e-6)
    digests = [digest for _, digest in hospital.spends()]
    assert digests == [values_digest(first.statistics), values_digest(second.statistics)]


def test_the_noise_is_that_of_the_events(tmp_path: Path) -> None:
    """Of many sites with one table: mean and spread of what leaves, against the exact statistics computed by hand."""
    patients, _ = read_table(Hospital(tmp_path / "x", POLICY).data, PROTOCOL.schema)
    levels = TableEncoding(PROTOCOL.schema).encode(patients).levels.numpy()
    rows = FEATURES.of(CELLS.of(levels))
    above = np.triu_indices(FEATURES.size, 1)
    product = rows.T @ rows
    exact = {
        "marginals": COUNTS.vector(levels),
        "moments": np.concatenate([np.diag(product), np.sqrt(2) * product[above]]),
    }
    sensitivity = {"marginals": COUNTS.sensitivity, "moments": np.sqrt(2) * FEATURES.radius**2}
    sent: dict[Step, list[np.ndarray]] = {"marginals": [], "moments": []}
    for number in range(12):
        hospital = Hospital(tmp_path / f"s{number}", POLICY).joined(PROTOCOL)
        for step, values in zip(STEPS, (COUNTS.size, MOMENTS), strict=True):
            reply = hospital.anchor(anchor_request(PROTOCOL, step, None if step == "marginals" else UNIFORM), values)
            assert reply.statistics is not None
            sent[step].append(reply.statistics[0])
    for step in STEPS:
        noise = (np.array(sent[step]) - exact[step]) / sensitivity[step]
        sigma = anchor_event(PROTOCOL.study, step).noise_multiplier
        assert np.std(noise) == pytest.approx(sigma, rel=5 / np.sqrt(2 * noise.size))
        assert abs(np.mean(noise)) < 5 * sigma / np.sqrt(noise.size)
        assert len({values.tobytes() for values in sent[step]}) == 12  # fresh noise at every site


def test_the_same_request_gets_the_same_bytes_and_other_marginals_none(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path / "anna", POLICY).joined(PROTOCOL)
    one, again = (hospital.anchor(anchor_request(PROTOCOL, "marginals"), COUNTS.size) for _ in range(2))
    assert one.statistics is not None and again.statistics is not None
    assert one.statistics.tobytes() == again.statistics.tobytes() and len(hospital.spends()) == 1
    first, repeated = (hospital.anchor(anchor_request(PROTOCOL, "moments", UNIFORM), MOMENTS) for _ in range(2))
    assert first.statistics is not None and repeated.statistics is not None
    assert first.statistics.tobytes() == repeated.statistics.tobytes() and len(hospital.spends()) == 2
    other = np.concatenate([np.eye(size)[0] for size in CELLS.sizes])
    assert hospital.anchor(anchor_request(PROTOCOL, "moments", other), MOMENTS).status is Status.WRONG_ROUND
    assert len(hospital.spends()) == 2


@pytest.mark.parametrize(
    "marginals",
    [
        np.where(np.arange(len(UNIFORM)) == 3, np.nan, UNIFORM),
        np.where(np.arange(len(UNIFORM)) == 3, -0.5, UNIFORM),
        np.zeros(len(UNIFORM)),
        2 * UNIFORM,
        UNIFORM[:-1],
    ],
)
def test_crafted_marginals_cost_nothing(tmp_path: Path, marginals: np.ndarray) -> None:
    hospital = Hospital(tmp_path / "anna", POLICY).joined(PROTOCOL)
    hospital.anchor(anchor_request(PROTOCOL, "marginals"), COUNTS.size)
    reply = hospital.anchor(anchor_request(PROTOCOL, "moments", marginals), MOMENTS)
    assert reply.status is Status.BAD_REQUEST and len(hospital.spends()) == 1


@pytest.mark.parametrize("seed", range(3))
def test_marginals_with_all_weight_in_one_cell_are_answered_under_the_radius(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sharp = np.concatenate([np.eye(size)[rng.integers(size)] for size in CELLS.sizes])
    hospital = Hospital(tmp_path / "anna", POLICY).joined(PROTOCOL)
    hospital.anchor(anchor_request(PROTOCOL, "marginals"), COUNTS.size)
    features = FeatureMap(CELLS, CELLS.split(sharp))
    reply = hospital.anchor(anchor_request(PROTOCOL, "moments", sharp), moment_size(features.size))
    assert reply.statistics is not None and np.isfinite(reply.statistics).all()


def test_the_second_message_does_not_come_first(tmp_path: Path) -> None:
    hospital = Hospital(tmp_path / "anna", POLICY).joined(PROTOCOL)
    reply = hospital.anchor(anchor_request(PROTOCOL, "moments", UNIFORM), MOMENTS)
    assert reply.status is Status.WRONG_ROUND and hospital.spends() == []


def test_a_study_without_anchor_gets_no_statistics(tmp_path: Path) -> None:
    protocol = study(study={"target": "dead"})
    hospital = Hospital(tmp_path / "anna").joined(protocol)
    reply = hospital.anchor(anchor_request(protocol, "marginals"), COUNTS.size)
    assert reply.status is Status.BAD_REQUEST and hospital.spends() == []


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ("", "mode 'anchored'"),
        (POLICY + "\nanchor = false", "answers none"),
        (POLICY + "\nmax_epsilon = 1.5", "1.5"),
    ],
)
def test_the_site_decides(tmp_path: Path, policy: str, reason: str) -> None:
    hospital = Hospital(tmp_path / "anna", policy)
    assert hospital.join(join_request(PROTOCOL)).status is Status.REFUSED_BY_POLICY
    assert reason in hospital.reason(Status.REFUSED_BY_POLICY)


def test_a_steward_can_stop_after_the_anchor(tmp_path: Path) -> None:
    """The anchor is answered; rounds are not, until the policy says so, and the decoder lies there to be looked at."""
    protocol = anchored_study(training={"mode": "constrained", "rounds": 3})
    hospital = Hospital(tmp_path / "anna", POLICY + "\nstop_after_anchor = true").joined(protocol)
    assert hospital.anchor(anchor_request(protocol, "marginals"), COUNTS.size).status is Status.OK
    assert hospital.train(train_request(1, protocol), protocol).status is Status.REFUSED_BY_POLICY
    assert "stop_after_anchor" in hospital.reason(Status.REFUSED_BY_POLICY) and len(hospital.spends()) == 1
    (kept,) = hospital.state.glob("studies/*/anchored-decoder.safetensors")
    allowed = Hospital(tmp_path / "anna", POLICY)
    assert allowed.train(train_request(1, protocol), protocol).status is Status.OK and kept.exists()


def test_only_the_statistics_differ_between_neighbouring_tables(tmp_path: Path) -> None:
    """Noise off: replies of two tables that differ in one patient, compared field by field, and the distances."""
    replies: dict[str, list[Any]] = {"a": [], "b": []}
    for name in replies:
        hospital = Hospital(tmp_path / name, POLICY)
        if name == "b":
            lines = hospital.data.read_text().splitlines()
            lines[5] = "119.5,m,true"
            hospital.data.write_text("\n".join(lines) + "\n")
        joined = hospital.join(join_request(PROTOCOL))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("client.handlers.noised_statistics", lambda exact, *_: exact)
            first = hospital.anchor(anchor_request(PROTOCOL, "marginals"), COUNTS.size)
            second = hospital.anchor(anchor_request(PROTOCOL, "moments", UNIFORM), MOMENTS)
        assert first.statistics is not None and second.statistics is not None
        replies[name] = [joined, first, second]
    assert replies["a"][0].patients == replies["b"][0].patients
    for i, sensitivity in ((1, COUNTS.sensitivity), (2, moment_sensitivity(FEATURES.radius))):
        one, other = replies["a"][i], replies["b"][i]
        assert 0 < np.linalg.norm(one.statistics - other.statistics) <= sensitivity
        assert (one.status, one.site, one.study, one.ledger_length) == (
            other.status,
            other.site,
            other.study,
            other.ledger_length,
        )
        assert one.statistics.shape == other.statistics.shape
    assert events(Hospital(tmp_path / "a", POLICY)) == events(Hospital(tmp_path / "b", POLICY))


def test_an_audit_stays_below_the_claim_and_finds_halved_noise(tmp_path: Path) -> None:
    """A likelihood-ratio test of both messages together, for the worst pair of patients found, by repetition."""
    protocol = anchored_study(anchor={"epsilon": AUDIT_EPSILON}, privacy={"delta": AUDIT_DELTA})
    encoding = TableEncoding(protocol.schema)
    grid = np.array(np.meshgrid([0.0, 60.0, 120.0, np.nan], [0.0, 1.0, np.nan], [0.0, 1.0])).reshape(3, -1).T
    marginals = CELLS.split(UNIFORM)

    def exact(patient: np.ndarray) -> list[tuple[np.ndarray, float]]:
        data = encoding.encode(Table(protocol.schema, np.vstack([grid[:3], patient[None]])))
        return [exact_statistics(protocol, data, step, None if step == "marginals" else UNIFORM) for step in STEPS]

    assert len(marginals) == 3
    everyone = [exact(patient) for patient in grid]
    apart = np.array(
        [
            [sum(((a[0] - b[0]) ** 2).sum() / a[1] ** 2 for a, b in zip(x, y, strict=True)) for y in everyone]
            for x in everyone
        ]
    )
    i, j = np.unravel_index(int(apart.argmax()), apart.shape)
    noise = [anchor_event(protocol.study, step).noise_multiplier for step in STEPS]
    claim = account([anchor_event(protocol.study, step) for step in STEPS], AUDIT_DELTA).epsilon
    assert claim == pytest.approx(AUDIT_EPSILON, rel=1e-6)

    def statistic(which: int, factor: float, seed: int) -> np.ndarray:
        """The log-likelihood ratio of what `REPETITIONS` sites with this patient send, the worst test there is."""
        found = np.zeros(REPETITIONS)
        for step, number in zip(STEPS, (0, 1), strict=True):
            (mine, sensitivity), direction = everyone[which][number], everyone[i][number][0] - everyone[j][number][0]
            event = anchor_event(protocol.study, step)
            weakened = type(event)(**{**vars(event), "noise_multiplier": event.noise_multiplier * factor})
            scale = (noise[number] * sensitivity) ** 2
            for repetition in range(REPETITIONS):
                sent = noised_statistics(mine, sensitivity, weakened, seed + 10_000 * number + repetition)
                found[repetition] += (sent - everyone[j][number][0]) @ direction / scale
        return found

    assert largest_epsilon_shown(statistic(int(i), 1.0, 1), statistic(int(j), 1.0, 5_000)) < claim
    assert largest_epsilon_shown(statistic(int(i), 0.5, 1), statistic(int(j), 0.5, 5_000)) > claim
