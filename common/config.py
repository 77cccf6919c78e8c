"""Configuration files in TOML, validated by pydantic models, with errors in the words of the person who edits them."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import CohortiumError


class Section(BaseModel):
    """A section of a configuration file; frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Model = TypeVar("Model", bound=Section)


def read_toml(path: Path, error_type: type[CohortiumError], *, fix: str) -> dict[str, Any]:
    """Parse a TOML file; `error_type` naming the file if it cannot be read or parsed (`fix` is for a missing file)."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise error_type(f"{path}: cannot be read ({error.strerror})", fix=fix) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise error_type(f"{path}: not valid TOML ({error})", fix="correct the file there") from None


def validate(model: type[Model], document: Any, source: str, error_type: type[CohortiumError]) -> Model:
    """`document` as a `model`, or `error_type` listing every problem; an unknown key gets its nearest known one."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        problems = [_explain(model, item) for item in error.errors()]
    listing = "\n".join(f"  - {problem}" for problem in problems)
    raise error_type(f"{source}: {len(problems)} problem(s)\n{listing}", fix="correct these keys") from None


def _explain(model: type[Section], item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    where = f"[{location[0]}] {'.'.join(location[1:])}".strip() if location else "the file"
    if item["type"] == "extra_forbidden":
        known = _keys_of(model, location[:-1])
        nearest = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{where}: is required"
    message = item["msg"].removeprefix("Value error, ")
    found = "" if item["type"] == "value_error" else f" (found {item['input']!r})"
    return f"{where}: {message}{found}"


def _keys_of(model: type[Section], section: list[str]) -> list[str]:
    fields = model.model_fields
    if section:
        annotation = fields[section[0]].annotation if section[0] in fields else None
        fields = getattr(annotation, "model_fields", {})
    return [field.alias or name for name, field in fields.items()]
