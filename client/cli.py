"""`cohortium-site`, the command line of the hospital's data steward."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from client.init_commands import app as init_app
from client.ledger_commands import app as ledger_app
from common.console import new_app, results, run_cli, write_json
from common.errors import DataError, ExitCode

app = new_app("The hospital's side of a Cohortium study.")

app.add_typer(init_app)
app.add_typer(ledger_app, name="ledger")


@app.command()
def check(
    schema: Annotated[Path, typer.Option(help="The study's schema.json.")],
    data: Annotated[Path, typer.Option(help="This hospital's patient table, .csv or .parquet.")],
    out_of_bounds: Annotated[
        Literal["clip", "refuse"],
        typer.Option(help="Values outside declared bounds: move them to the bound and count them, or refuse them."),
    ] = "clip",
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON on standard output.")] = False,
) -> None:
    """Tell whether a file fits the schema, column by column, without showing a patient's value.

    Exit code 0: it fits. 3: the schema is unusable. 4: the file does not fit.
    """
    from client.check import check_file, render

    try:
        found = check_file(schema, data, out_of_bounds)
    except DataError as error:
        if as_json:
            write_json({"file": str(data), "fits": False, "problems": [error.message]})
        raise
    if as_json:
        write_json(found.to_json())
    else:
        results.print(*render(found), sep="\n")
    if not found.fits:
        raise typer.Exit(ExitCode.DATA)


def main() -> None:
    """Entry point of `cohortium-site`."""
    run_cli(app, "cohortium-site")
