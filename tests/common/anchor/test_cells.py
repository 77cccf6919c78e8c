import numpy as np
import pytest

from common.anchor.cells import TableCells
from tests.common.anchor.anchored import SCHEMA, corners, levels_of, patients

CELLS = TableCells(SCHEMA, "dead")


def test_a_column_has_a_cell_for_every_level_and_one_for_missing() -> None:
    assert CELLS.sizes == [2, 81, 65, 4, 3, 4]
    assert CELLS.target == 0 and TableCells(SCHEMA, None).target is None


@pytest.mark.parametrize("table", [patients(500, 0), corners()])
def test_levels_and_cells_say_the_same(table: object) -> None:
    levels = levels_of(table)  # type: ignore[arg-type]
    cells = CELLS.of(levels)
    assert np.array_equal(CELLS.levels(cells), levels)
    for j, size in enumerate(CELLS.sizes):
        assert cells[:, j].min() >= 0 and cells[:, j].max() < size


def test_missing_is_the_last_cell() -> None:
    table = patients(500, 0)
    cells = CELLS.of(levels_of(table))
    for j, column in enumerate(CELLS.columns):
        assert np.array_equal(cells[:, j] == column.known, np.isnan(table.values[:, j]))


def test_a_flat_vector_is_split_by_column() -> None:
    parts = CELLS.split(np.arange(sum(CELLS.sizes), dtype=float))
    assert [len(part) for part in parts] == CELLS.sizes and parts[2][0] == 83
