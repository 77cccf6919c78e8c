"""Commands of `cohortium-site` around a running site: start, status, review, approve, deny, and audit verify."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Annotated, Literal

import typer

from common.console import results, write_json
from common.errors import SiteError, UsageError

app = typer.Typer()
audit_app = typer.Typer(help="The site's audit log.", no_args_is_help=True)
app.add_typer(audit_app, name="audit")

SiteOption = Annotated[Path, typer.Option("--site", help="This site's site.toml.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
DigestArgument = Annotated[str, typer.Argument(metavar="DIGEST", help="At least 8 digits of the digest.")]
ReasonOption = Annotated[str, typer.Option(help="Why, in a sentence; it is signed and logged.")]
ByOption = Annotated[str | None, typer.Option(help="Who decides; default: the user of this machine.")]
SITE = Path("site.toml")


@app.command()
def start(
    site: SiteOption = SITE,
    connection: Annotated[Path | None, typer.Option(help="connection.toml; default: beside site.toml.")] = None,
    log_format: Annotated[Literal["text", "json"], typer.Option(help="Form of the log lines.")] = "text",
    health: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where gRPC health probes are answered; port 0: a free one.")
    ] = "127.0.0.1:0",
    time_limit: Annotated[float, typer.Option(help="Seconds a message may take until the worker is killed.")] = 21600.0,
    give_up: Annotated[
        float | None, typer.Option(help="End after this many seconds without a SuperLink; default: wait for ever.")
    ] = None,
) -> None:
    """Run this site in the foreground, for systemd and containers; SIGTERM ends it.

    Exit code 6: wrong authority, name, clock or key file, or it runs already. 8: the SuperLink does not accept this
    site's key, or was not reached before `--give-up`. 10: the ledger's key is missing or unusable.
    """
    from client.start import Options
    from client.start import start as run

    if time_limit <= 0 or (give_up is not None and give_up < 0):
        raise UsageError("--time-limit and --give-up are positive numbers of seconds", fix="leave them out")
    beside = connection or site.parent / "connection.toml"
    run(Options(site, beside, log_format, health, time_limit, give_up))


@app.command()
def status(site: SiteOption = SITE, as_json: JsonOption = False) -> None:
    """Say whether the site runs and is connected, what its studies spent, and what waits for a decision.

    Exit code 0: everything is well. 8: it is not running, or a part of it is not well.
    """
    from client.site import load_site
    from client.site_status import render_status, site_status
    from client.start import exit_code_of

    found = site_status(load_site(site))
    if as_json:
        write_json(found)
    else:
        results.print(*render_status(found), sep="\n", soft_wrap=True)
    raise typer.Exit(exit_code_of(found["health"]))


@app.command()
def review(
    digest: Annotated[str | None, typer.Argument(metavar="[DIGEST]", help="At least 8 digits of one request.")] = None,
    site: SiteOption = SITE,
    everything: Annotated[bool, typer.Option("--all", help="Also what was decided or has expired.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a coordinator asks this site to run: studies in plain words, bundles with their differences."""
    from client.review import Review, render, render_list
    from client.site import load_site

    found = Review(load_site(site))
    if digest is not None:
        details = found.details(found.find(digest))
        if as_json:
            write_json(details)
        else:
            results.print(*render(details), sep="\n", soft_wrap=True)
        return
    lines = found.listed(everything)
    if as_json:
        write_json(lines)
        return
    results.print(*render_list(lines), sep="\n", soft_wrap=True)
    if lines:
        results.print("`cohortium-site review DIGEST` shows one of them whole.", soft_wrap=True)


@app.command()
def approve(
    digest: DigestArgument,
    site: SiteOption = SITE,
    reason: ReasonOption = "",
    by: ByOption = None,
    as_json: JsonOption = False,
) -> None:
    """Allow a study or an app bundle here. Signed with the site's key and logged; it counts at once."""
    _decide(digest, site, "approved", reason, by, as_json)


@app.command()
def deny(
    digest: DigestArgument,
    site: SiteOption = SITE,
    reason: ReasonOption = "",
    by: ByOption = None,
    as_json: JsonOption = False,
) -> None:
    """Refuse a study or an app bundle, or withdraw an approval. Signed and logged; it counts at once."""
    _decide(digest, site, "denied", reason, by, as_json)


@audit_app.command("verify")
def audit_verify(site: SiteOption = SITE, as_json: JsonOption = False) -> None:
    """Check the chain of the site's audit log.

    Exit code 11: a line was edited, removed or inserted; the message names it.
    """
    from client.site import load_site
    from common.audit import AUDIT_LOG, AuditError, read_audit

    path = load_site(site).site.state / AUDIT_LOG
    if not path.exists():
        raise SiteError(
            f"{path}: there is no audit log",
            fix="it is made when a coordinator first asks for something; if it was there, look for who removed it",
        )
    try:
        entries = read_audit(path)
    except AuditError as error:
        if as_json:
            write_json({"log": str(path), "holds": False, "problem": error.message})
        raise
    last = entries[-1]["hash"] if entries else ""
    if as_json:
        write_json({"log": str(path), "holds": True, "lines": len(entries), "last": last})
    else:
        results.print(f"{path}: {len(entries)} lines, the chain holds; its end is {last or 'empty'}", soft_wrap=True)


def _decide(
    digest: str, site: Path, verdict: Literal["approved", "denied"], reason: str, by: str | None, as_json: bool
) -> None:
    from client.review import Review
    from client.site import load_site

    found = Review(load_site(site))
    request = found.find(digest)
    decision = found.decide(request, verdict, by or _user(), reason)
    if as_json:
        write_json({"kind": decision.kind, "digest": decision.digest, "verdict": verdict, "time": decision.time})
    else:
        results.print(f"{decision.kind} {decision.digest}: {verdict}, signed and logged", soft_wrap=True)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        raise UsageError("this machine does not know who you are", fix="add --by NAME") from None
