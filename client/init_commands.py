"""Commands of `cohortium-site` for its folder and keys: init, rotate-node-key and follow-release-key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.console import results, write_json

app = typer.Typer()

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="New folder for this site's configuration, keys and state.")],
    site: Annotated[str, typer.Option(help="The site's name in the consortium.")],
    data: Annotated[Path, typer.Option(help="This hospital's patient table, .csv or .parquet; it is not read.")],
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="The coordinator's SuperLink.")],
    ca: Annotated[Path, typer.Option(help="The consortium's ca.pem.")],
    release_key: Annotated[Path | None, typer.Option(help="The coordinator's release.pub.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make site.toml, the site's keys, and the enrolment request for the coordinator."""
    from client.init_site import init_site

    made = init_site(directory, site, data, superlink, ca, release_key)
    if as_json:
        write_json(made.to_json())
        return
    results.print(made.describe(), soft_wrap=True)
    if not data.exists():
        results.print(f"{data} does not exist yet; put the table there before the study starts.", soft_wrap=True)


@app.command("rotate-node-key")
def rotate_node_key(
    directory: Annotated[Path, typer.Argument(help="The site's folder.")], as_json: AsJson = False
) -> None:
    """A new node key and a new enrolment request; the old key stays as .old-<date>."""
    from client.init_site import rotate_node_key as rotate

    made = rotate(directory)
    if as_json:
        write_json(made.to_json())
    else:
        results.print(made.describe(), soft_wrap=True)


@app.command("follow-release-key")
def follow_release_key(
    directory: Annotated[Path, typer.Argument(help="The site's folder.")],
    handover: Annotated[Path, typer.Argument(help="The coordinator's release-handover-OLD-NEW.json.")],
    as_json: AsJson = False,
) -> None:
    """Pin the coordinator's new release key, if the pinned one has signed that it follows."""
    from client.init_site import follow_release_key as follow

    pinned = follow(directory, handover)
    if as_json:
        write_json({"release_key": pinned})
    else:
        results.print(f"The pinned release key is now {pinned}", soft_wrap=True)
