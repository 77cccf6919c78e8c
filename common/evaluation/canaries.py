"""Canaries: rows made from the schema alone that a model remembers if it remembers any, and where they are planted.

A canary is a corner of the table: every number at its declared minimum or maximum, every category any of its levels,
all columns independent of each other. Hardly a patient looks like that, so that what a model knows of such a row it has
from the row. The two rows of a pair are independent too: half of their columns agree or so, and measured, an attacker
tells such pairs apart better than rows that differ everywhere.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from dataclasses import dataclass

import numpy as np

from common.errors import DataError, SchemaError
from common.schema import Column, Schema
from common.table import Table

FEWEST = 10  # even all guesses right show no more than ε = 1.05 with fewer, at 95 % and before any correction
LARGEST_SHARE = 0.25  # of the site's patients; beyond it the twin says little about the study
LEAST_DIFFERENCE = 1 / 3  # of the columns that can differ, between the rows of a pair
TRIES = 200


@dataclass(frozen=True)
class Canaries:
    """Pairs of rows, the slots they are for, and the coins.

    Slot `slots[i]` (counted from 0) holds row i of `first` where `coins[i]` is +1 and of `second` where it is -1.
    """

    first: Table
    second: Table
    slots: np.ndarray
    coins: np.ndarray

    def __len__(self) -> int:
        return len(self.slots)

    def plant(self, table: Table) -> Table:
        """`table` with the content of the canaries' slots replaced; its number of rows stays."""
        values = table.values.copy()
        values[self.slots] = np.where(self.coins[:, None] > 0, self.first.values, self.second.values)
        return Table(table.schema, values)


def draw_canaries(schema: Schema, patients: int, number: int, seed: int | None) -> Canaries:
    """`number` pairs for a site of `patients` slots; slots and coins depend on the seed and these numbers alone.

    Without a seed every choice comes from the operating system's CSPRNG. A seed makes a simulation repeatable; it is
    hashed under a name of its own, so that no other random number of the run is the coins'. `DataError` for a number of
    canaries that does not fit the site, `SchemaError` for a table with too few corners.
    """
    require_room(patients, number)
    entropy = secrets.randbits(256) if seed is None else _named(seed)
    random = np.random.Generator(np.random.PCG64(entropy))
    slots = random.permutation(patients)[:number]
    coins = 2 * random.integers(0, 2, number) - 1
    first, second = _pairs(schema, number, random)
    return Canaries(Table(schema, first), Table(schema, second), slots, coins)


def require_room(patients: int, number: int) -> None:
    """`DataError` unless `number` canaries are enough to show anything and few enough for a site of `patients`."""
    if number < FEWEST:
        raise DataError(
            f"{number} canaries: expected at least {FEWEST}, fewer show next to nothing even with every guess right",
            fix="for example --canaries 200",
        )
    most = int(LARGEST_SHARE * patients)
    if number > most:
        fitting = f"--canaries {most} or fewer, or " if most >= FEWEST else ""
        raise DataError(
            f"{number} canaries would replace {number / patients:.0%} of the site's {patients} patients; at most"
            f" {LARGEST_SHARE:.0%}, or the twin has little in common with the study",
            fix=f"{fitting}a larger site with --site: {number} need {math.ceil(number / LARGEST_SHARE)} patients",
        )


def _named(seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"canaries/{seed}".encode()).digest())


def corners(column: Column) -> np.ndarray:
    """The values of a column that a canary may have, in the table's coding."""
    if column.is_numeric:
        return np.unique([column.minimum, column.maximum])
    return np.arange(len(column.levels), dtype=float)


def _pairs(schema: Schema, number: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two tables of `number` rows, all 2 · number rows different."""
    choices = [corners(column) for column in schema.columns]
    possible = math.prod(len(values) for values in choices)
    if possible < 4 * number:  # half of them stay free, so that drawing ends
        raise SchemaError(
            f"the schema has {possible} different corner rows, {number} pairs of canaries need {4 * number}",
            fix=f"use at most {possible // 4} canaries" if possible // 4 >= FEWEST else "audit a wider table",
        )
    least = max(1.0, LEAST_DIFFERENCE * sum(len(values) > 1 for values in choices))
    seen: set[bytes] = set()
    first, second = (np.empty((number, len(choices))) for _ in range(2))
    for i in range(number):
        for _ in range(TRIES):
            for row in (first[i], second[i]):
                row[:] = [random.choice(values) for values in choices]
            keys = {first[i].tobytes(), second[i].tobytes()}
            if (first[i] != second[i]).sum() >= least and not keys & seen:
                seen |= keys
                break
        else:
            raise SchemaError(f"no {number} different pairs of corner rows were found", fix="use fewer canaries")
    return first, second
