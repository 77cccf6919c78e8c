import io
import json
import math
import sys
from importlib.metadata import PackageNotFoundError
from typing import Annotated

import pytest
import typer

from common import console
from common.errors import DataError, ExitCode, UsageError

SECRET = "Zq7731"


def run(app: typer.Typer, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tool", *arguments])
    with pytest.raises(SystemExit) as caught:
        console.run_cli(app, "tool")
    code = caught.value.code
    assert isinstance(code, int)
    return code


def app_that_raises(error: BaseException | None) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def _command(
        rows: int = 1, version: Annotated[bool, typer.Option("--version", callback=console.show_version)] = False
    ) -> None:
        if error is not None:
            raise error

    return app


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (None, 0, ""),
        (DataError("site.csv: no data rows", fix="export it"), 4, "error: site.csv: no data rows\n  How to mend it: "),
        (UsageError("two modes"), 2, "error: two modes\n"),
        (typer.Exit(ExitCode.VERIFY), 11, ""),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes_and_messages(
    error: BaseException | None,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(app_that_raises(error), monkeypatch) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(message) and "Traceback" not in captured.err
    assert bool(captured.err) == bool(message) or code == 130


def test_an_unforeseen_error_names_its_type_and_hides_its_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COHORTIUM_DEBUG", raising=False)
    assert run(app_that_raises(ValueError(f"could not convert {SECRET!r}")), monkeypatch) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "ValueError" in captured.err and "COHORTIUM_DEBUG=1" in captured.err
    assert SECRET not in captured.err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COHORTIUM_DEBUG", "1")
    assert run(app_that_raises(ValueError(SECRET)), monkeypatch) == 1
    assert f"ValueError: {SECRET}" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--rows", "many"], ["--nonsense"], ["surplus"]])
def test_wrong_usage_exits_with_2(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(app_that_raises(None), monkeypatch, *arguments) == ExitCode.USAGE
    captured = capsys.readouterr()
    assert captured.out == "" and "Usage: tool" in captured.err


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(console, "version", lambda name: {"cohortium": "1.2.3"}[name])
    assert run(app_that_raises(RuntimeError()), monkeypatch, "--version") == 0
    assert capsys.readouterr().out == "1.2.3\n"


def test_version_of_a_source_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(console, "version", absent)
    assert console.distribution_version() == "unknown (not installed)"


def test_json_goes_to_standard_output_and_is_strict(capsys: pytest.CaptureFixture[str]) -> None:
    document = {"site": "Köln", "rows": [1, None]}
    console.write_json(document)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == document and captured.err == ""
    with pytest.raises(ValueError):
        console.write_json({"loss": math.nan})


def test_results_and_progress_keep_brackets_and_streams(capsys: pytest.CaptureFixture[str]) -> None:
    console.results.print("[bold] :smile:")
    console.progress.print("[red] round 1")
    captured = capsys.readouterr()
    assert captured.out == "[bold] :smile:\n" and captured.err == "[red] round 1\n"


def test_a_terminal_without_utf8_does_not_stop_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding="ascii"))
    assert run(app_that_raises(DataError("column 'größe' is missing")), monkeypatch) == 4
    sys.stderr.flush()
    assert b"gr\\xf6\\xdfe" in raw.getvalue()
