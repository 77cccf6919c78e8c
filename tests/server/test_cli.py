import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

from common.errors import ExitCode
from common.study import load_protocol
from server.cli import main
from server.init import InitResult

ROOT = Path(__file__).parents[2]
SECRET = "Zq7731"
COHORTIUM = Path(sys.executable).with_name("cohortium")
STUDY = """[study]
name = "small"
schema = "schema.json"
[training]
rounds = 2
min_sites = 2
"""
FIELDS = [
    {"name": "age", "type": "number", "constraints": {"minimum": 0, "maximum": 120}},
    {"name": "sex", "type": "string", "constraints": {"enum": ["f", "m"]}},
]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def flat(self) -> str:
        """Both streams without white space: rich breaks lines at the terminal's width."""
        return "".join((self.out + self.err).split())


Command = Callable[..., Outcome]


@pytest.fixture
def cohortium(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["cohortium", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        assert isinstance(caught.value.code, int)
        captured = capsys.readouterr()
        return Outcome(caught.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "study.toml").write_text(STUDY)
    (tmp_path / "schema.json").write_text(json.dumps({"fields": FIELDS}))
    (tmp_path / "sites").mkdir()
    for site in ("anna", "berta"):
        (tmp_path / "sites" / f"{site}.csv").write_text("age,sex\n61,f\n62,m\n63,f\n")
    return tmp_path


def simulate(cohortium: Command, folder: Path, *options: object) -> Outcome:
    return cohortium("simulate", folder / "study.toml", "--sites", folder / "sites", "--out", folder / "out", *options)


# ---------------------------------------------------------------- bad input of `simulate`


def rewrite(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def empty_sites(folder: Path) -> None:
    for path in (folder / "sites").iterdir():
        path.unlink()


def no_sites(folder: Path) -> None:
    empty_sites(folder)
    (folder / "sites").rmdir()


@pytest.mark.parametrize(
    ("spoil", "code", "expected"),
    [
        pytest.param(
            rewrite("study.toml", STUDY.replace("rounds", "ruonds")),
            ExitCode.STUDY,
            ["study.toml", "[training] ruonds: unknown key; did you mean 'rounds'?"],
            id="unknown key",
        ),
        pytest.param(
            rewrite("study.toml", STUDY.replace("[training]", "[trainig]")),
            ExitCode.STUDY,
            ["did you mean 'training'?"],
            id="unknown section",
        ),
        pytest.param(rewrite("study.toml", "[study"), ExitCode.STUDY, ["not valid TOML"], id="no TOML"),
        pytest.param(remove("study.toml"), ExitCode.STUDY, ["study.toml: cannot be read"], id="missing study"),
        pytest.param(remove("schema.json"), ExitCode.SCHEMA, ["the schema cannot be read"], id="missing schema"),
        pytest.param(
            rewrite("schema.json", json.dumps({"fields": [{"name": "age", "type": "number"}]})),
            ExitCode.SCHEMA,
            ["column 'age'", "minimum"],
            id="schema without bounds",
        ),
        pytest.param(no_sites, ExitCode.DATA, ["sites: no *.csv files found"], id="missing directory"),
        pytest.param(empty_sites, ExitCode.DATA, ["sites: no *.csv files found"], id="empty directory"),
        pytest.param(
            rewrite("sites/berta.csv", "age\n61\n"), ExitCode.DATA, ["site 'berta'", "column 'sex' is missing"],
            id="missing column",
        ),
        pytest.param(
            rewrite("sites/berta.csv", f"age,sex\n61,f\n{SECRET},m\n"),
            ExitCode.DATA,
            ["site 'berta'", "column 'age': 1 value(s) are not finite numbers", "(data rows 2)"],
            id="text in a number",
        ),
        pytest.param(
            rewrite("sites/berta.csv", f"age,sex\n61,f\n62,{SECRET}\n"),
            ExitCode.DATA,
            ["site 'berta'", "column 'sex': 1 value(s) are not one of the declared categories", "(data rows 2)"],
            id="unknown category",
        ),
        pytest.param(
            rewrite("sites/berta.csv", "age,sex\n"), ExitCode.DATA, ["site 'berta'", "no data rows"], id="empty site"
        ),
        pytest.param(
            rewrite("sites/my site.csv", "age,sex\n61,f\n"), ExitCode.DATA, ["site 'my site'", "rename the file"],
            id="file name that is no site",
        ),
        pytest.param(
            remove("sites/berta.csv"), ExitCode.FEDERATION, ["1 site(s), training.min_sites is 2"], id="too few sites"
        ),
    ],
)  # fmt: skip
def test_bad_input_is_explained_before_anything_is_written(
    cohortium: Command, folder: Path, spoil: Callable[[Path], object], code: ExitCode, expected: list[str]
) -> None:
    spoil(folder)
    outcome = simulate(cohortium, folder)
    assert outcome.code == code and outcome.out == ""
    assert outcome.err.count("error: ") == 1 and "Traceback" not in outcome.err and "How to mend it" in outcome.err
    assert all(text in outcome.err for text in expected), outcome.err
    assert SECRET not in outcome.err and not (folder / "out").exists()


def test_the_problems_of_all_sites_are_listed_at_once(cohortium: Command, folder: Path) -> None:
    (folder / "sites" / "anna.csv").write_text("age\n61\n")
    (folder / "sites" / "berta.csv").write_text(f"age,sex\n{SECRET},f\n")
    outcome = simulate(cohortium, folder)
    assert outcome.code == ExitCode.DATA
    assert "site 'anna'" in outcome.err and "site 'berta'" in outcome.err and SECRET not in outcome.err


def test_a_directory_in_use_is_left_alone(cohortium: Command, folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "cohort.csv").write_text("mine")
    outcome = simulate(cohortium, folder)
    assert outcome.code == ExitCode.OUTPUT and "exists and is not empty" in outcome.err
    assert [path.name for path in (folder / "out").iterdir()] == ["cohort.csv"]
    assert (folder / "out" / "cohort.csv").read_text() == "mine"


def test_held_out_patients_that_cannot_be_read(cohortium: Command, folder: Path) -> None:
    outcome = simulate(cohortium, folder, "--test", folder / "none.csv")
    assert outcome.code == ExitCode.DATA and "none.csv: cannot be read" in outcome.err
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.ruonds=3", "did you mean 'rounds'?"),
        ("rounds=3", "is not section.key=value"),
        ("training.rounds", "is not section.key=value"),
        ("training.rounds=many", "[training] rounds"),
        ("training.min_sites=3", "2 site(s), training.min_sites is 3"),
    ],
)
def test_overrides_are_checked_like_the_file(cohortium: Command, folder: Path, override: str, expected: str) -> None:
    outcome = simulate(cohortium, folder, "--set", override)
    assert outcome.code in (ExitCode.STUDY, ExitCode.FEDERATION) and expected in outcome.err


@pytest.mark.parametrize("arguments", [["simulate"], ["simulate", "study.toml"], ["simulat"], ["verify", "--kee", "x"]])
def test_a_command_line_that_is_wrong(cohortium: Command, arguments: list[str]) -> None:
    outcome = cohortium(*arguments)
    assert outcome.code == ExitCode.USAGE and outcome.out == "" and outcome.err


def test_verify_without_a_release(cohortium: Command, tmp_path: Path) -> None:
    outcome = cohortium("verify", tmp_path)
    assert outcome.code == ExitCode.VERIFY and "no readable manifest" in outcome.err


# ---------------------------------------------------------------- the installed script


def test_the_installed_script_exits_with_the_same_codes(folder: Path) -> None:
    (folder / "study.toml").write_text(STUDY.replace("rounds", "ruonds"))
    command = [COHORTIUM, "simulate", "study.toml", "--sites", "sites", "--out", "out", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == ExitCode.STUDY
    assert done.stdout == "" and "did you mean 'rounds'?" in done.stderr and "Traceback" not in done.stderr


def test_the_version_is_that_of_the_distribution() -> None:
    done = subprocess.run([COHORTIUM, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, version("cohortium"), "")


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_load_nothing_heavy(option: str) -> None:
    heavy = ("torch", "flwr", "ray", "frictionless", "pandas", "pyarrow", "sklearn", "numpy", "matplotlib",
             "mlcroissant", "rocrate", "rdflib", "requests")  # fmt: skip
    code = f"""
import sys
from server.cli import main
sys.argv = ["cohortium", {option!r}]
try:
    main()
except SystemExit as stop:
    assert stop.code == 0
sys.exit(repr([name for name in {heavy!r} if name in sys.modules]))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stderr.strip() == "[]" and done.stdout
    if option == "--help":
        assert all(command in done.stdout for command in ("init", "simulate", "demo", "verify"))


# ---------------------------------------------------------------- `init`


def test_init_prints_what_is_left_to_do(cohortium: Command, tmp_path: Path) -> None:
    (tmp_path / "header.csv").write_text(f"mrn,age,crp,note\n{SECRET},61,3,x\n")
    (tmp_path / "dictionary.csv").write_text(
        "name,type,minimum,maximum,levels\nmrn,identifier,,,\nage,number,0,120,\ncrp,number,0,,\nabsent,boolean,,,\n"
    )
    outcome = cohortium(
        "init", tmp_path / "new", "--header", tmp_path / "header.csv", "--dictionary", tmp_path / "dictionary.csv"
    )
    assert outcome.code == 0 and outcome.err == "" and SECRET not in outcome.out
    for text in (tmp_path / "new" / "study.toml", tmp_path / "new" / "schema.json", "mrn: an identifier", "absent",
                 "column 'crp'", "`constraints.maximum`", "column 'note'", "next: complete"):  # fmt: skip
        assert "".join(str(text).split()) in outcome.flat, text
    assert "column'age'" not in outcome.flat


def test_init_with_nothing_left_to_do_names_the_next_step(cohortium: Command, tmp_path: Path) -> None:
    (tmp_path / "header.csv").write_text("age\n")
    (tmp_path / "dictionary.csv").write_text("name,type,minimum,maximum,levels\nage,number,0,120,\n")
    outcome = cohortium(
        "init", tmp_path / "new", "--header", tmp_path / "header.csv", "--dictionary", tmp_path / "dictionary.csv"
    )
    assert outcome.code == 0 and "complete" not in outcome.out and "cohortium-sitecheck--schema" in outcome.flat
    assert load_protocol(tmp_path / "new" / "study.toml").schema.names == ("age",)
    again = cohortium("init", tmp_path / "new", "--header", tmp_path / "header.csv")
    assert again.code == ExitCode.OUTPUT and "is not overwritten" in again.err


def test_a_result_describes_every_part_of_itself() -> None:
    result = InitResult(
        study=Path("a/study.toml"),
        schema=Path("a/schema.json"),
        columns=7,
        to_complete=("column 'crp': needs a maximum", "column 'note': no type is declared"),
        left_out={"mrn": "an identifier", "(column 6)": "it has no name"},
        unused=("absent", "gone"),
    )
    lines = result.describe().splitlines()
    assert (
        lines[0] == "wrote" and lines[1].strip() == "a/study.toml" and lines[2].strip() == "a/schema.json (7 columns)"
    )
    for line in ("column 'crp': needs a maximum", "column 'note': no type is declared", "mrn: an identifier",
                 "(column 6): it has no name", "absent", "gone"):  # fmt: skip
        assert f"  - {line}" in lines
    assert lines[-2].startswith("next: complete a/schema.json")
    assert lines[-1].strip() == "cohortium-site check --schema a/schema.json --data FILE"
    done = InitResult(Path("s"), Path("c"), 1, (), {}, ()).describe()
    assert "complete" not in done and "left out" not in done and "dictionary" not in done
