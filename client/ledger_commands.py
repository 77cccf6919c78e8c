"""`cohortium-site ledger show | verify | export`: what this hospital has spent, and whether its ledger holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from common.console import results, write_json
from common.errors import LedgerError, UsageError

if TYPE_CHECKING:  # what a command needs is loaded when it runs, so that --help stays quick
    from common.privacy.ledger import Ledger

app = typer.Typer(help="What this hospital has spent, and whether its ledger holds.", no_args_is_help=True)

LedgerOption = Annotated[Path | None, typer.Option("--ledger", help="A ledger file, or a copy of one.")]
SiteOption = Annotated[Path | None, typer.Option("--site", help="The site.toml whose ledger is meant.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
DeltaOption = Annotated[
    float, typer.Option(help="delta for a study whose protocol is not in `studies` beside the ledger.")
]


@app.command()
def show(
    ledger: LedgerOption = None, site: SiteOption = None, delta: DeltaOption = 1e-5, as_json: JsonOption = False
) -> None:
    """Say what was spent: per study, adversary and kind of event, and in total. The ledger is checked first.

    Exit code 10: the ledger does not hold, and nothing is said about it.
    """
    from client.ledger_statement import ledger_statement, render_text

    _check_delta(delta)
    with _open(ledger, site) as opened:
        statement = ledger_statement(opened.inspect(), opened.path.parent / "studies", delta)
    if as_json:
        write_json(statement)
    else:
        for line in render_text(statement):
            results.print(line, soft_wrap=True)


@app.command()
def verify(ledger: LedgerOption = None, site: SiteOption = None, as_json: JsonOption = False) -> None:
    """Check file, chain, signature, key and countersignatures, and say what was checked.

    Exit code 10: the ledger does not hold; the message tells truncated, edited, another site's, signed by another key,
    rolled back and newer apart. A clock that went backwards is a warning.
    """
    from client.ledger_statement import checks_in_words
    from common.keys import key_id

    path = ledger or site
    try:
        with _open(ledger, site) as opened:
            path, found = opened.path, opened.inspect()
    except LedgerError as error:
        if as_json:
            write_json({"ledger": str(path), "holds": False, "problem": error.message})
        raise
    checked = checks_in_words(found)
    if as_json:
        head = found.head
        facts = {"site": head.site, "length": head.length, "head": head.head}
        facts |= {"key": head.key, "key_id": key_id(head.key)}
        seen = [{"key": w.key, "key_id": key_id(w.key), "length": w.length} for w in found.witnesses]
        more = {"key_compared": found.key_compared, "checked": checked, "witnesses": seen, "warnings": found.clock}
        write_json({"ledger": str(path), "holds": True} | facts | more)
        return
    results.print("Checked:")
    for line in checked:
        results.print(f"  {line}", soft_wrap=True)
    for warning in found.clock:
        results.print(f"Warning: {warning}", soft_wrap=True)
    results.print(f"Verdict: the ledger of site {found.head.site} holds.", soft_wrap=True)


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="The file to write.")],
    ledger: LedgerOption = None,
    site: SiteOption = None,
    file_format: Annotated[
        Literal["json", "html"], typer.Option("--format", help="html: one page for reading and printing.")
    ] = "html",
    delta: DeltaOption = 1e-5,
) -> None:
    """Write the statement with every entry as one file. The ledger is checked first."""
    from client.ledger_statement import checks_in_words, entries_to_json, ledger_statement, render_html
    from common.files import write_atomic

    _check_delta(delta)
    with _open(ledger, site) as opened:
        found = opened.inspect()
        statement = ledger_statement(found, opened.path.parent / "studies", delta)
    entries, checked = entries_to_json(found.entries), checks_in_words(found)
    if file_format == "html":
        content = render_html(statement, checked, entries)
    else:
        document = statement | {"checked": checked, "entries": entries}
        content = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(out, content)
    results.print(f"{out}: {len(entries)} entries", soft_wrap=True)


def _open(ledger: Path | None, site: Path | None) -> Ledger:
    """An existing ledger, named by its file or by the site.toml it belongs to; never a new one."""
    from client.site import load_site
    from common.privacy.ledger import Ledger

    if (ledger is None) == (site is None):
        raise UsageError("name either --ledger FILE or --site site.toml", fix="`--help` lists every option")
    if ledger is not None:
        return Ledger(ledger)
    assert site is not None
    config = load_site(site).site
    path = config.state / "ledger.sqlite"
    if not path.is_file():
        raise LedgerError(f"{path}: there is no ledger yet", fix="a site's ledger is made when it first joins a study")
    return Ledger(path, config.name)


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise UsageError(f"--delta {delta:g} is not between 0 and 1", fix="for example --delta 1e-5")
