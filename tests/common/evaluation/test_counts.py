"""Tables of counts: one cell a patient, and noise that is one Gaussian mechanism over all of them."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.evaluation.counts import COARSE_BINS, FINE_BINS, bins_of, cells_of, count
from common.evaluation.plan import count_plan
from common.evaluation.tabulate import Sorter, tabulate
from common.privacy.holdout import holdout_slots
from common.schema import parse_schema
from common.study import Protocol
from common.table import Table
from tests.common.evaluation.evaluated import SCHEMA, evaluated_protocol, patients

COHORT = patients(400, 1)


def populations(table: Table, protocol) -> dict:
    fit, held_out = holdout_slots(protocol.digest, len(table), protocol.study.evaluation.holdout)
    return {
        "everyone": table,
        "fit": Table(table.schema, table.values[fit]),
        "holdout": Table(table.schema, table.values[held_out]),
    }


@cache
def sorters(pairs: str) -> tuple[Protocol, Sorter]:
    protocol = evaluated_protocol(pairs=pairs)
    return protocol, Sorter(protocol, COHORT)


@given(slot=st.integers(0, 79), other=st.integers(0, 10_000), pairs=st.sampled_from(["target", "all"]))
@settings(max_examples=25, deadline=None)
def test_replacing_one_patient_shifts_all_tables_by_no_more_than_the_noise_covers(
    slot: int, other: int, pairs: str
) -> None:
    """By counting two neighbouring tables; ν = 1, so the shift in units of the noise is at most 1."""
    protocol, sorter = sorters(pairs)
    table = patients(80, 2)
    neighbour = table.values.copy()
    neighbour[slot] = patients(1, other).values[0]
    vectors, tables = [], []
    for values in (table.values, neighbour):
        counts = sorter.count(populations(Table(SCHEMA, values), protocol))
        vectors.append(sorter.plan.join(counts))
        tables.append(counts)
    for key, before in tables[0].items():
        # One patient out of one cell and into another, or back into his own.
        moved = np.sort((tables[1][key] - before).ravel())
        assert not moved[1:-1].any() and (moved[0], moved[-1]) in ((0, 0), (-1, 1)), key
    assert {key[0] for key in tables[0]} >= {"membership", "linkability", "inference", "utility"}
    shift = np.linalg.norm((vectors[0] - vectors[1]) / count_plan(protocol).deviations(1.0))
    assert shift <= 1.0 + 1e-9


def test_a_patient_who_differs_in_every_table_uses_the_whole_budget() -> None:
    protocol = evaluated_protocol(groups=[])
    plan = count_plan(protocol)
    sigma = {key: part.flat[0] for key, part in plan.split(plan.deviations(2.0)).items()}
    shares = [2 / sigma[t.key] ** 2 for t in plan.tables if t.population in ("everyone", "holdout")]
    assert len(shares) > 5 and np.sqrt(sum(shares)) == pytest.approx(1 / 2.0)


@pytest.mark.parametrize("target", [True, False])
def test_those_who_took_part_may_cost_what_those_held_out_cost(target: bool) -> None:
    """Nobody is both, so that the tables of one group leave the noise of the other's as it is."""
    schema = SCHEMA if target else parse_schema({"fields": SCHEMA.descriptor["fields"]})
    protocol = Protocol(evaluated_protocol(groups=[], secrets=["stage"]).study, schema)
    plan = count_plan(protocol)
    totals = {of: sum(t.weight for t in plan.tables if t.population == of) for of in ("fit", "holdout")}
    assert totals["fit"] == pytest.approx(totals["holdout"]) and totals["fit"] > 2
    keys = {of: {t.key[:-1] for t in plan.tables if t.key[-1] == of} for of in ("fit", "holdout")}
    assert keys["fit"] == keys["holdout"] and ("inference", "stage") in keys["fit"]


def test_the_worst_replacement_of_a_patient_is_found_and_is_covered() -> None:
    """Brute force over many tables that differ in one patient, of either group: near the bound, and never above."""
    protocol = evaluated_protocol()
    table, cohort = patients(40, 2), patients(60, 1)
    fit, held_out = holdout_slots(protocol.digest, 40, 0.25)
    others = np.vstack([patients(150, 9).values, cohort.values])
    sorter = Sorter(protocol, cohort)
    sigma, worst = sorter.plan.deviations(1.0), {}
    for group, slot in (("fit", fit[0]), ("holdout", held_out[0])):
        vectors = []
        for row in others:
            values = table.values.copy()
            values[slot] = row
            vectors.append(sorter.plan.join(sorter.count(populations(Table(SCHEMA, values), protocol))))
        scaled = np.array(vectors) / sigma
        squares = (scaled**2).sum(axis=1)
        distances = squares[:, None] + squares - 2 * scaled @ scaled.T
        worst[group] = float(np.sqrt(distances.max()))
    assert all(0.9 < shift <= 1 + 1e-9 for shift in worst.values()), worst


def test_every_table_counts_every_patient_of_its_population_once() -> None:
    protocol = evaluated_protocol()
    parts = populations(patients(120, 3), protocol)
    plan, counts = tabulate(protocol, COHORT, parts)
    assert {table.key: counts[table.key].sum() for table in plan.tables} == {
        table.key: len(parts[table.population]) for table in plan.tables
    }


def test_bins_have_equal_width_on_the_declared_scale() -> None:
    age = SCHEMA["age"]
    values = np.array([18.0, 18.0 + 80 / FINE_BINS - 1e-9, 18.0 + 80 / FINE_BINS + 1e-9, 98.0])
    assert cells_of(values, age).tolist() == [0, 0, 1, FINE_BINS - 1]
    assert bins_of(age) == FINE_BINS and bins_of(SCHEMA["creatinine"], coarse=True) == COARSE_BINS + 1
    assert cells_of(np.array([np.nan]), SCHEMA["creatinine"]).tolist() == [FINE_BINS]


@given(st.lists(st.floats(18, 98), min_size=1, max_size=30))
def test_coarse_bins_are_whole_numbers_of_fine_ones(values: list[float]) -> None:
    fine, coarse = (cells_of(np.array(values), SCHEMA["age"], coarse=coarse) for coarse in (False, True))
    assert (fine // (FINE_BINS // COARSE_BINS) == coarse).all()


def test_a_required_value_that_is_missing_is_an_error() -> None:
    with pytest.raises(ValueError, match="required"):
        cells_of(np.array([np.nan]), SCHEMA["age"])


def test_cells_outside_the_table_are_an_error() -> None:
    with pytest.raises(ValueError, match="outside"):
        count(np.array([4]), (2, 2))


def test_without_holdout_nothing_is_counted_over_held_out_patients() -> None:
    plan = count_plan(evaluated_protocol(holdout=0.0, groups=[]))
    assert {table.population for table in plan.tables} == {"everyone"}


def test_a_vector_of_another_length_is_refused() -> None:
    plan = count_plan(evaluated_protocol())
    with pytest.raises(ValueError, match="cells"):
        plan.split(np.zeros(plan.size + 1))


def test_a_cohort_with_one_outcome_class_allows_no_utility_table() -> None:
    protocol = evaluated_protocol()
    values = COHORT.values.copy()
    values[:, SCHEMA.index("died")] = 1.0
    plan, counts = tabulate(protocol, Table(SCHEMA, values), populations(patients(60, 4), protocol))
    zeros = [table.key for table in plan.tables if not counts[table.key].any()]
    assert {key[0] for key in zeros} == {"utility", "group"}


def test_a_cohort_of_few_rows_fills_no_table_of_attacks() -> None:
    protocol = evaluated_protocol()
    _, counts = tabulate(protocol, patients(19, 3), populations(patients(60, 4), protocol))
    empty = {key[0] for key, table in counts.items() if not table.any()}
    assert {"membership", "linkability", "inference"} <= empty and "marginal" not in empty


def test_columns_that_a_site_withholds_are_not_what_attacks_go_by() -> None:
    protocol = evaluated_protocol()
    values = COHORT.values[:200].copy()
    values[:, SCHEMA.index("creatinine")] = np.nan
    parts = populations(Table(SCHEMA, values), protocol)
    counts = [tabulate(protocol, COHORT, parts, withheld)[1] for withheld in ((), ("creatinine",))]
    copies = [found["membership", "distance", "fit"][-1] for found in counts]
    assert copies[0] < 60 and copies[1] == len(parts["fit"])
