"""`cohortium audit` and its last screen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table as RichTable

from common.console import progress, results, write_json

if TYPE_CHECKING:
    from server.audit_records import Audit, ScoreLine

app = typer.Typer()


@app.command()
def audit(
    study: Annotated[Path, typer.Argument(help="study.toml")],
    sites: Annotated[Path, typer.Option(help="Directory with one CSV file a site.")],
    out: Annotated[Path, typer.Option(help="Directory for the results; must not exist or be empty.")],
    canaries: Annotated[int, typer.Option(help="Patients of the audited site that are replaced by canaries.")] = 200,
    site: Annotated[str | None, typer.Option(help="The site that gets the canaries; default: the largest.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of study.toml.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print audit.json on standard output.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on standard error.")] = False,
) -> None:
    """Plant canaries in a twin of the study and measure how much attackers find: a lower bound on ε, no promise."""
    from server.audit import TWIN, plan_audit, require_unrefuted, run_audit
    from server.run import claim_output

    plan = plan_audit(study, sites, canaries=canaries, site=site, overrides=overrides or ())
    folder = claim_output(out.resolve()).out
    claim_output(folder / TWIN)
    if not quiet:
        progress.print(f"running a twin of the study with {canaries} canaries at {plan.site}")
    found = run_audit(plan, folder, quiet=quiet)
    if as_json:
        write_json(found.model_dump(mode="json"))
    else:
        results.print(audit_table(found))
        results.print(audit_notes(found, folder), soft_wrap=True)
    require_unrefuted(found)


def audit_table(audit: Audit) -> RichTable:
    """Every attack: what it showed, the most it could have shown, and the claim."""
    table = RichTable(title=f"{audit.study}: what attackers found of {audit.canaries.number} canaries")
    for name in ("adversary", "score"):
        table.add_column(name, no_wrap=True)
    for name in ("right", "of", "ε ≥", "most", "claim"):
        table.add_column(name, justify="right")
    for line in audit.lines:
        best = line.strongest
        cells = (str(best.correct), str(best.guesses), f"{best.epsilon:.2f}", f"{best.reachable:.2f}", _claim(line))
        table.add_row(line.adversary, line.score, *cells)
    return table


def _claim(line: ScoreLine) -> str:
    if isinstance(line.claim, str):
        return "none"
    return f"{line.claim:.3g}{' REFUTED' if line.refuted else ''}"


def audit_notes(audit: Audit, out: Path) -> str:
    """What must stand below the table."""
    from server.audit import JSON_NAME, MARK, TWIN

    terms = (
        f"ε ≥: lower bounds at δ = {audit.delta:g}, {audit.unit}, {audit.neighbouring_relation}; all lines hold"
        f" together with {audit.confidence:.0%} confidence. Most: the largest value the line could have reached, with"
        " every guess right. Claim: the ε of the study for this site against that adversary; none where it is infinite."
    )
    files = f"{out / JSON_NAME}\n{out / TWIN} (see {MARK})"
    return "\n".join([*audit.cautions, terms, "", files])
