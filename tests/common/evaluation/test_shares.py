"""Shares of pooled counts: without noise they are those of the patients, with noise they are shares all the same."""

import numpy as np
import pytest

from common.evaluation.counts import FINE_BINS
from common.evaluation.marginals import bin_labels
from common.evaluation.plan import count_plan
from common.evaluation.pooled import pool
from common.evaluation.results import populations_of
from common.evaluation.shares import marginal_shares
from common.evaluation.tabulate import tabulate
from common.table import Table
from tests.common.evaluation.evaluated import SCHEMA, evaluated_protocol, patients


def pooled_counts(sigma: float) -> tuple[dict, Table, Table]:
    protocol, cohort, real = evaluated_protocol(), patients(300, 1), patients(500, 2)
    parts = {"everyone": real, "fit": real, "holdout": real}
    plan, counts = tabulate(protocol, cohort, parts)  # type: ignore[arg-type]
    noise = sigma * np.random.default_rng(0).standard_normal(plan.size)
    own = tabulate(protocol, cohort, {"everyone": cohort, "fit": cohort, "holdout": cohort})[1]
    deviations = np.full(plan.size, sigma)
    found = pool(plan, {"anna": plan.join(counts) + noise}, {"anna": populations_of(protocol, 500)}, deviations)
    assert count_plan(protocol) == plan
    return marginal_shares(SCHEMA, found, own), cohort, real


def test_without_noise_they_are_the_patients_own() -> None:
    shares, cohort, real = pooled_counts(0.0)
    assert list(shares) == list(SCHEMA.names)
    for level in (0, 1, 2):
        assert shares["stage"]["real"][level] == pytest.approx(np.mean(real["stage"] == level), abs=5e-5)
        assert shares["stage"]["synthetic"][level] == pytest.approx(np.mean(cohort["stage"] == level), abs=5e-5)
    assert shares["stage"]["real_missing"] == pytest.approx(np.isnan(real["stage"]).mean(), abs=5e-5)
    assert shares["age"]["labels"] == list(bin_labels(SCHEMA["age"], FINE_BINS)) and shares["age"]["real_missing"] == 0


def test_noised_counts_become_shares() -> None:
    for one in pooled_counts(30.0)[0].values():
        sides = (one["real"], one["real_missing"]), (one["synthetic"], one["synthetic_missing"])
        for side, missing in sides:
            assert min(side) >= 0 and sum(side) + missing == pytest.approx(1, abs=2e-3)


def test_a_column_that_no_site_showed_is_left_out() -> None:
    protocol, cohort = evaluated_protocol(method="unnoised", groups=[]), patients(300, 1)
    plan, own = tabulate(protocol, cohort, {"everyone": cohort, "fit": cohort, "holdout": cohort})
    hidden = {
        key: np.full_like(values, np.nan) if key == ("marginal", "age") else values for key, values in own.items()
    }
    found = pool(plan, {"anna": plan.join(hidden)}, {"anna": populations_of(protocol, 300)}, None)
    assert "age" not in marginal_shares(SCHEMA, found, own) and "sex" in marginal_shares(SCHEMA, found, own)
