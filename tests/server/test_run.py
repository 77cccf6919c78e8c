import json
from pathlib import Path

import pytest

from common.errors import ExitCode, FederationError, OutputError
from common.schema import parse_schema
from common.study import Protocol, Study
from server.run import RunFiles, RunSettings, claim_output


def make_protocol() -> Protocol:
    schema = {"fields": [{"name": "sex", "type": "string", "constraints": {"enum": ["f", "m"]}}]}
    return Protocol(Study.model_validate({"study": {"name": "s", "schema": "x.json"}}), parse_schema(schema))


def test_a_new_or_empty_directory_is_claimed(tmp_path: Path) -> None:
    files = claim_output(tmp_path / "deep" / "out")
    assert files == RunFiles(tmp_path / "deep" / "out") and files.out.is_dir()
    assert claim_output(files.out) == files
    assert list(files.out.iterdir()) == []


@pytest.mark.parametrize("name", ["cohort.csv", ".hidden", "folder/"])
def test_a_directory_in_use_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    if name.endswith("/"):
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match="exists and is not empty") as caught:
        claim_output(tmp_path)
    assert caught.value.exit_code is ExitCode.OUTPUT and str(tmp_path) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [name.rstrip("/")]


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists and is not empty"):
        claim_output(path)
    assert path.read_text() == "mine"
    with pytest.raises(OutputError, match="cannot be written to"):
        claim_output(path / "below")


def test_a_place_where_nothing_can_be_made() -> None:
    with pytest.raises(OutputError, match="cannot be written to"):
        claim_output(Path("/proc/cohortium-out"))


def test_every_role_has_a_file_of_its_own(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    roles = [name for name, value in vars(RunFiles).items() if isinstance(value, property)]
    paths = [getattr(files, role) for role in roles]
    assert len(set(paths)) == len(paths) >= 13 and all(path.parent == tmp_path for path in paths)


def test_settings_come_back_as_they_were(tmp_path: Path) -> None:
    protocol = make_protocol()
    RunSettings(protocol, tmp_path / "out", 4, simulation=True).save(tmp_path / "run.json")
    found = RunSettings.load(tmp_path / "run.json")
    assert found.protocol.digest == protocol.digest
    assert (found.out, found.sites, found.simulation) == (tmp_path / "out", 4, True)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"protocol": 3}', "null"])
def test_what_is_not_the_settings_of_a_run(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(FederationError, match="not the settings of a run"):
        RunSettings.load(path)


def test_settings_without_a_number_of_sites(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    RunSettings(make_protocol(), tmp_path, 4, simulation=True).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sites": None}))
    with pytest.raises(FederationError, match="not the settings of a run"):
        RunSettings.load(path)
