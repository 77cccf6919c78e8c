from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from common.errors import DataError
from common.evaluation.missingness import compare_missingness
from common.evaluation.pairs import compare_correlations, compare_pairs, expected_distance
from common.schema import parse_schema
from common.table import Table
from tests.common.evaluation.evaluated import SCHEMA, patients


def cell(value: float, low: float, high: float) -> str:
    if np.isnan(value):
        return "missing"
    return str(min(int((value - low) / (high - low) * 4), 3))


def words(table: Table) -> list[tuple[str, ...]]:
    """Every row as the names of its coarse cells, without the product's own binning."""
    return [
        (cell(row[0], 18, 98), cell(row[1], 0.1, 20), *("missing" if np.isnan(v) else str(int(v)) for v in row[2:]))
        for row in table.values
    ]


def test_every_pair_agrees_with_counting_words() -> None:
    a, b = patients(300, 0), patients(200, 1)
    one, two = words(a), words(b)
    expected = {}
    for i, j in combinations(range(5), 2):
        p, q = (Counter((row[i], row[j]) for row in side) for side in (one, two))
        distance = sum(abs(p[k] / 300 - q[k] / 200) for k in p.keys() | q.keys()) / 2
        expected[SCHEMA.names[i], SCHEMA.names[j]] = distance
    found = compare_pairs(a, b)
    assert found.pairs == 10 and found.mean == pytest.approx(np.mean(list(expected.values())))
    assert {pair.columns: pair.value for pair in found.worst} == pytest.approx(expected)
    above = [pair.value - pair.chance for pair in found.worst]
    assert above == sorted(above, reverse=True)


def test_chance_is_what_two_halves_of_one_population_differ_by() -> None:
    found = [compare_pairs(patients(600, 2 * seed), patients(400, 2 * seed + 1)) for seed in range(15)]
    values, chances = ([getattr(each, name) for each in found] for name in ("mean", "chance_mean"))
    assert np.mean(values) == pytest.approx(np.mean(chances), rel=0.1)


def test_the_expected_distance_of_one_fair_coin() -> None:
    # Both shares differ by the same amount, a normal of variance 1/4 (1/n + 1/m).
    found = expected_distance(np.array([500.0, 500.0]), np.array([200.0, 200.0]))
    assert found == pytest.approx(stats.halfnorm.mean(scale=np.sqrt(0.25 * (1 / 1000 + 1 / 400))))


def test_independent_columns_are_the_worst_pair_where_a_relation_is_lost() -> None:
    real = patients(3000, 3)
    broken = Table(SCHEMA, real.values.copy())
    rng = np.random.default_rng(0)
    broken.values[:, 4] = rng.permutation(broken.values[:, 4])
    found = compare_pairs(broken, real)
    assert found.worst[0].columns == ("age", "died") and found.worst[0].value > 5 * found.worst[0].chance


def test_one_column_has_no_pair_and_foreign_tables_are_refused() -> None:
    lone = parse_schema({"fields": [{"name": "b", "type": "boolean"}]})
    table = Table(lone, np.array([[0.0], [1.0]]))
    found = compare_pairs(table, table)
    assert found.mean is None and "one column" in found.reason
    assert "fewer than two features" in compare_correlations(table, table).reason
    with pytest.raises(DataError, match="different schemas"):
        compare_pairs(table, patients(5, 0))
    with pytest.raises(DataError, match="no rows"):
        compare_pairs(Table(SCHEMA, np.empty((0, 5))), patients(5, 0))


def test_a_required_column_that_a_site_withheld_is_compared_as_missing() -> None:
    withheld = patients(50, 0)
    withheld.values[:, 0] = np.nan
    assert compare_pairs(withheld, patients(50, 1)).worst[0].value == pytest.approx(1.0)


def test_the_correlations_are_pearsons_of_the_named_features() -> None:
    a, b = patients(300, 4), patients(200, 5)
    found = compare_correlations(a, b)
    assert found.features == ("age", "creatinine", "sex=m", "stage=I", "stage=II", "stage=III", "died=true")
    i, j = found.features.index("age"), found.features.index("stage=II")
    for table, matrix in ((a, found.synthetic), (b, found.real)):
        assert matrix[i, j] == pytest.approx(np.corrcoef(table["age"], table["stage"] == 1)[0, 1])
        assert np.diag(matrix) == pytest.approx(np.ones(7))
    few = compare_correlations(a, b, most=3)
    assert (len(few.features), few.left_out, few.synthetic.shape) == (3, 4, (3, 3))


def test_patterns_of_missing_values_are_compared_as_whole_rows() -> None:
    a, b = patients(300, 6), patients(200, 7)
    p, q = (Counter(tuple(row) for row in np.isnan(t.values).tolist()) for t in (a, b))
    found = compare_missingness(a, b)
    assert found.cells == len(p.keys() | q.keys()) and found.others == (0.0, 0.0)
    assert found.patterns == pytest.approx(sum(abs(p[k] / 300 - q[k] / 200) for k in p.keys() | q.keys()) / 2)
    both = [np.mean(np.isnan(t["creatinine"]) & np.isnan(t["stage"])) for t in (a, b)]
    values = {pair.columns: pair.value for pair in found.worst}
    assert values["creatinine", "stage"] == pytest.approx(abs(both[0] - both[1]))
    assert found.together == pytest.approx(np.mean(list(values.values()))) and found.pairs == 3
    names = ("creatinine", "stage", "died")
    for pattern in found.common:
        lacks = tuple(name in pattern.columns for name in SCHEMA.names)
        assert (pattern.synthetic, pattern.real) == pytest.approx((p[lacks] / 300, q[lacks] / 200), abs=5e-5)
        assert set(pattern.columns) <= set(names)
    assert len(found.common) == min(found.cells, 12) and found.common[0].columns == ()


def test_values_that_go_missing_together_are_seen_where_rates_agree() -> None:
    rng = np.random.default_rng(8)
    apart, joint = patients(2000, 8), patients(2000, 9)
    for table, same in ((apart, False), (joint, True)):
        gone = rng.random(2000) < 0.3
        for column in (1, 3):
            table.values[:, column] = np.where(gone, np.nan, 1.0)
            gone = gone if same else rng.random(2000) < 0.3
    found = compare_missingness(apart, joint)
    assert found.patterns is not None and found.patterns > 0.3
    assert found.worst[0].columns == ("creatinine", "stage")
    assert found.worst[0].value == pytest.approx(0.3 - 0.09, abs=0.04)


def test_rare_patterns_share_a_cell_and_complete_tables_have_none() -> None:
    fields = [{"name": f"c{j}", "type": "boolean"} for j in range(12)]
    schema = parse_schema({"fields": fields})
    rng = np.random.default_rng(10)
    a, b = (Table(schema, np.where(rng.random((500, 12)) < 0.5, np.nan, 1.0)) for _ in range(2))
    found = compare_missingness(a, b)
    assert found.cells == 50 and min(found.others) > 0.5 and found.patterns is not None and found.patterns <= 1
    whole = Table(schema, np.ones((5, 12)))
    assert compare_missingness(whole, whole).reason and compare_missingness(whole, whole).patterns is None
