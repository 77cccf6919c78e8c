from __future__ import annotations

import numpy as np
import pytest

from common.anchor.cells import ColumnCells, TableCells
from common.anchor.features import FeatureMap, Kind
from common.anchor.moments import moment_vector, unpack
from common.encoding import TableEncoding
from server.anchor.copula import ColumnMap, Copula
from server.anchor.fit import fit_copula, nearest_correlation, tilted
from tests.common.anchor.anchored import SCHEMA, levels_of, patients

ROWS = 6000
LEVELS = levels_of(patients(ROWS, 0))


def fitted(target: str | None = "dead") -> tuple[FeatureMap, Copula]:
    cells = TableCells(SCHEMA, target)
    counts = [np.bincount(cells.of(LEVELS)[:, j], minlength=size) + 1e-3 for j, size in enumerate(cells.sizes)]
    marginals = [count / count.sum() for count in counts]
    features = FeatureMap(cells, marginals)
    wanted = unpack(moment_vector(features, LEVELS), features.size) / ROWS
    return features, fit_copula(features, marginals, wanted, seed=0).copula


@pytest.mark.parametrize("target", ["dead", None])
def test_its_rows_have_the_marginals_and_moments_that_were_wanted(target: str | None) -> None:
    features, copula = fitted(target)
    cells = copula.sample_cells(20_000, np.random.default_rng(1))
    true = features.cells.of(LEVELS)
    for j, size in enumerate(features.cells.sizes):
        shares = [np.bincount(found[:, j], minlength=size) / len(found) for found in (cells, true)]
        assert np.abs(np.cumsum(shares[0] - shares[1])).max() < 0.03
    moments = [features.of(found).T @ features.of(found) / len(found) for found in (cells, true)]
    # Curvatures of two columns other than the target are sent and have no parameter in a Gaussian copula.
    plain = np.array([kind is not Kind.CURVATURE for kind in features.kinds])
    between = (features.owner[:, None] != features.owner[None, :]) & plain[:, None] & plain[None, :]
    weights = np.outer(features.weights, features.weights)
    difference = np.abs((moments[0] - moments[1]) / weights)[between]
    independent = np.abs(moments[1] / weights)[between]
    clear = independent > 0.1  # several times what chance makes of 6,000 patients
    assert clear.sum() >= 10 and difference[clear].mean() < 0.15 * independent[clear].mean()
    assert difference.mean() < 0.02


def test_rows_fit_the_schema_and_the_seed() -> None:
    _, copula = fitted()
    one, again, other = (np.vstack([t.values for t in copula.sample(300, seed)]) for seed in (3, 3, 4))
    assert np.array_equal(one, again, equal_nan=True) and not np.array_equal(one, other, equal_nan=True)
    assert copula.largest_singular_value == pytest.approx(np.linalg.norm(copula.loading, 2))
    assert np.allclose(np.diag(copula.loading @ copula.loading.T), 1.0)
    assert len(copula.loading) == sum(column.dims for column in copula.columns)


def test_the_outcome_goes_with_what_it_goes_with_in_patients() -> None:
    """A logistic regression fitted to the copula's rows ranks other patients as one fitted to patients does."""
    from common.evaluation.utility import train_and_test
    from common.table import Table

    _, copula = fitted()
    rows = Table(SCHEMA, np.vstack([table.values for table in copula.sample(6000, 0)]))
    test = patients(3000, 9)
    synthetic, real = (train_and_test(train, test, "dead", 0) for train in (rows, patients(ROWS, 0)))
    assert synthetic.logistic_regression is not None and real.logistic_regression is not None
    assert synthetic.logistic_regression > real.logistic_regression - 0.02


def test_thresholds_give_each_level_its_probability() -> None:
    """The sticks of a column of categories, with a remainder that is drawn, and the bins of a number, by class."""
    rng = np.random.default_rng(0)
    codes, classes = rng.standard_normal((200_000, 13)), (rng.random(200_000) < 0.3).astype(np.int64)
    for numeric, known, order in ((False, 20, tuple(range(20))), (True, 20, ())):
        conditional = rng.dirichlet(np.ones(known + 1), size=2).T
        column = ColumnMap(ColumnCells("c", known, True, numeric, 0), conditional, order)
        cells = column.cells(codes[:, : column.dims], classes, rng)
        for label in (0, 1):
            found = np.bincount(cells[classes == label], minlength=known + 1) / (classes == label).sum()
            assert np.abs(found - conditional[:, label]).max() < 0.006


def test_tilting_keeps_the_mixture_of_the_classes() -> None:
    rng = np.random.default_rng(0)
    marginal, classes = rng.dirichlet(np.ones(30)), np.array([0.7, 0.3])
    found = tilted(marginal, rng.normal(size=(30, 2)) * 0.5, classes)
    assert np.allclose(found.sum(axis=0), 1.0) and np.abs(found @ classes - marginal).max() < 0.01


def test_the_nearest_correlation_is_one() -> None:
    wild = np.array([[1.0, 0.95, -0.9], [0.95, 1.0, 0.9], [-0.9, 0.9, 1.0]])
    found = nearest_correlation(wild)
    assert np.allclose(np.diag(found), 1.0) and np.linalg.eigvalsh(found).min() > 0
    already = np.array([[1.0, 0.3], [0.3, 1.0]])
    assert np.allclose(nearest_correlation(already), already)


def test_columns_without_any_code_are_drawn_too() -> None:
    from common.schema import parse_schema

    schema = parse_schema(
        {"fields": [{"name": "x", "type": "string", "constraints": {"enum": ["only"], "required": True}}]}
    )
    cells = TableCells(schema, None)
    features = FeatureMap(cells, [np.ones(1)])
    copula = fit_copula(features, [np.ones(1)], np.zeros((0, 0)), 0).copula
    (table,) = copula.sample(5, 0)
    assert table.values.tolist() == [[0.0]] * 5 and TableEncoding(schema).blocks[0].size == 1
