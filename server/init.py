"""`cohortium init`: a commented study.toml and a schema.json, from column names and a data dictionary alone."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from common.cells import PLAIN_NUMBER
from common.dictionary import Entry, read_dictionary
from common.errors import DataError, OutputError, UsageError
from common.schema import check_schema, parse_date
from common.study import Study, StudySection
from common.table import parse_header

LONGEST_HEADER = 1 << 20
ONLY_REQUIRED = "Only [study] name and schema must be given; every other key shows its default and may be left out."


@dataclass(frozen=True)
class InitResult:
    """What was written and what is left to do.

    `to_complete` repeats word for word what `load_schema` will report; `left_out` gives a reason for each column that
    is not in the schema; `unused` are the dictionary's variables that the header lacks.
    """

    study: Path
    schema: Path
    columns: int
    to_complete: tuple[str, ...]
    left_out: Mapping[str, str]
    unused: tuple[str, ...]

    def describe(self) -> str:
        """What was written and what is left to do, as the coordinator reads it."""
        lines = ["wrote", f"  {self.study}", f"  {self.schema} ({self.columns} columns)"]
        if self.to_complete:
            lines += ["to complete in the schema:", *(f"  - {problem}" for problem in self.to_complete)]
        if self.left_out:
            lines += ["columns left out:", *(f"  - {name}: {reason}" for name, reason in self.left_out.items())]
        if self.unused:
            lines += ["in the dictionary but not in the header:", *(f"  - {name}" for name in self.unused)]
        if self.to_complete:
            lines.append(f"next: complete {self.schema}, then let every site run")
        else:
            lines.append("next: let every site run")
        lines.append(f"  cohortium-site check --schema {self.schema} --data FILE")
        return "\n".join(lines)


def init_study(directory: Path, header: Path, dictionary: Path | None = None, name: str | None = None) -> InitResult:
    """Write `study.toml` and `schema.json` into `directory`, which is made if need be.

    Of the CSV file `header` only the first line is read, never a patient's. `name` defaults to the directory's.
    Raises `OutputError` if either file exists (nothing is overwritten) or cannot be written, `DataError` for an
    unusable header, `SchemaError` for an unusable dictionary and `UsageError` for a name that no study can have.
    """
    name = (
        name if name is not None else re.sub(r"[^\w .\-]", "-", directory.resolve().name).lstrip("-. ")[:80] or "study"
    )
    try:
        StudySection.model_validate({"name": name, "schema": "schema.json"})
    except ValidationError:
        raise UsageError(
            f"{name!r} cannot be a study's name",
            fix="use up to 80 letters, digits, blanks, dots, hyphens and underscores, a letter or digit first",
        ) from None
    study, schema = directory / "study.toml", directory / "schema.json"
    for path in (study, schema):
        if path.exists() or path.is_symlink():
            raise OutputError(f"{path}: exists and is not overwritten", fix="choose another directory, or move it away")
    names = _column_names(header)
    entries = read_dictionary(dictionary) if dictionary is not None else {}

    fields: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for position, column in enumerate(names, start=1):
        if not column.strip():
            left_out[f"(column {position})"] = "it has no name"
            continue
        entry = entries.get(column, Entry(column, {}))
        if entry.left_out:
            left_out[column] = entry.left_out
        else:
            fields.append({"name": column, **entry.field})
    if not fields:
        raise DataError(
            f"{header}: no column is left to model; the dictionary leaves out all {len(names)}",
            fix="check that header and dictionary belong together",
        )
    descriptor = {
        "$schema": "https://datapackage.org/profiles/2.0/tableschema.json",
        "title": name,
        "missingValues": [""],
        "fields": fields,
    }
    _, problems = check_schema(descriptor)
    _write_new(
        {
            study: study_template({"study": {"name": name, "schema": schema.name}}),
            schema: json.dumps(descriptor, indent=1, ensure_ascii=False) + "\n",
        }
    )
    unused = tuple(column for column, entry in entries.items() if column not in names and not entry.left_out)
    return InitResult(study, schema, len(fields), tuple(problems), left_out, unused)


def _column_names(path: Path) -> list[str]:
    """The names on the first line of a CSV file; nothing after that line is read from the disk."""
    if path.suffix.lower() != ".csv":
        raise DataError(f"{path}: unknown file type {path.suffix!r}", fix="give the header as a .csv file")
    try:
        # Unbuffered, so that reading the line brings no patient's row into memory.
        with path.open("rb", buffering=0) as file:
            line = file.readline(LONGEST_HEADER)
        names = parse_header(line.decode("utf-8-sig"), path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})", fix="check the path") from None
    except (UnicodeDecodeError, csv.Error):
        raise DataError(f"{path}: the first line is not CSV in UTF-8", fix="export it again") from None
    if len(line) == LONGEST_HEADER:
        raise DataError(f"{path}: the first line is longer than {LONGEST_HEADER} bytes", fix="export it as CSV")
    # Where the header is missing the first line is a patient's: it is refused, and not quoted.
    data = [n for n, text in enumerate(names, start=1) if _looks_like_data(text)]
    if data:
        raise DataError(
            f"{path}: the first line does not look like column names; field {data[0]} is a number or a date",
            fix="the first line must hold the column names",
        )
    repeated = [n for n, text in enumerate(names, start=1) if text and text in names[: n - 1]]
    if repeated:
        raise DataError(
            f"{path}: the first line repeats a name at field {repeated[0]}", fix="give every column its own name"
        )
    return names


def _looks_like_data(text: str) -> bool:
    return bool(re.fullmatch(PLAIN_NUMBER, text.strip())) or parse_date(text.strip()) is not None


def _write_new(contents: Mapping[Path, str]) -> None:
    """Write all files or none; a file that exists is never touched."""
    written: list[Path] = []
    for path, text in contents.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as file:
                written.append(path)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            for partial in written:
                partial.unlink(missing_ok=True)
            raise OutputError(
                f"{path}: cannot be written ({error.strerror})", fix="choose a directory you may write to, with space"
            ) from None


def study_template(values: Mapping[str, Mapping[str, Any]]) -> str:
    """A study.toml with every section and key of `Study`, its meaning and its default; `values` fill required keys."""
    blocks = [f"# A Cohortium study: the protocol that every site approves.\n# {ONLY_REQUIRED}"]
    for section, field in Study.model_fields.items():
        model = field.annotation
        lines = [f"# {_sentence(field)}"]
        if isinstance(model, type) and issubclass(model, BaseModel):
            lines.append(f"[{section}]")
            for key, option in model.model_fields.items():
                spelled = option.alias or key
                lines.append(f"# {_sentence(option)}")
                lines.append(_assignment(spelled, option, values.get(section, {})))
        else:
            lines.append(f"# [{section}]")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _sentence(field: FieldInfo) -> str:
    text = " ".join((field.description or "").split())
    return text[:1].upper() + text[1:]


def _assignment(key: str, field: FieldInfo, values: Mapping[str, Any]) -> str:
    value = values[key] if key in values else field.get_default(call_default_factory=True)
    return f"# {key} =" if value is None else f"{key} = {_toml(value)}"


def _toml(value: Any) -> str:
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    raise TypeError(f"no TOML for a {type(value).__name__}")
