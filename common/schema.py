"""The data dictionary: a Frictionless Table Schema read into `Column` objects.

Bounds, categories and scales are declared here and nowhere learned from patients (privacy.md, section 0).
"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from common.digest import sha256_of
from common.errors import SchemaError

Kind = Literal["number", "integer", "categorical", "boolean", "date"]
Scale = Literal["linear", "log"]
MAX_LEVELS = 100
MAX_BOUND = 1e15  # up to here float64 tells whole numbers apart, with room for sums
EPOCH = datetime.date(1970, 1, 1)
TRUE_VALUES = ("true", "True", "TRUE", "1")
FALSE_VALUES = ("false", "False", "FALSE", "0")

FIELD_KEYS = {
    "name", "type", "format", "title", "description", "constraints", "example", "rdfType",
    "missingValues", "trueValues", "falseValues", "decimalChar", "groupChar", "bareNumber",
}  # fmt: skip
# Keys of the standard that would change how cells are read, and the values under which they are read as we do.
ACCEPTED_VALUES: dict[str, tuple[Any, ...]] = {
    "format": ("default", "%Y-%m-%d"),
    "decimalChar": (".",),
    "groupChar": (),
    "bareNumber": (True,),
    "missingValues": (),
}
CONSTRAINT_KEYS = {"required", "unique", "minimum", "maximum", "enum"}
COHORTIUM_FIELD_KEYS = {"cohortium:scale", "cohortium:identifier"}
COHORTIUM_SCHEMA_KEYS = {"cohortium:target"}


@dataclass(frozen=True)
class Column:
    """One column of the study's table.

    `minimum` and `maximum` are in the column's own unit; for a date they count days since 1970-01-01. `levels` are
    the declared categories in declared order (empty unless `kind` is categorical or boolean).
    """

    name: str
    kind: Kind
    required: bool = False
    minimum: float = math.nan
    maximum: float = math.nan
    levels: tuple[str, ...] = ()
    scale: Scale = "linear"
    title: str = ""
    true_values: tuple[str, ...] = TRUE_VALUES
    false_values: tuple[str, ...] = FALSE_VALUES

    @property
    def nullable(self) -> bool:
        """Whether a missing value is allowed, and therefore modelled."""
        return not self.required

    @property
    def is_numeric(self) -> bool:
        """Whether values lie on a line between `minimum` and `maximum`."""
        return self.kind in ("number", "integer", "date")


@dataclass(frozen=True)
class Schema:
    """All columns of the study's table, in order, with the outcome named."""

    columns: tuple[Column, ...]
    target: str | None
    missing_values: tuple[str, ...]
    title: str
    descriptor: Mapping[str, Any]

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON of the descriptor: what every site approves."""
        return sha256_of(self.descriptor)

    @property
    def names(self) -> tuple[str, ...]:
        """Column names in order."""
        return tuple(column.name for column in self.columns)

    def __getitem__(self, name: str) -> Column:
        return self.columns[self.index(name)]

    def index(self, name: str) -> int:
        """Position of column `name`; `KeyError` if there is none."""
        try:
            return self.names.index(name)
        except ValueError:
            raise KeyError(name) from None


def load_schema(path: str | Path) -> Schema:
    """Read and check `schema.json` at `path`; raise `SchemaError` listing every problem at once."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SchemaError(
            f"{path}: the schema cannot be read ({error.strerror})", fix="check the path and its permissions"
        ) from None
    except UnicodeDecodeError:
        raise SchemaError(f"{path}: the schema is not UTF-8 text", fix="save it as UTF-8 JSON") from None
    try:
        descriptor = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise SchemaError(
            f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}",
            fix="correct the JSON there",
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise SchemaError(f"{path}: not valid JSON: {reason}", fix="correct the JSON") from None
    schema = parse_schema(descriptor, source=str(path))
    # Frictionless repeats in other words what our own rules already name, so it speaks only when they are silent.
    _raise_if_any(_frictionless_problems(descriptor), str(path))
    return schema


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Readers differ on which of two equal keys counts, and every site must approve the same document.
    repeated = [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]
    if repeated:
        raise ValueError(f"the key {repeated[0]!r} occurs twice in one object")
    return dict(pairs)


def _frictionless_problems(descriptor: dict[str, Any]) -> list[str]:
    """What the frictionless library finds wrong with the descriptor as a Table Schema."""
    # Imported here because it costs half a second that a ClientApp, which receives a checked schema, need not pay.
    from frictionless import FrictionlessException
    from frictionless import Schema as FrictionlessSchema

    try:
        FrictionlessSchema.from_descriptor(json.loads(json.dumps(descriptor)))
    except FrictionlessException as error:
        reasons = error.reasons or [error.error]
        return [reason.note for reason in reasons]
    return []


def _raise_if_any(problems: list[str], source: str) -> None:
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise SchemaError(
            f"{source}: {count}\n{listing}",
            fix="correct the schema; bounds and categories are declared by you, never learned",
        )


def parse_schema(descriptor: Any, *, source: str = "schema") -> Schema:
    """Turn a Table Schema descriptor into a `Schema`; raise `SchemaError` listing every problem at once."""
    schema, problems = check_schema(descriptor)
    _raise_if_any(problems, source)
    assert schema is not None
    return schema


def check_schema(descriptor: Any) -> tuple[Schema | None, list[str]]:
    """The `Schema` that a Table Schema descriptor declares, or None and every problem found in it."""
    fields = descriptor.get("fields") if isinstance(descriptor, dict) else None
    if not isinstance(fields, list) or not fields:
        return None, [
            "no fields found; expected a Table Schema object with a non-empty list `fields`:"
            ' {"fields": [{"name": ..., "type": ..., "constraints": {...}}]}'
        ]
    problems: list[str] = []
    missing = descriptor.get("missingValues", [""])
    if not _is_text_list(missing):
        problems.append("missingValues must be a non-empty list of strings")
        missing = [""]
    for key in descriptor:
        if key.startswith("cohortium:") and key not in COHORTIUM_SCHEMA_KEYS:
            problems.append(f"unknown key {key!r}; known: {', '.join(sorted(COHORTIUM_SCHEMA_KEYS))}")

    columns: list[Column] = []
    for position, field in enumerate(fields, start=1):
        parsed, found = _parse_field(field, position, set(missing))
        problems += found
        if parsed is not None:
            columns.append(parsed)
    names = Counter(f.get("name") for f in fields if isinstance(f, dict) and isinstance(f.get("name"), str))
    problems += [f"column {name!r} is declared {n} times; names must be unique" for name, n in names.items() if n > 1]

    target = descriptor.get("cohortium:target")
    if target is not None:
        if not isinstance(target, str) or target not in names:
            problems.append(f"cohortium:target {target!r} is not a column")
        elif any(c.name == target and len(c.levels) < 2 for c in columns):
            problems.append(f"cohortium:target {target!r} must have two or more categories (an enum, or boolean)")
    if not problems:
        try:
            sha256_of(descriptor)
        except ValueError:  # such as a lone surrogate or an infinite number
            problems.append("holds text or a number that JSON cannot carry, so it has no digest to approve")
    if problems:
        return None, problems
    return Schema(
        columns=tuple(columns),
        target=target,
        missing_values=tuple(missing),
        title=str(descriptor.get("title", "")),
        descriptor=descriptor,
    ), []


def _is_text_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def _an(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _has_control(text: str) -> bool:
    return any(ord(character) < 32 or ord(character) == 127 for character in text)


def _parse_field(field: Any, position: int, missing: set[str]) -> tuple[Column | None, list[str]]:
    """One field descriptor to a `Column` and the problems found in it (no column if there is any)."""
    if not isinstance(field, dict) or not isinstance(field.get("name"), str) or not field["name"].strip():
        return None, [f"field {position}: needs a non-empty string `name`"]
    name, kind = field["name"], field.get("type", "string")
    problems: list[str] = []

    def complain(text: str) -> None:
        problems.append(f"column {name!r}: {text}")

    if name != name.strip() or _has_control(name):
        complain("the name has leading or trailing blanks or control characters")
    for key in field:
        if key not in FIELD_KEYS | COHORTIUM_FIELD_KEYS:
            complain(f"unknown key {key!r}; known: {', '.join(sorted(FIELD_KEYS | COHORTIUM_FIELD_KEYS))}")
    for key, accepted in ACCEPTED_VALUES.items():
        if key in field and field[key] not in accepted:
            expected = f"expected {accepted[0]!r}" if accepted else "leave it out"
            complain(f"{key} {field[key]!r} is not supported; {expected}")
    if not isinstance(field.get("cohortium:identifier", False), bool):
        complain("cohortium:identifier must be true or false")
    elif field.get("cohortium:identifier"):
        complain("is marked as an identifier; identifiers are never modelled: leave the column out of the schema")
    constraints = field.get("constraints", {})
    if not isinstance(constraints, dict):
        complain("`constraints` must be an object")
        constraints = {}
    for key in constraints:
        if key not in CONSTRAINT_KEYS:
            complain(f"constraint {key!r} is not supported; supported: {', '.join(sorted(CONSTRAINT_KEYS))}")
    if constraints.get("unique"):
        complain("a unique column is an identifier; leave it out of the schema")
    required = constraints.get("required", False)
    if not isinstance(required, bool):
        complain("`required` must be true or false")
    common: dict[str, Any] = {
        "name": name,
        "required": bool(required),
        "title": str(field.get("title", "")),
    }

    column: Column | None = None
    has_levels = kind == "boolean" or "enum" in constraints
    if has_levels and "cohortium:scale" in field:
        complain("cohortium:scale applies to numbers and integers without enum only")
    if has_levels or kind == "string":
        unused = [key for key in ("minimum", "maximum") if key in constraints]
        if unused:
            complain(f"{' and '.join(unused)} apply to numbers, integers and dates without enum only")
    if "type" not in field and "enum" not in constraints:
        complain("no type is declared; declare one (number, integer, string, boolean or date) with its constraints")
    elif kind in ("number", "integer", "date") and "enum" not in constraints:
        bounds = _parse_bounds(kind, constraints, complain)
        scale = field.get("cohortium:scale", "linear")
        if scale not in ("linear", "log"):
            complain(f"cohortium:scale is {scale!r}; expected 'linear' or 'log'")
        elif scale == "log" and (kind == "date" or (bounds and bounds[0] < 0)):
            complain("a log scale needs a number or integer with minimum >= 0")
        if bounds:
            column = Column(kind=kind, minimum=bounds[0], maximum=bounds[1], scale=scale, **common)
    elif kind in ("string", "integer"):
        levels = _parse_levels(kind, constraints.get("enum"), missing, complain)
        if levels:
            column = Column(kind="categorical", levels=levels, **common)
    elif kind == "boolean" and "enum" not in constraints:
        true = field.get("trueValues", list(TRUE_VALUES))
        false = field.get("falseValues", list(FALSE_VALUES))
        if not _is_text_list(true) or not _is_text_list(false):
            complain("trueValues and falseValues must be non-empty lists of strings")
        elif set(true) & set(false) or (set(true) | set(false)) & missing:
            complain("trueValues, falseValues and missingValues must not overlap")
        else:
            column = Column(
                kind="boolean",
                levels=("false", "true"),
                true_values=tuple(true),
                false_values=tuple(false),
                **common,
            )
    elif kind in ("number", "date", "boolean"):
        complain(f"a {kind} cannot have an enum; use a string or an integer")
    else:
        complain(f"type {kind!r} is not supported; use number, integer, string with an enum, boolean or date")
    return (None if problems else column), problems


def _parse_bounds(
    kind: str, constraints: Mapping[str, Any], complain: Callable[[str], None]
) -> tuple[float, float] | None:
    bounds = []
    for key in ("minimum", "maximum"):
        if key not in constraints:
            complain(f"{_an(kind)} needs `constraints.{key}`, declared from clinical knowledge and not from the data")
            continue
        value = constraints[key]
        if kind == "date":
            days = parse_date(value) if isinstance(value, str) else None
            if days is None:
                complain(f"`{key}` must be a date as YYYY-MM-DD")
            else:
                bounds.append(float(days))
        elif isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_BOUND:
            complain(f"`{key}` must be a finite number, at most {MAX_BOUND:g} in size")
        elif kind == "integer" and float(value) != int(value):
            complain(f"`{key}` of an integer must be a whole number")
        else:
            bounds.append(float(value))
    if len(bounds) < 2:
        return None
    if not bounds[0] < bounds[1]:
        complain(f"minimum must be less than maximum (found {constraints['minimum']} and {constraints['maximum']})")
        return None
    return bounds[0], bounds[1]


def parse_date(text: str) -> int | None:
    """Days since 1970-01-01 of a date spelled YYYY-MM-DD; None if the text is anything else."""
    # fromisoformat alone would also take 20240131 and week dates.
    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
        return None
    try:
        return (datetime.date.fromisoformat(text) - EPOCH).days
    except ValueError:
        return None


def _parse_levels(kind: str, enum: Any, missing: set[str], complain: Callable[[str], None]) -> tuple[str, ...] | None:
    if not isinstance(enum, list) or not enum:
        complain(f"{_an(kind)} needs a non-empty list `constraints.enum`; free text is never modelled")
        return None
    if any(isinstance(level, bool) or not isinstance(level, str | int) for level in enum):
        complain("every level of `enum` must be a string (or an integer code)")
        return None
    if kind == "integer" and any(isinstance(level, str) for level in enum):
        complain('the levels of an integer must be integers; codes such as "01" need the type string')
        return None
    levels = tuple(str(level) for level in enum)
    if any(_has_control(level) for level in levels):
        complain("a level of `enum` holds a control character such as a line break")
    repeated = [level for level, n in Counter(levels).items() if n > 1]
    if repeated:
        complain(f"levels declared twice: {', '.join(repeated)}")
    if len(levels) > MAX_LEVELS:
        complain(f"{len(levels)} levels; at most {MAX_LEVELS} are allowed: group the rare ones")
    if set(levels) & missing:
        complain("a level of `enum` is also listed in missingValues")
    return levels
