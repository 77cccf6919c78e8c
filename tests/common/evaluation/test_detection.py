import numpy as np
import pytest

from common.errors import DataError
from common.evaluation.detection import detect
from common.table import Table
from tests.common.evaluation.evaluated import SCHEMA, patients


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_patients_cannot_be_told_from_other_patients() -> None:
    found = detect(patients(1500, 0), patients(1800, 1), rng())
    assert found.auroc is not None and found.rows == 1500
    assert found.auroc.low < 0.5 < found.auroc.high + 0.02
    assert 0.03 < found.auroc.high - found.auroc.low < 0.08


def test_the_column_that_gives_the_rows_away_is_named() -> None:
    synthetic = patients(800, 0)
    synthetic.values[:, 1] = np.clip(synthetic.values[:, 1] * 3, 0.1, 20)
    found = detect(synthetic, patients(800, 1), rng())
    assert found.auroc is not None and found.auroc.low > 0.7
    assert found.columns[0].column == "creatinine" and found.columns[0].drop > 0.15
    assert all(each.drop < 0.02 for each in found.columns[1:])


def test_a_lost_relation_is_found_though_no_column_alone_differs() -> None:
    synthetic = patients(3000, 0)
    synthetic.values[:, 4] = rng().permutation(synthetic.values[:, 4])
    found = detect(synthetic, patients(3000, 1), rng())
    assert found.auroc is not None and found.auroc.low > 0.6
    assert {each.column for each in found.columns[:2]} <= {"age", "died", "stage"}


def test_digits_that_no_laboratory_prints_tell_unless_values_are_binned() -> None:
    synthetic, real = patients(1500, 0), patients(1500, 1)
    real.values[:, 1] = np.clip(np.round(real.values[:, 1] * 2) / 2, 0.1, 20)
    exact, binned = (detect(synthetic, real, rng(), values=kind) for kind in ("exact", "binned"))
    assert exact.auroc is not None and binned.auroc is not None
    assert exact.auroc.low > 0.7 and exact.columns[0].column == "creatinine"
    assert binned.auroc.high < 0.7


def test_copies_of_the_patients_push_the_auroc_below_a_half() -> None:
    real = patients(1000, 0)
    found = detect(Table(SCHEMA, real.values.copy()), real, rng())
    assert found.auroc is not None and found.auroc.high < 0.45


def test_the_same_seed_gives_the_same_answer() -> None:
    a, b = patients(100, 0), patients(100, 1)
    assert detect(a, b, rng()) == detect(a, b, rng())
    assert detect(patients(400, 0), patients(400, 1), rng(), most_rows=100).rows == 100


def test_what_is_too_small_or_empty_says_why() -> None:
    few = detect(patients(30, 0), patients(400, 1), rng())
    assert few.auroc is None and "30 rows" in few.reason
    blank = Table(SCHEMA, np.full((100, 5), np.nan))
    assert "no column has a value" in detect(blank, blank, rng()).reason
    hollow = patients(100, 0)
    hollow.values[:, 1] = np.nan
    found = detect(hollow, patients(100, 1), rng())
    assert found.auroc is not None and found.columns[0].column == "creatinine"
    # Known in one row only: some folds are trained without a value.
    rare, blank = patients(60, 0), patients(60, 1)
    for table in (rare, blank):
        table.values[:, 1] = np.nan
    rare.values[0, 1] = 1.0
    assert detect(rare, blank, rng()).auroc is not None
    with pytest.raises(DataError, match="no rows"):
        detect(Table(SCHEMA, np.empty((0, 5))), patients(5, 0), rng())
