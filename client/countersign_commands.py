"""`cohortium-site countersign`: the hospital signs a release that agrees with its own ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.console import results, write_json

app = typer.Typer()


@app.command()
def countersign(
    bundle: Annotated[Path, typer.Argument(help="The release: a folder, or a .tar.zst.")],
    site: Annotated[Path, typer.Option(help="site.toml")],
    accept: Annotated[
        bool, typer.Option("--accept", help="Sign. Without it only what would be signed is shown.")
    ] = False,
    key: Annotated[
        Path | None, typer.Option(help="The coordinator's public key; default: release.pub beside site.toml.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the signature; default: that of site.toml.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")] = False,
) -> None:
    """Check a release against this site's own ledger and, with --accept, sign it for the coordinator to collect.

    Exit code 11: the release is not what was signed, or not one of this site's. 10: its ledger says something else.
    """
    from client.countersign import countersign as sign
    from client.countersign import propose

    proposal = propose(bundle, site, key)
    path = sign(proposal, site, out) if accept else None
    if as_json:
        write_json({**proposal.to_json(), "written": None if path is None else str(path)})
        return
    for line in proposal.in_words():
        results.print(line, soft_wrap=True)
    if path is None:
        results.print("Nothing is signed yet. If this is right, run it again with --accept.")
    else:
        results.print(f"{path}: send it to the coordinator, for `cohortium add-signature`", soft_wrap=True)
