"""What both command lines share: where output goes, and how a failure reads and exits."""

from __future__ import annotations

import io
import json
import os
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer
from rich.console import Console

from common.errors import CohortiumError, ExitCode

# Column names and paths may hold brackets and colons, so rich's markup and emoji codes are off.
results = Console(markup=False, emoji=False, highlight=False)
progress = Console(stderr=True, markup=False, emoji=False, highlight=False)


def write_json(document: Any) -> None:
    """Print one JSON document on standard output (`ValueError` for NaN or infinity)."""
    print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def distribution_version() -> str:
    """Version of the installed distribution."""
    try:
        return version("cohortium")
    except PackageNotFoundError:
        return "unknown (not installed)"


def show_version(wanted: bool) -> None:
    """Typer callback of an eager `--version` option: print it and exit with code 0."""
    if wanted:
        print(distribution_version())
        raise typer.Exit


def new_app(text: str) -> typer.Typer:
    """A command line with the help `text` and a `--version` option, quiet about tracebacks (see `run_cli`)."""
    app = typer.Typer(help=text, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    @app.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
        ] = False,
    ) -> None:
        pass

    return app


def run_cli(app: typer.Typer, prog: str) -> None:
    """Run a command line and exit: 0, a usage error's 2, the `exit_code` of a `CohortiumError`, 130 or 1.

    The text of an unforeseen exception may quote a patient's cell, so only its type is named, unless the environment
    variable COHORTIUM_DEBUG is set.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 must not stop a report
    try:
        app(prog_name=prog)
    except CohortiumError as error:
        _complain(str(error))
        code = error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted")
        code = ExitCode.INTERRUPTED
    except Exception as error:
        if os.environ.get("COHORTIUM_DEBUG"):
            traceback.print_exc()
        _complain(
            f"{prog} stopped on an unforeseen {type(error).__name__}; COHORTIUM_DEBUG=1 shows the traceback, which may"
            " quote patient data"
        )
        code = ExitCode.INTERNAL
    else:
        code = ExitCode.OK
    sys.exit(int(code))


def _complain(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
