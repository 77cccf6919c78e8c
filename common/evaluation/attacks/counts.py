"""What an attack found, as counts that a coordinator can add over hospitals without seeing a patient."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from common.errors import DataError

# With fewer patients or predicates than this an interval spans most of [0, 1].
MINIMUM_GUESSES = 20


@dataclass(frozen=True)
class AttackCounts:
    """Guesses and successes of one attack on the training patients, on the control, and without the cohort.

    `guesses` and `successes` are of the training patients. `secret` is the column guessed at, None for attacks without
    one; `setting` holds the declared parameters, such as "k=1". One patient is one guess, except in singling out, where
    a guess is a predicate (`unit`). Raises `DataError` unless 0 <= successes <= guesses and every kind of guess occurs.
    """

    attack: str
    secret: str | None
    guesses: int
    successes: int
    control_guesses: int
    control_successes: int
    baseline_guesses: int
    baseline_successes: int
    setting: str = ""

    def __post_init__(self) -> None:
        for kind in ("", "control_", "baseline_"):
            guesses, successes = getattr(self, f"{kind}guesses"), getattr(self, f"{kind}successes")
            for name, value in ((f"{kind}guesses", guesses), (f"{kind}successes", successes)):
                if isinstance(value, bool) or not isinstance(value, int):
                    raise DataError(
                        f"attack {self.attack!r}: {name} is a {type(value).__name__}, expected a whole number"
                    )
            if not (guesses > 0 and 0 <= successes <= guesses):
                raise DataError(
                    f"attack {self.attack!r}: {successes} {kind}successes of {guesses} {kind}guesses",
                    fix="expected at least one guess, and between none and all of them successful",
                )

    @property
    def key(self) -> tuple[str, str, str]:
        """What two counts must share to be added: attack, secret ("" for none) and setting."""
        return self.attack, self.secret or "", self.setting

    @property
    def unit(self) -> str:
        """What one guess is: "patient" or "predicate".

        Given the cohort, replacing one patient changes counts of patients by one at most, except in
        `membership_distance`, where the thresholds come from control patients (its histogram has none).
        """
        return "predicate" if self.attack.startswith("singling_out") else "patient"

    def __add__(self, other: AttackCounts) -> AttackCounts:
        if not isinstance(other, AttackCounts):
            return NotImplemented
        if self.key != other.key:
            raise DataError(
                f"counts of different attacks cannot be added: {_words(self.key)} and {_words(other.key)}",
                fix="add counts of the same attack, secret column and setting only",
            )
        numbers = [f.name for f in fields(self) if f.name not in ("attack", "secret", "setting")]
        total = {name: getattr(self, name) + getattr(other, name) for name in numbers}
        return AttackCounts(attack=self.attack, secret=self.secret, setting=self.setting, **total)

    def __radd__(self, other: object) -> AttackCounts:
        # `sum` starts at 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def to_json(self) -> dict[str, Any]:
        """The fields and the unit, as plain JSON."""
        return asdict(self) | {"unit": self.unit}


@dataclass(frozen=True)
class NotPossible:
    """An attack that was not carried out, and why: not a result, and no evidence of anything."""

    attack: str
    secret: str | None
    reason: str
    setting: str = ""


def too_few(attack: str, secret: str | None, setting: str = "", **numbers: int) -> NotPossible | None:
    """`NotPossible` if any of the named groups has fewer than `MINIMUM_GUESSES` members, else None."""
    short = [f"{name.replace('_', ' ')}: {n}" for name, n in numbers.items() if n < MINIMUM_GUESSES]
    if not short:
        return None
    return NotPossible(
        attack, secret, f"not possible because too few ({'; '.join(short)}); at least {MINIMUM_GUESSES}", setting
    )


def add_counts(counts: Iterable[AttackCounts]) -> tuple[AttackCounts, ...]:
    """Sums of counts that belong to the same attack, secret and setting, in order of first appearance."""
    totals: dict[tuple[str, str, str], AttackCounts] = {}
    for each in counts:
        totals[each.key] = totals[each.key] + each if each.key in totals else each
    return tuple(totals.values())


def _words(key: tuple[str, str, str]) -> str:
    attack, secret, setting = key
    return attack + (f" of {secret!r}" if secret else "") + (f" ({setting})" if setting else "")
