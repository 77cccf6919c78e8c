"""The data dictionary: a Frictionless Table Schema read into `Column` objects.

Bounds, categories and scales are declared here and nowhere learned from patients (privacy.md, section 0).
"""

from __future__ import annotations

import datetime
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from common.digest import sha256_of
from common.errors import SchemaError

Kind = Literal["number", "integer", "categorical", "boolean", "date"]
Scale = Literal["linear", "log"]
MAX_LEVELS = 100
EPOCH = datetime.date(1970, 1, 1)
TRUE_VALUES = ("true", "True", "TRUE", "1")
FALSE_VALUES = ("false", "False", "FALSE", "0")

FIELD_KEYS = {
    "name", "type", "format", "title", "description", "constraints", "example", "rdfType",
    "missingValues", "trueValues", "falseValues", "decimalChar", "groupChar", "bareNumber",
}  # fmt: skip
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
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SchemaError(
            f"{path}: the schema cannot be read ({error.strerror})", fix="check the path and its permissions"
        ) from None
    except UnicodeDecodeError:
        raise SchemaError(f"{path}: the schema is not UTF-8 text", fix="save it as UTF-8 JSON") from None
    try:
        descriptor = json.loads(text)
    except json.JSONDecodeError as error:
        raise SchemaError(
            f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}",
            fix="correct the JSON there",
        ) from None
    problems = _frictionless_problems(descriptor) if isinstance(descriptor, dict) else []
    return parse_schema(descriptor, source=str(path), known_problems=problems)


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


def parse_schema(descriptor: Any, *, source: str = "schema", known_problems: list[str] | None = None) -> Schema:
    """Turn a Table Schema descriptor into a `Schema`; raise `SchemaError` listing every problem at once."""
    problems: list[str] = []
    fields = descriptor.get("fields") if isinstance(descriptor, dict) else None
    if not isinstance(fields, list) or not fields:
        raise SchemaError(
            f"{source}: no fields found; expected a Table Schema object with a non-empty list `fields`",
            fix='write {"fields": [{"name": ..., "type": ..., "constraints": {...}}]}',
        )
    missing = descriptor.get("missingValues", [""])
    if not isinstance(missing, list) or not all(isinstance(value, str) for value in missing):
        problems.append("missingValues must be a list of strings")
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
        if target not in names:
            problems.append(f"cohortium:target {target!r} is not a column")
        elif any(c.name == target and c.is_numeric for c in columns):
            problems.append(f"cohortium:target {target!r} must have categories (a string with an enum, or boolean)")
    if not problems:
        # Frictionless repeats in other words what our own rules already name, so it speaks only when they are silent.
        problems += known_problems or []
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise SchemaError(
            f"{source}: {count}\n{listing}",
            fix="correct the schema; bounds and categories are declared by you, never learned",
        )
    return Schema(
        columns=tuple(columns),
        target=target,
        missing_values=tuple(missing),
        title=str(descriptor.get("title", "")),
        descriptor=descriptor,
    )


def _parse_field(field: Any, position: int, missing: set[str]) -> tuple[Column | None, list[str]]:
    """One field descriptor to a `Column` and the problems found in it (no column if there is any)."""
    if not isinstance(field, dict) or not isinstance(field.get("name"), str) or not field["name"].strip():
        return None, [f"field {position}: needs a non-empty string `name`"]
    name, kind = field["name"], field.get("type", "string")
    problems: list[str] = []

    def complain(text: str) -> None:
        problems.append(f"column {name!r}: {text}")

    if name != name.strip() or any(ord(c) < 32 for c in name):
        complain("the name has leading or trailing blanks or control characters")
    for key in field:
        if key not in FIELD_KEYS | COHORTIUM_FIELD_KEYS:
            complain(f"unknown key {key!r}")
    if field.get("cohortium:identifier"):
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
    if kind in ("number", "integer", "date") and "enum" not in constraints:
        bounds = _parse_bounds(kind, constraints, complain)
        scale = field.get("cohortium:scale", "linear")
        if scale not in ("linear", "log"):
            complain(f"cohortium:scale is {scale!r}; expected 'linear' or 'log'")
        elif scale == "log" and (kind == "date" or (bounds and bounds[0] < 0)):
            complain("a log scale needs a number or integer with minimum >= 0")
        if bounds:
            column = Column(kind=kind, minimum=bounds[0], maximum=bounds[1], scale=scale, **common)
    elif kind in ("string", "integer") and (kind == "string" or "enum" in constraints):
        if "cohortium:scale" in field:
            complain("cohortium:scale applies to numbers and integers only")
        levels = _parse_levels(constraints.get("enum"), missing, complain)
        if levels:
            column = Column(kind="categorical", levels=levels, **common)
    elif kind == "boolean":
        true = tuple(field.get("trueValues", TRUE_VALUES))
        false = tuple(field.get("falseValues", FALSE_VALUES))
        if not true or not false or set(true) & set(false):
            complain("trueValues and falseValues must be non-empty and must not overlap")
        column = Column(kind="boolean", levels=("false", "true"), true_values=true, false_values=false, **common)
    else:
        complain(f"type {kind!r} is not supported; use number, integer, string with an enum, boolean or date")
    return (None if problems else column), problems


def _parse_bounds(kind: str, constraints: Mapping[str, Any], complain: Any) -> tuple[float, float] | None:
    bounds = []
    for key in ("minimum", "maximum"):
        if key not in constraints:
            complain(f"a {kind} needs `constraints.{key}`, declared from clinical knowledge and not from the data")
            return None
        value = constraints[key]
        if kind == "date":
            try:
                bounds.append(float((datetime.date.fromisoformat(value) - EPOCH).days))
            except (TypeError, ValueError):
                complain(f"`{key}` must be a date as YYYY-MM-DD")
                return None
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            complain(f"`{key}` must be a finite number")
            return None
        elif kind == "integer" and float(value) != int(value):
            complain(f"`{key}` of an integer must be a whole number")
            return None
        else:
            bounds.append(float(value))
    if not bounds[0] < bounds[1]:
        complain(f"minimum must be less than maximum (found {constraints['minimum']} and {constraints['maximum']})")
        return None
    return bounds[0], bounds[1]


def _parse_levels(enum: Any, missing: set[str], complain: Any) -> tuple[str, ...] | None:
    if not isinstance(enum, list) or not enum:
        complain("a string needs a non-empty list `constraints.enum`; free text is never modelled")
        return None
    if any(isinstance(level, bool) or not isinstance(level, str | int) for level in enum):
        complain("every level of `enum` must be a string (or an integer code)")
        return None
    levels = tuple(str(level) for level in enum)
    repeated = [level for level, n in Counter(levels).items() if n > 1]
    if repeated:
        complain(f"levels declared twice: {', '.join(repeated)}")
    if len(levels) > MAX_LEVELS:
        complain(f"{len(levels)} levels; at most {MAX_LEVELS} are allowed: group the rare ones")
    if set(levels) & missing:
        complain("a level of `enum` is also listed in missingValues")
    return levels
