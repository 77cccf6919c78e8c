"""`cohortium-site`, the command line of the hospital's data steward."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from client.anchor_commands import app as anchor_app
from client.countersign_commands import app as countersign_app
from client.init_commands import app as init_app
from client.ledger_commands import app as ledger_app
from client.start_commands import app as start_app
from common.console import new_app, results, run_cli, write_json
from common.errors import DataError, ExitCode, UsageError

app = new_app("The hospital's side of a Cohortium study.")

app.add_typer(init_app)
app.add_typer(start_app)
app.add_typer(anchor_app)
app.add_typer(countersign_app)
app.add_typer(ledger_app, name="ledger")


@app.command()
def check(
    schema: Annotated[Path, typer.Option(help="The study's schema.json.")],
    data: Annotated[Path | None, typer.Option(help="This hospital's patient table, .csv or .parquet.")] = None,
    site: Annotated[Path | None, typer.Option(help="In place of --data: site.toml with its source.")] = None,
    out_of_bounds: Annotated[
        Literal["clip", "refuse"],
        typer.Option(help="With --data: values outside their bounds are moved to the bound and counted, or refused."),
    ] = "clip",
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON on standard output.")] = False,
) -> None:
    """Tell whether a file fits the schema, column by column, without showing a patient's value.

    Exit code 0: it fits. 3: the schema is unusable. 4: the file does not fit.
    """
    from client.check import check_file, check_site, render

    if (data is None) == (site is None):
        raise UsageError("--data or --site: expected one of them", fix="name the table, or the site.toml that names it")
    try:
        found = check_file(schema, data, out_of_bounds) if data is not None else check_site(str(site), schema)
    except DataError as error:
        if as_json:
            write_json({"file": str(data or site), "fits": False, "problems": [error.message]})
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
