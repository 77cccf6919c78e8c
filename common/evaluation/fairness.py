"""The same scores by group: is the cohort as good for women as for men, for the old as for the young, for every site?

Groups with fewer than `FLOOR` patients are suppressed, and so many more that none can be computed from the total. That
is disclosure control, not privacy. Every number is an un-noised aggregate of patients (privacy.md, section 0).
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from common.encoding.number import from_unit
from common.errors import DataError
from common.evaluation.attacks.risk import Estimate
from common.evaluation.auroc import auroc_estimate, delong
from common.evaluation.calibration import calibration_of, predicted_levels
from common.evaluation.counts import COARSE_BINS, bins_of, cells_of, count
from common.evaluation.fidelity import check_comparable
from common.evaluation.outcome_models import OutcomeModel
from common.evaluation.pairs import distance_of_counts, expected_distance, nullable
from common.evaluation.suppression import hidden_cells
from common.schema import EPOCH, Column
from common.table import Table

FLOOR = 11
SITE = "site"  # the column under which sites are reported
HIDDEN = f"suppressed: fewer than {FLOOR} patients, or the number of a group that has fewer would follow"


@dataclass(frozen=True)
class GroupUtility:
    """AUROC (interval by DeLong) and calibration in the large of one model in one group; None if `reason` says why.

    `trained_on` is "tstr" (synthetic rows) or "trtr" (patients).
    """

    trained_on: str
    level: str
    auroc: Estimate | None
    intercept: Estimate | None
    reason: str = ""


@dataclass(frozen=True)
class Group:
    """One group: how many patients the cohort was learned from and how many held-out ones it has; None is suppressed.

    `distance` is the mean total variation over columns between synthetic rows and patients of the group, on the coarse
    grid, `chance` what chance alone would give. A site's patients are compared with all synthetic rows.
    """

    column: str
    group: str
    patients: int | None
    held_out: int | None
    synthetic: int
    distance: float | None
    chance: float | None
    utility: tuple[GroupUtility, ...]
    reason: str = ""


def by_group(
    synthetic: Table,
    real: Table,
    test: Table | None,
    groups: Sequence[str],
    *,
    target: str | None = None,
    models: Mapping[str, OutcomeModel] | None = None,
    sites: Sequence[str] | None = None,
) -> list[Group]:
    """Scores in every group of the columns `groups`: the levels, or the coarse bins of a number's declared scale.

    `models` are the fitted models of `target`, by what they were trained on. `sites` names the site of each real row;
    held-out rows have none, so that sites have distances only. Raises `DataError` if the schemas differ, a table but
    `test` has no rows, a name in `groups` is no column, or `sites` does not name every row's.
    """
    check_comparable(synthetic, real)
    schema = real.schema
    unknown = [repr(name) for name in groups if name not in schema.names]
    if unknown:
        raise DataError(f"no such column: {', '.join(unknown)}, named as a group", fix="name columns of the schema")
    held_out = test if test is not None and test.schema.digest == schema.digest else Table(schema, real.values[:0])
    predictions = {}
    if target is not None and len(held_out):
        predictions = {name: model.probabilities(held_out) for name, model in (models or {}).items()}
    found: list[Group] = []
    for name in groups:
        column = nullable(schema[name])
        which = [cells_of(table[name], column, coarse=True) for table in (synthetic, real, held_out)]
        labels = group_names(column)
        shown = [_shown(side, len(labels)) for side in which[1:]]
        for index, label in enumerate(labels):
            inside = [side == index for side in which]
            if not any(part.any() for part in inside):
                continue
            people, others = (inside[1], shown[0][index]), (inside[2], shown[1][index])
            distance = _distance(synthetic, inside[0], real, people)
            scores = _utility(held_out, others, target, predictions) if target is not None and target != name else ()
            found.append(
                Group(
                    name,
                    label,
                    _number(people),
                    _number(others),
                    int(inside[0].sum()),
                    *distance[:2],
                    scores,
                    distance[2],
                )
            )
    return found + ([] if sites is None else _by_site(synthetic, real, sites))


def _by_site(synthetic: Table, real: Table, sites: Sequence[str]) -> list[Group]:
    if len(sites) != len(real):
        raise DataError(
            f"{len(sites)} sites are named for {len(real)} real rows",
            fix="name the site of every row of the real table",
        )
    names, which = np.unique(np.asarray(sites), return_inverse=True)
    shown, everyone = _shown(which, len(names)), np.ones(len(synthetic), dtype=bool)
    found = []
    for index, name in enumerate(names):
        people = (which == index, bool(shown[index]))
        distance = _distance(synthetic, everyone, real, people)
        found.append(Group(SITE, str(name), _number(people), None, len(synthetic), *distance[:2], (), distance[2]))
    return found


def group_names(column: Column) -> list[str]:
    """The name of every cell of `counts.cells_of(coarse=True)`: levels, or bounds of a bin, then "missing"."""
    if column.is_numeric:
        edges = from_unit(np.linspace(-1.0, 1.0, COARSE_BINS + 1), column)
        names = [f"{low} to {high}" for low, high in pairwise([_bound(float(edge), column) for edge in edges])]
    else:
        names = list(column.levels)
    return [*names, "missing"] if column.nullable else names


def _bound(value: float, column: Column) -> str:
    if column.kind == "date":
        return (EPOCH + datetime.timedelta(days=round(value))).isoformat()
    return f"{value:.4g}"


def _shown(which: NDArray[np.intp], groups: int) -> NDArray[np.bool_]:
    """The groups that may be shown; an empty group is not hidden for being empty, as nobody is in it."""
    counts = count(which, (groups,))
    present = counts > 0
    shown = np.ones(groups, dtype=bool)
    if present.any() and (counts[present] < FLOOR).any():
        shown[present] = ~hidden_cells(counts[present], FLOOR)
    return shown


def _number(part: tuple[NDArray[np.bool_], bool]) -> int | None:
    return int(part[0].sum()) if part[1] else None


def _distance(
    synthetic: Table, rows: NDArray[np.bool_], real: Table, people: tuple[NDArray[np.bool_], bool]
) -> tuple[float | None, float | None, str]:
    inside, shown = people
    if not shown:
        return None, None, HIDDEN
    if not rows.any() or not inside.any():
        return None, None, f"not possible because no {'synthetic row' if inside.any() else 'patient'} is in the group"
    values, chances = [], []
    for j, declared in enumerate(real.schema.columns):
        column = nullable(declared)
        a, b = (
            count(cells_of(table.values[part, j], column, coarse=True), (bins_of(column, coarse=True),))
            for table, part in ((synthetic, rows), (real, inside))
        )
        values.append(distance_of_counts(a, b))
        chances.append(expected_distance(a, b))
    return float(np.mean(values)), float(np.mean(chances)), ""


def _utility(
    test: Table,
    people: tuple[NDArray[np.bool_], bool],
    target: str,
    predictions: Mapping[str, NDArray[np.float64]],
) -> tuple[GroupUtility, ...]:
    inside, shown = people
    inside = inside & ~np.isnan(test[target])
    found = []
    for trained_on, probabilities in predictions.items():
        for level in predicted_levels(test.schema, target):
            name, truth, scores = (
                test.schema[target].levels[level],
                test[target][inside] == level,
                probabilities[inside],
            )
            fewest = min(int(truth.sum()), int((~truth).sum()))
            if not shown or fewest < FLOOR:
                reason = (
                    HIDDEN if not shown else f"not possible because fewer than {FLOOR} have the outcome, or have not"
                )
                found.append(GroupUtility(trained_on, name, None, None, reason))
                continue
            area = auroc_estimate(*delong(truth, scores[:, level]))
            fitted = calibration_of(trained_on, name, scores[:, level], truth)
            found.append(GroupUtility(trained_on, name, area, fitted.intercept, fitted.reason))
    return tuple(found)
