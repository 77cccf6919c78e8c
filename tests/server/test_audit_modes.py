"""The audit on real training: it finds what an overfitted reference remembers, and stays below what DP-SGD claims."""

from typing import Any

import numpy as np

from common.encoding import TableEncoding
from common.evaluation.audit import Bound, audit_scores, declared_guesses, epsilon_bound, strongest
from common.evaluation.canaries import draw_canaries
from common.evaluation.canary_scores import SEEN_BY, cohort_scores, message_scores, paired, reconstruction
from common.generation import sample_prior
from common.schema import parse_schema
from common.study import Protocol, Study
from common.table import Table
from server.checkpoint import build_decoder
from tests.in_process import federate

STRICT = 0.001
EPSILONS = (0.5, 1.0, 2.0)
DELTA = 1e-8  # at the strict level a larger one would leave the δ term no room
SCHEMA = parse_schema(
    {
        "fields": [
            *({"name": f"x{i}", "type": "number", "constraints": {"minimum": 0, "maximum": 1}} for i in range(4)),
            *({"name": f"b{i}", "type": "boolean"} for i in range(6)),
            *({"name": f"c{i}", "type": "string", "constraints": {"enum": list("abcd")}} for i in range(3)),
        ]
    }
)


def make_table(rows: int, seed: int) -> Table:
    """Columns that follow one hidden severity, nowhere near a corner of the table."""
    random = np.random.default_rng(seed)
    severity = random.normal(size=(rows, 1))
    numbers = np.clip(0.5 + 0.1 * severity + random.normal(0, 0.05, (rows, 4)), 0, 1)
    flags = (severity + random.normal(0, 0.3, (rows, 6)) > 0).astype(float)
    wards = np.clip(np.round(1.5 + severity + random.normal(0, 0.3, (rows, 3))), 0, 3)
    return Table(SCHEMA, np.hstack([numbers, flags, wards]))


def make_protocol(mode: str, **sections: dict[str, Any]) -> Protocol:
    document: dict[str, Any] = {
        "study": {"name": "s", "schema": "s.json", "seed": 1},
        "model": {"latent_dim": 8, "hidden": [64, 64]},
        "training": {"mode": mode, "batch_size": 32, "min_sites": 2},
        "privacy": {"delta": DELTA},
    }
    merged = {name: values | sections.get(name, {}) for name, values in document.items()}
    return Protocol(Study.model_validate(merged), SCHEMA)


def attacked(
    mode: str, patients: int, number: int, epochs: int, level: float, epsilon: float | None = None
) -> dict[str, Bound]:
    """The strongest bound of every score; together they are wrong with probability `level` at most."""
    training = {"rounds": 10, "local_epochs": epochs, "learning_rate": 0.005}
    privacy = {} if epsilon is None else {"epsilon": epsilon}
    protocol = make_protocol(mode, training=training, privacy=privacy)
    canaries = draw_canaries(SCHEMA, patients, number, 2)
    tables = {"audited": canaries.plant(make_table(patients, 0)), "other": make_table(60, 1)}
    trained = federate(protocol, tables, "audited")

    encoding = TableEncoding(SCHEMA)
    rows = Table(SCHEMA, np.vstack([canaries.first.values, canaries.second.values]))
    levels = encoding.encode(rows).levels
    cohort = Table(SCHEMA, np.vstack([t.values for t in sample_prior(trained.decoder, encoding, 2000, 3)]))
    values = cohort_scores(cohort, rows) | {"reconstruction": reconstruction(trained.decoder, levels)}
    values |= message_scores(trained.rounds, build_decoder(protocol, 0), levels)
    assert values.keys() == SEEN_BY.keys()
    return {
        name: strongest(
            audit_scores(paired(v), canaries.coins, declared_guesses(number), delta=DELTA, level=level / len(SEEN_BY))
        )
        for name, v in values.items()
    }


def test_what_an_overfitted_reference_remembers_is_found() -> None:
    """No constraint, 400 passes over a small table: its decoder knows nearly every canary, and so does its cohort."""
    found = attacked("none", 160, 40, epochs=40, level=STRICT)
    assert found["reconstruction"].epsilon > 0.5 and found["site's decoders"].epsilon > 0.5
    assert found["reconstruction"].correct >= 0.9 * found["reconstruction"].guesses


def test_dpsgd_stays_below_its_claim_at_every_epsilon() -> None:
    for epsilon in EPSILONS:
        found = attacked("dpsgd", 400, 100, epochs=2, level=STRICT / len(EPSILONS), epsilon=epsilon)
        reachable = epsilon_bound(100, 100, 100, delta=DELTA, level=found["updates"].level).epsilon
        assert reachable > epsilon  # so that this could have failed
        assert max(bound.epsilon for bound in found.values()) <= epsilon
