from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from common.config import Section, read_toml, validate
from common.errors import StudyError


class Engine(Section):
    horsepower: int = Field(default=1, ge=1)
    fuel_kind: str = Field(default="diesel", alias="fuel")


class Car(Section):
    engine: Engine = Field(default_factory=Engine)
    doors: int


def problem_of(document: object) -> str:
    with pytest.raises(StudyError) as caught:
        validate(Car, document, "car.toml", StudyError)
    assert caught.value.message.startswith("car.toml: ")
    return caught.value.message


def test_a_valid_document_is_read() -> None:
    car = validate(Car, {"doors": 3, "engine": {"fuel": "hay"}}, "car.toml", StudyError)
    assert (car.doors, car.engine.fuel_kind, car.engine.horsepower) == (3, "hay", 1)
    with pytest.raises(ValidationError):
        car.doors = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"doors": 1, "engin": {}}, "[engin]: unknown key; did you mean 'engine'?"),
        ({"doors": 1, "engine": {"horse_power": 2}}, "[engine] horse_power: unknown key; did you mean 'horsepower'?"),
        ({"doors": 1, "engine": {"feul": "x"}}, "[engine] feul: unknown key; did you mean 'fuel'?"),
        ({"doors": 1, "engine": {"zzz": 2}}, "[engine] zzz: unknown key; known keys: horsepower, fuel"),
        ({"doors": 1, "zzz": 2}, "[zzz]: unknown key; known keys: engine, doors"),
        ({}, "[doors]: is required"),
        ({"doors": 1, "engine": {"horsepower": 0}}, "(found 0)"),
        ({"doors": "many"}, "(found 'many')"),
        ({"doors": 1, "engine": 5}, "[engine]"),
        ([], "the file"),
        (None, "the file"),
    ],
)
def test_problems_in_the_words_of_the_file(document: object, expected: str) -> None:
    text = problem_of(document)
    assert "1 problem(s)" in text and expected in text


def test_all_problems_are_listed_at_once() -> None:
    text = problem_of({"dors": 2, "engine": {"horsepower": 0, "fule": "x"}})
    assert "4 problem(s)" in text
    for part in ("did you mean 'doors'?", "[doors]: is required", "[engine] horsepower", "did you mean 'fuel'?"):
        assert part in text


def test_toml_files(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('[a]\nb = "zwölf"\n', encoding="utf-8")
    assert read_toml(path, StudyError, fix="write one") == {"a": {"b": "zwölf"}}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"a = \n", "not valid TOML (Invalid value (at line 1"),
        (b"a = 1\na = 2\n", "not valid TOML"),
        (b"\xff\xfe", "not valid TOML"),
    ],
)
def test_unreadable_toml(tmp_path: Path, content: bytes | None, expected: str) -> None:
    path = tmp_path / "c.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StudyError) as caught:
        read_toml(path, StudyError, fix="write one")
    assert str(caught.value).startswith(f"{path}: {expected}") and caught.value.fix
    with pytest.raises(StudyError, match="cannot be read"):
        read_toml(tmp_path, StudyError, fix="write one")
