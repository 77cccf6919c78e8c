import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from client.cli import main
from common.errors import ExitCode

ROOT = Path(__file__).parents[2]
SECRET = "Zq7731"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    field = {"name": "age", "type": "number", "constraints": {"minimum": 0, "maximum": 120}}
    (tmp_path / "schema.json").write_text(json.dumps({"fields": [field]}))
    (tmp_path / "good.csv").write_text("age\n40.25\n41\n")
    (tmp_path / "high.csv").write_text("age\n40.25\n141\n")
    (tmp_path / "bad.csv").write_text(f"age\n40.25\n{SECRET}\n")
    (tmp_path / "other.csv").write_text(f"name\n{SECRET}\n")
    return tmp_path


def check(folder: Path, data: str, monkeypatch: pytest.MonkeyPatch, *options: str, schema: str = "schema.json") -> int:
    arguments = ["check", "--schema", str(folder / schema), "--data", str(folder / data), *options]
    monkeypatch.setattr(sys, "argv", ["cohortium-site", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


@pytest.mark.parametrize(
    ("data", "options", "code", "verdict"),
    [
        ("good.csv", [], ExitCode.OK, "Verdict: the file fits"),
        ("high.csv", [], ExitCode.OK, "Verdict: the file fits"),
        ("high.csv", ["--out-of-bounds", "refuse"], ExitCode.DATA, "Verdict: the file does not fit"),
        ("bad.csv", [], ExitCode.DATA, "Verdict: the file does not fit"),
    ],
)
def test_verdict_and_exit_code(
    folder: Path,
    data: str,
    options: list[str],
    code: int,
    verdict: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert check(folder, data, monkeypatch, *options) == code
    captured = capsys.readouterr()
    assert verdict in captured.out and captured.err == ""
    assert SECRET not in captured.out and "40.25" not in captured.out
    assert check(folder, data, monkeypatch, *options, "--json") == code
    captured = capsys.readouterr()
    assert json.loads(captured.out)["fits"] is (code == ExitCode.OK) and captured.err == ""
    assert SECRET not in captured.out


def test_a_file_that_cannot_be_reported_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(folder, "other.csv", monkeypatch, "--json") == ExitCode.DATA
    captured = capsys.readouterr()
    assert json.loads(captured.out)["fits"] is False
    assert captured.err.startswith("error: ") and SECRET not in captured.err + captured.out
    assert check(folder, "none.csv", monkeypatch) == ExitCode.DATA
    captured = capsys.readouterr()
    assert captured.out == "" and "none.csv: cannot be read" in captured.err


def test_an_unusable_schema(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(folder, "good.csv", monkeypatch, schema="none.json") == ExitCode.SCHEMA
    captured = capsys.readouterr()
    assert captured.out == "" and "none.json: the schema cannot be read" in captured.err


def test_wrong_usage(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(folder, "good.csv", monkeypatch, "--out-of-bounds", "drop") == ExitCode.USAGE
    assert capsys.readouterr().out == ""


def test_help_loads_nothing_heavy() -> None:
    heavy = (
        "torch",
        "flwr",
        "frictionless",
        "pandas",
        "pyarrow",
        "sklearn",
        "numpy",
        "mlcroissant",
        "rocrate",
        "requests",
    )
    code = f"""
import sys
from client.cli import main
sys.argv = ["cohortium-site", "--help"]
try:
    main()
except SystemExit as stop:
    assert stop.code == 0
sys.exit(repr([name for name in {heavy!r} if name in sys.modules]))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "check" in done.stdout
    assert done.stderr.strip() == "[]"


def test_the_source_and_policy_of_site_toml(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "site.toml").write_text(
        '[site]\nname = "anna"\ndata = "high.csv"\nstate = "state"\n[policy]\nout_of_bounds = "refuse"\n'
    )
    monkeypatch.setattr(
        sys, "argv", ["cohortium-site", "check", "--schema", f"{folder}/schema.json", "--site", f"{folder}/site.toml"]
    )
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == ExitCode.DATA and "does not fit" in capsys.readouterr().out
    assert check(folder, "good.csv", monkeypatch, "--site", f"{folder}/site.toml") == ExitCode.USAGE
    assert "expected one of them" in capsys.readouterr().err
