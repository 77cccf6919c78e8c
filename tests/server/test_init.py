import errno
import io
import os
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest

from common.errors import CohortiumError, DataError, OutputError, SchemaError, UsageError
from common.schema import load_schema
from common.study import Study, StudySection, load_protocol
from server.init import InitResult, init_study, study_template

DICTIONARY = """name,type,minimum,maximum,levels,required,title
mrn,identifier,,,,,
age,number,0,120,,yes,Age
sex,string,,,f|m,,
crp,number,0,,,,
absent,boolean,,,,,
"""


@pytest.fixture
def dictionary(tmp_path: Path) -> Path:
    path = tmp_path / "dictionary.csv"
    path.write_text(DICTIONARY)
    return path


def header(folder: Path, line: str, rest: bytes = b"") -> Path:
    path = folder / "header.csv"
    path.write_bytes(line.encode() + b"\n" + rest)
    return path


def unfinished(result: InitResult) -> list[str]:
    with pytest.raises(SchemaError) as caught:
        load_schema(result.schema)
    return [line[4:] for line in str(caught.value).splitlines() if line.startswith("  - ")]


def test_what_is_left_to_complete_is_what_load_schema_reports(tmp_path: Path, dictionary: Path) -> None:
    result = init_study(tmp_path / "new" / "study", header(tmp_path, "mrn,age,sex,crp,note,"), dictionary)
    assert result.study == tmp_path / "new" / "study" / "study.toml" and result.study.exists()
    assert (result.columns, result.unused) == (4, ("absent",))
    assert result.left_out == {"mrn": "an identifier", "(column 6)": "it has no name"}
    assert unfinished(result) == list(result.to_complete)
    assert [problem.split("'")[1] for problem in result.to_complete] == ["crp", "note"]
    assert "`constraints.maximum`" in result.to_complete[0] and "no type is declared" in result.to_complete[1]


def test_a_complete_dictionary_makes_a_study_that_loads(tmp_path: Path, dictionary: Path) -> None:
    result = init_study(tmp_path / "study", header(tmp_path, '"mrn",\ufeffsex,age'.replace("\ufeff", "")), dictionary)
    assert result.to_complete == ()
    protocol = load_protocol(result.study)
    assert protocol.schema.names == ("sex", "age") and protocol.study.study.name == "study"
    assert protocol.schema["age"].title == "Age"


def test_without_a_dictionary_every_column_is_left_to_complete(tmp_path: Path) -> None:
    result = init_study(tmp_path / "study", header(tmp_path, "\ufeffage,sex"), name="Sepsis 2026")
    assert len(unfinished(result)) == len(result.to_complete) == result.columns == 2
    assert tomllib.loads(result.study.read_text())["study"] == {"name": "Sepsis 2026", "schema": "schema.json"}


def test_rows_that_no_reader_could_read_are_no_obstacle(tmp_path: Path) -> None:
    rest = b'\xff\xfe"\x00,,,,,\n' * 100
    assert init_study(tmp_path / "study", header(tmp_path, "age,sex", rest)).columns == 2


def test_no_byte_after_the_header_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = header(tmp_path, "age,sex", b"61,f\n" * 1000)
    offsets: list[int] = []
    real_open = Path.open

    class Watched(io.FileIO):
        def close(self) -> None:
            if not self.closed:
                offsets.append(os.lseek(self.fileno(), 0, os.SEEK_CUR))
            super().close()

    def watched_open(self: Path, mode: str = "r", buffering: int = -1, **options: Any) -> Any:
        if self != path:
            return real_open(self, mode, buffering, **options)
        raw = Watched(path)
        return raw if buffering == 0 else io.BufferedReader(raw)

    monkeypatch.setattr(Path, "open", watched_open)
    init_study(tmp_path / "study", path)
    assert offsets == [len("age,sex\n")]


def test_a_pipe_that_never_sends_a_row_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "header.csv"
    os.mkfifo(path)
    done = threading.Event()

    def write() -> None:
        with path.open("wb", buffering=0) as pipe:
            pipe.write(b"age,sex\n")
            done.wait(30)  # held open: whoever reads on would wait for the end of the file

    writer = threading.Thread(target=write)
    writer.start()
    found: list[InitResult] = []
    reader = threading.Thread(target=lambda: found.append(init_study(tmp_path / "study", path)), daemon=True)
    reader.start()
    reader.join(20)
    read_before_the_end = not reader.is_alive()
    done.set()
    writer.join()
    assert read_before_the_end and found[0].columns == 2


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the first line is empty"),
        (b"\nage\n", "the first line is empty"),
        (b"age;sex\n", "columns must be separated by commas"),
        (b'age,"sex\n', "the first line is not CSV in UTF-8"),
        (b"age,\xe9\n", "the first line is not CSV in UTF-8"),
        (b"Zq,61.5,f\n", "field 2 is a number or a date"),
        (b"Zq,1970-01-01\n", "field 2 is a number or a date"),
        (b"Zq,sex,Zq\n", "repeats a name at field 3"),
        (b"x" * (1 << 20), "the first line is longer than"),
    ],
)
def test_headers_that_are_none(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "header.csv"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        init_study(tmp_path / "study", path)
    assert expected in str(caught.value) and str(path) in str(caught.value)
    assert "Zq" not in str(caught.value).replace(str(path), "") and "61.5" not in str(caught.value)
    assert not (tmp_path / "study").exists()


def test_unusable_arguments_write_nothing(tmp_path: Path, dictionary: Path) -> None:
    good, out = header(tmp_path, "age,sex"), tmp_path / "study"
    only_identifiers = tmp_path / "ids.csv"
    only_identifiers.write_text("mrn\n")
    cases: list[tuple[type[CohortiumError], Path, Path | None, str | None, str]] = [
        (DataError, tmp_path / "none.csv", None, None, "cannot be read"),
        (DataError, tmp_path / "header.xlsx", None, None, "unknown file type '.xlsx'"),
        (DataError, only_identifiers, dictionary, None, "no column is left to model"),
        (SchemaError, good, tmp_path / "none.csv", None, "cannot be read"),
        (UsageError, good, dictionary, "", "cannot be a study's name"),
        (UsageError, good, dictionary, "a\nb", "cannot be a study's name"),
    ]
    for error, columns, entries, name, expected in cases:
        with pytest.raises(error, match=expected):
            init_study(out, columns, entries, name)
        assert not out.exists()


@pytest.mark.parametrize("existing", ["study.toml", "schema.json"])
@pytest.mark.parametrize("dangling", [False, True])
def test_existing_files_are_never_overwritten(tmp_path: Path, existing: str, dangling: bool) -> None:
    path = tmp_path / existing
    if dangling:
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.write_text("mine")
    with pytest.raises(OutputError, match="exists and is not overwritten"):
        init_study(tmp_path, header(tmp_path, "age,sex"))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["header.csv", existing])
    assert path.is_symlink() if dangling else path.read_text() == "mine"


def test_a_full_disk_leaves_neither_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        init_study(tmp_path / "study", header(tmp_path, "age,sex"))
    assert list((tmp_path / "study").iterdir()) == []


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "study").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        init_study(tmp_path / "study", header(tmp_path, "age,sex"))


@pytest.mark.parametrize("folder", ["tele'ICU & co", "-x", "...", "Größe", "a" * 120])
def test_the_folder_name_makes_a_valid_study_name(tmp_path: Path, folder: str) -> None:
    result = init_study(tmp_path / folder, header(tmp_path, "age,sex"))
    StudySection.model_validate(tomllib.loads(result.study.read_text())["study"])


def test_the_template_holds_every_key_with_its_meaning_and_default() -> None:
    required = {"name": "Tele ICU", "schema": "schema.json"}
    text = study_template({"study": required})
    document = tomllib.loads(text)
    lines = text.splitlines()
    assert Study.model_validate(document) == Study.model_validate({"study": required})
    for section, field in Study.model_fields.items():
        options = getattr(field.annotation, "model_fields", {})
        assert f"[{section}]" in lines or (not options and f"# [{section}]" in lines)
        for name, option in options.items():
            key = option.alias or name
            start = lines.index(f"[{section}]")
            at = next(i for i, line in enumerate(lines) if i > start and line.startswith((f"{key} =", f"# {key} =")))
            assert option.description and lines[at - 1].lower() == f"# {option.description}".lower()
            assert key in document[section] or option.default is None
