"""Command of `cohortium-site` for a study that begins with an anchor: anchored."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.console import results, write_json

app = typer.Typer()


@app.command()
def anchored(
    digest: Annotated[str, typer.Argument(metavar="DIGEST", help="At least 8 digits of the study's digest.")],
    out: Annotated[Path, typer.Option(help="New CSV file.")],
    rows: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many rows to draw.")] = 1000,
    site: Annotated[Path, typer.Option(help="This site's site.toml.")] = Path("site.toml"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Draw rows from the anchored decoder of a study, before any round is answered.

    It is made of noised statistics alone. With `stop_after_anchor = true` in site.toml the site answers no round until
    you set it to false.
    """
    from client.anchored import write_anchored_rows
    from client.site import load_site

    written = write_anchored_rows(load_site(site), digest, out, rows)
    if as_json:
        write_json({"out": str(out), "rows": written})
    else:
        results.print(f"{out}: {written} rows of the anchored decoder", soft_wrap=True)
