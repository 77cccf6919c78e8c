"""Data dictionaries, REDCap's or a simple list, turned into Table Schema fields.

A dictionary describes columns and holds no patient. What it leaves open (a missing bound, a type that cannot be
modelled) is named for a person to settle, never guessed.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import SchemaError

Row = Mapping[str, str]

# REDCap names its columns differently in the file it lets users download and in its API.
REDCAP_COLUMNS = {
    "name": ("Variable / Field Name", "field_name"),
    "form": ("Form Name", "form_name"),
    "type": ("Field Type", "field_type"),
    "label": ("Field Label", "field_label"),
    "choices": (
        "Choices, Calculations, OR Slider Labels",
        "Choices OR Calculations",
        "select_choices_or_calculations",
    ),
    "validation": (
        "Text Validation Type OR Show Slider Number",
        "text_validation_type_or_show_slider_number",
    ),
    "minimum": ("Text Validation Min", "text_validation_min"),
    "maximum": ("Text Validation Max", "text_validation_max"),
    "identifier": ("Identifier?", "identifier"),
    "branching": ("Branching Logic (Show field only if...)", "branching_logic"),
    "required": ("Required Field?", "required_field"),
}
SIMPLE_COLUMNS = ("name", "type", "minimum", "maximum", "levels", "required", "title")
SIMPLE_TYPES = {
    "number": "number",
    "float": "number",
    "integer": "integer",
    "int": "integer",
    "string": "string",
    "categorical": "string",
    "boolean": "boolean",
    "bool": "boolean",
    "date": "date",
}
YES = {"y", "yes", "true", "1"}
NO = {"", "n", "no", "false", "0"}
NUMBER_VALIDATIONS = {"number", "number_1dp", "number_2dp", "number_3dp", "number_4dp"}
NOT_A_COLUMN = {"descriptive": "text on the form, not a variable"}
NEVER_MODELLED = {
    "notes": "free text",
    "file": "an uploaded file",
    "sql": "choices from a live query, unknown to the dictionary",
}


@dataclass(frozen=True)
class Entry:
    """One column of the data as its dictionary declares it.

    `field` is a Table Schema field, incomplete where the dictionary is; a column with a `left_out` reason must not be
    modelled and has no field.
    """

    name: str
    field: Mapping[str, Any]
    left_out: str = ""


def read_dictionary(path: str | Path) -> dict[str, Entry]:
    """Read a REDCap data dictionary or a simple one (`name,type,minimum,maximum,levels,required,title`).

    Returns the entries by column name, in the dictionary's order. Raises `SchemaError` listing every problem with its
    line in the file.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True, restkey="\0surplus", restval="\0short")
            header = list(reader.fieldnames or [])
            lines = [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise SchemaError(
            f"{path}: the data dictionary cannot be read ({error.strerror})", fix="check the path and its permissions"
        ) from None
    except (UnicodeDecodeError, csv.Error):
        raise SchemaError(
            f"{path}: the data dictionary is not a well-formed CSV file in UTF-8", fix="export it again"
        ) from None
    convert, rename = _dialect(header, path)
    problems: list[str] = []
    entries: dict[str, Entry] = {}
    forms: dict[str, None] = {}
    for number, (line, raw) in enumerate(lines):
        if "\0surplus" in raw or "\0short" in raw.values():
            problems.append(f"line {line}: more or fewer fields than the header's {len(header)}")
            continue
        row = {key: (raw[column] or "").strip() for key, column in rename.items()}
        if not row["name"]:
            problems.append(f"line {line}: no name in column {rename['name']!r}")
            continue
        if row.get("form"):
            forms[row["form"]] = None
        try:
            found = convert(row, number == 0)
        except ValueError as error:
            problems.append(f"line {line}, variable {row['name']!r}: {error}")
            continue
        for entry in found:
            if entry.name in entries:
                problems.append(f"line {line}: variable {entry.name!r} is described twice")
            entries[entry.name] = entry
    for form in forms:
        name = f"{form}_complete"
        entries.setdefault(name, Entry(name, {}, "REDCap's record of whether the form is complete"))
    if not entries and not problems:
        problems.append("no variable is described")
    if problems:
        listing = "\n".join(f"  - {problem}" for problem in problems)
        raise SchemaError(
            f"{path}: {len(problems)} problem(s) in the data dictionary\n{listing}", fix="correct the dictionary"
        )
    return entries


def _dialect(header: list[str], path: Path) -> tuple[Callable[[Row, bool], list[Entry]], dict[str, str]]:
    """The function that converts a row, and the header's spelling of each column it reads."""
    redcap = {
        key: next((name for name in spellings if name in header), "") for key, spellings in REDCAP_COLUMNS.items()
    }
    if redcap["name"] and redcap["type"]:
        return _from_redcap, {key: name for key, name in redcap.items() if name}
    unknown = [name for name in header if name not in SIMPLE_COLUMNS]
    if "name" in header and "type" in header and not unknown:
        return _from_simple, {name: name for name in header}
    found = ", ".join(repr(name) for name in header) or "an empty file"
    raise SchemaError(
        f"{path}: not a data dictionary known here; its columns are {found}",
        fix="use REDCap's export (with 'Variable / Field Name' and 'Field Type') or columns among "
        + ", ".join(SIMPLE_COLUMNS),
    )


def _field(kind: str, constraints: dict[str, Any], *, title: str = "", **more: Any) -> dict[str, Any]:
    field: dict[str, Any] = {"type": kind}
    if title:
        field["title"] = title
    return field | more | ({"constraints": constraints} if constraints else {})


def _from_simple(row: Row, _first: bool) -> list[Entry]:
    name, kind = row["name"], row["type"].lower()
    if kind == "identifier":
        return [Entry(name, {}, "an identifier")]
    if kind not in SIMPLE_TYPES:
        raise ValueError(f"type {row['type']!r} is not one of {', '.join([*SIMPLE_TYPES, 'identifier'])}")
    kind = SIMPLE_TYPES[kind]
    constraints: dict[str, Any] = {}
    for key in ("minimum", "maximum"):
        if row.get(key):
            constraints[key] = _bound(kind, row[key], key)
    if row.get("levels"):
        constraints["enum"] = _codes(kind, [level.strip() for level in row["levels"].split("|")])
    required = row.get("required", "").lower()
    if required not in YES | NO:
        raise ValueError(f"required is {row['required']!r}; expected yes or no")
    if required in YES:
        constraints["required"] = True
    return [Entry(name, _field(kind, constraints, title=row.get("title", "")))]


def _bound(kind: str, text: str, key: str) -> Any:
    if kind == "date":
        return text  # load_schema checks its form
    try:
        return int(text) if re.fullmatch(r"[+-]?[0-9]+", text) else float(text)
    except ValueError:
        raise ValueError(f"{key} is {text!r}; expected a number") from None


def _codes(kind: str, codes: list[str]) -> list[Any]:
    return [int(code) if kind == "integer" and re.fullmatch(r"-?[0-9]+", code) else code for code in codes]


def _from_redcap(row: Row, first: bool) -> list[Entry]:
    """The columns of one REDCap variable in a raw-value export: several for checkboxes, none for descriptive text."""
    name, kind = row["name"], row["type"].lower()
    validation = row.get("validation", "").lower()
    title = re.sub(r"<[^>]*>", "", row.get("label", "")).strip()
    if kind in NOT_A_COLUMN:
        return []
    checkbox = kind == "checkbox"
    names = [f"{name}___{_suffix(code)}" for code, _ in _choices(row)] if checkbox else [name]
    # REDCap's first variable is the record ID by definition, whether or not it is flagged.
    identifier = row.get("identifier", "").lower() == "y"
    reason = "REDCap's record ID" if first else "an identifier" if identifier else NEVER_MODELLED.get(kind, "")
    if kind == "text" and not reason:
        reason = _text_reason(validation)
    if reason:
        return [Entry(each, {}, reason) for each in names]
    # Shown only if ... means that even a required field is empty for some patients.
    required = row.get("required", "").lower() == "y" and not row.get("branching")
    constraints: dict[str, Any] = {"required": True} if required else {}
    if checkbox:
        labels = [label for _, label in _choices(row)]
        return [
            Entry(each, _two_valued(constraints, f"{title}: {label}" if title else label))
            for each, label in zip(names, labels, strict=True)
        ]
    if kind in ("radio", "dropdown"):
        choices = _choices(row)
        constraints["enum"] = [code for code, _ in choices]
        meaning = "; ".join(f"{code} = {label}" for code, label in choices)
        return [Entry(name, _field("string", constraints, title=title, description=meaning))]
    if kind in ("yesno", "truefalse"):
        return [Entry(name, _two_valued(constraints, title))]
    if kind == "slider":
        bounds = {"minimum": 0, "maximum": 100} | _redcap_bounds("integer", row)
        return [Entry(name, _field("integer", constraints | bounds, title=title))]
    if kind == "calc":
        return [Entry(name, _field("number", constraints, title=title))]
    if kind == "text":
        target = "integer" if validation == "integer" else "date" if validation.startswith("date_") else "number"
        return [Entry(name, _field(target, constraints | _redcap_bounds(target, row), title=title))]
    raise ValueError(f"field type {row['type']!r} is not known")


def _text_reason(validation: str) -> str:
    """Why a text field with this validation cannot be modelled; empty if it can."""
    if validation in NUMBER_VALIDATIONS | {"integer"} or validation.startswith("date_"):
        return ""
    if validation.startswith("datetime"):
        return "a date with a time; export the date alone as a column of its own"
    if validation.endswith("comma_decimal"):
        return "numbers with a decimal comma; export them with a decimal point and declare them by hand"
    return f"text validated as {validation!r}" if validation else "free text"


def _two_valued(constraints: Mapping[str, Any], title: str) -> dict[str, Any]:
    return _field("boolean", dict(constraints), title=title, trueValues=["1"], falseValues=["0"])


def _choices(row: Row) -> list[tuple[str, str]]:
    """Codes and labels of "1, Male | 2, Female"."""
    choices = []
    for part in row.get("choices", "").split("|"):
        code, comma, label = part.partition(",")
        if not comma or not code.strip():
            raise ValueError("its choices are not written as `code, label | code, label`")
        choices.append((code.strip(), label.strip()))
    return choices


def _suffix(code: str) -> str:
    """The ending REDCap gives a checkbox column: the code in lower case, "-" and blanks as "_"."""
    return re.sub(r"[^a-z0-9_]", "_", code.lower())


def _redcap_bounds(kind: str, row: Row) -> dict[str, Any]:
    """The literal bounds; `today` or a reference to another field is no declared bound and stays open."""
    bounds = {}
    pattern = r"[0-9]{4}-[0-9]{2}-[0-9]{2}" if kind == "date" else r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)"
    for key in ("minimum", "maximum"):
        if re.fullmatch(pattern, row.get(key, "")):
            bounds[key] = _bound(kind, row[key], key)
    return bounds
