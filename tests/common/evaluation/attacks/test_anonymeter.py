"""Our three Anonymeter attacks against Anonymeter itself, which needs an environment of its own (numpy < 1.27).

Set COHORTIUM_ANONYMETER_PYTHON to the Python of such an environment; without it these tests are skipped.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.arrow import to_arrow
from common.evaluation.attacks.counts import AttackCounts
from common.evaluation.attacks.inference import infer
from common.evaluation.attacks.linkability import link
from common.evaluation.attacks.risk import excess
from common.evaluation.attacks.singling_out import single_out
from common.table import Table
from tests.common.evaluation.attacks.patients import columns_of, head, levels, number, population, with_rows

PYTHON = os.environ.get("COHORTIUM_ANONYMETER_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="COHORTIUM_ANONYMETER_PYTHON names no Python with Anonymeter")
RUNNER = Path(__file__).with_name("run_anonymeter.py")
SCHEMA = columns_of(
    *(number(f"n{i}") for i in range(5)), levels("c", "p", "q", "r"), levels("d", "p", "q"), levels("e", *"stuvw")
)
LEFT, RIGHT = ["n0", "n2", "n4", "d"], ["n1", "n3", "c", "e"]
PREDICATES = 400


@pytest.fixture(scope="module", params=["independent", "leaky"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Ours and Anonymeter's counts on the same tables."""
    train, control, synthetic = (population(600, seed, SCHEMA) for seed in (1, 2, 3))
    for seed, table in enumerate((train, control, synthetic)):
        # Finer than the simulator rounds, so that no two rows are equally near.
        table.values[:, :5] = np.clip(
            table.values[:, :5] + np.random.default_rng(seed).uniform(-0.05, 0.05, (600, 5)), 0, 1
        )
    if request.param == "leaky":
        synthetic = with_rows(synthetic, head(train, 200))
    # Anonymeter divides by the observed range: make it the declared one.
    synthetic.values[-2:, :5] = np.array([0.0, 1.0])[:, None]
    folder = tmp_path_factory.mktemp("tables")
    for name, table in (("synthetic", synthetic), ("train", train), ("control", control)):
        to_arrow(table).to_pandas().to_csv(folder / f"{name}.csv", index=False, float_format="%.17g")
    spec = {"categories": ["c", "d", "e"], "k": [1, 10], "left": LEFT, "right": RIGHT, "predicates": PREDICATES}
    (folder / "spec.json").write_text(json.dumps(spec))
    output = subprocess.run([PYTHON, str(RUNNER), str(folder)], check=True, capture_output=True, text=True).stdout
    return ours(synthetic, train, control), json.loads(output)


def ours(synthetic: Table, train: Table, control: Table) -> dict[str, AttackCounts]:
    rng = np.random.default_rng(0)
    results = [
        *link(synthetic, train, control, rng, columns=(LEFT, RIGHT)),
        *infer(synthetic, train, control, rng, secrets=["c", "d", "e"]),
        *single_out(synthetic, train, control, rng, predicates=PREDICATES),
    ]
    found = {}
    for each in results:
        assert isinstance(each, AttackCounts)
        suffix = each.secret or (each.setting.removeprefix("k=") if each.attack == "linkability" else "")
        found[f"{each.attack} {suffix}".strip()] = each
    return found


def test_linkability_and_inference_count_the_same_patients(both: Any) -> None:
    mine, theirs = both
    names = [name for name in theirs if not name.startswith("singling")]
    assert len(names) == 5
    for name in names:
        counts, other = mine[name], theirs[name]
        assert (counts.successes, counts.control_successes) == (other["successes"], other["control"]), name


def test_the_excess_risk_is_theirs(both: Any) -> None:
    mine, theirs = both
    for name, other in theirs.items():
        counts = mine[name]
        if (counts.successes, counts.control_successes) != (other["successes"], other["control"]):
            continue  # random predicates
        found = excess(counts)
        assert found is not None
        expected = [min(max(each, 0), 1) for each in (found.value, found.low, found.high)]
        assert expected == pytest.approx(other["risk"], abs=1e-9), name


def test_singling_out_succeeds_about_as_often(both: Any) -> None:
    mine, theirs = both
    for name in ("singling_out_univariate", "singling_out_multivariate"):
        counts, other = mine[name], theirs[name]
        assert counts.guesses == PREDICATES
        assert counts.successes / PREDICATES == pytest.approx(other["successes"] / PREDICATES, abs=0.1), name
        assert counts.control_successes / PREDICATES == pytest.approx(other["control"] / PREDICATES, abs=0.1), name
