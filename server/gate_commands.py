"""Commands of `cohortium` for the gates of a release: release, and approve-override for the second signature."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from common.console import results, write_json

app = typer.Typer()

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]


@app.command()
def release(
    run: Annotated[Path, typer.Argument(help="The --out of a simulation or a launch.")],
    audit: Annotated[Path | None, typer.Option(help="audit.json of `cohortium audit`, for the gate on it.")] = None,
    override: Annotated[
        str | None, typer.Option(metavar="REASON", help="Release in spite of failed gates; needs --second.")
    ] = None,
    second: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What `approve-override` wrote: a second person's signature.")
    ] = None,
    sites: Annotated[
        Path | None, typer.Option(help="Simulation: the sites' directory, if it is not where it was.")
    ] = None,
    test: Annotated[
        Path | None, typer.Option(help="Simulation: held-out patients; the cohort is evaluated anew with them.")
    ] = None,
    consortium: Annotated[
        Path | None, typer.Option(help="Launch: the consortium's folder; default: the one it was launched from.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate the gates of a finished run again, in quarantine or not, and release it if all are open.

    Exit code 12: a gate failed, and nothing was released.
    """
    from common.errors import UsageError
    from common.override import check_reason, load_approval
    from server.gate_audit import load_audit
    from server.gating import Decision
    from server.launch import LAUNCH

    if (override is None) != (second is None):
        raise UsageError(
            "--override and --second: expected both or neither",
            fix="an override needs a reason and the file of a second person's approval (`cohortium approve-override`)",
        )
    decision = Decision(
        audit=load_audit(audit) if audit else None,
        reason=check_reason(override) if override is not None else None,
        approval=load_approval(second) if second else None,
    )
    run = run.resolve()
    if (run / LAUNCH).is_file():
        if sites or test:
            raise UsageError("--sites, --test: a launch has no patients here", fix="leave them out")
        show_release(lambda: _deployment(run, consortium, decision), as_json=as_json)
    else:
        if consortium:
            raise UsageError("--consortium: this run is a simulation", fix="leave it out")
        show_release(lambda: _simulation(run, sites, test, decision), as_json=as_json)


@app.command("approve-override")
def approve_override(
    quarantine: Annotated[Path, typer.Argument(help="The folder `quarantine` of the run, or a copy of it.")],
    key: Annotated[Path, typer.Option(help="Your own Ed25519 private key, PEM; not the release key.")],
    by: Annotated[str, typer.Option(help="Your name, as it will be printed.")],
    reason: Annotated[str, typer.Option(help="Why this cohort may be released although gates failed.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("override-approval.json"),
    as_json: AsJson = False,
) -> None:
    """Sign, as the second person, that the candidate in quarantine may be released. Nothing is released by it.

    The signature covers the very files, the failed gates with their numbers, and the reason. It needs no network.
    """
    from common.errors import OutputError, UsageError
    from common.files import write_atomic
    from common.keys import load_ed25519
    from common.override import SECOND_KEY, approve, load_candidate, read_approval

    document = load_candidate(quarantine)
    if out.exists():
        raise OutputError(f"{out}: exists; approvals are never written over", fix="choose another --out")
    if out.resolve().is_relative_to(quarantine.resolve()):
        raise UsageError(f"{out}: would change what is being approved", fix="choose a place outside of quarantine")
    envelope = approve(quarantine, load_ed25519(key, SECOND_KEY), by=by, reason=reason)
    approval = read_approval(envelope, str(out))
    write_atomic(out, json.dumps(envelope, indent=1))
    if as_json:
        write_json({"out": str(out), **approval.model_dump(mode="json")})
        return
    lines = [
        *document.in_words(),
        f"reason  {approval.content.reason}",
        f"signed  by {approval.content.by}, key {approval.key_id}",
        *(f"  {name}  {digest}" for name, digest in sorted(approval.files.items())),
        f"{out}: give it to the coordinator, who releases with `cohortium release RUN --override REASON --second FILE`",
    ]
    for line in lines:
        results.print(line, soft_wrap=True)


def show_release(attempt: Callable[[], dict[str, Any]], *, as_json: bool) -> None:
    """Release, and print what came of it; with `as_json` gates.json where gates failed, which is then raised."""
    from server.gating import GateError
    from server.progress import files_table, summary_table

    try:
        summary = attempt()
    except GateError as error:
        if as_json:
            write_json(error.document.to_json())
        raise
    if as_json:
        write_json(summary)
    elif "fidelity" in summary:
        results.print(summary_table(summary), files_table(summary), sep="\n")
    else:
        results.print(deployment_in_words(summary), soft_wrap=True)


def deployment_in_words(summary: dict[str, Any]) -> str:
    """The last lines of a launch."""
    from common.gates import read_gates

    return "\n".join(
        [
            f"{summary['study']}: {summary['rows']} synthetic rows of {len(summary['sites'])} sites,"
            f" {summary['rounds']} rounds, in {summary['out']}",
            summary["epsilon_in_words"],
            *read_gates(summary["gates"]).in_words(),
            f"Check it with `cohortium verify {summary['out']} --key {summary['release_key']}`.",
        ]
    )


def _deployment(run: Path, consortium: Path | None, decision: Any) -> dict[str, Any]:
    from common.errors import FederationError
    from server.deployed import release_deployment
    from server.launch import LAUNCH, Launch

    if consortium is None:
        consortium = Path(json.loads((run / LAUNCH).read_text(encoding="utf-8"))["consortium"])
    started = Launch.load(run, consortium)
    if not started.files.complete(started.protocol().study):
        raise FederationError(f"{run}: the study is not finished", fix=f"go on with {started.continuation}")
    return release_deployment(started, decision)


def _simulation(run: Path, sites: Path | None, test: Path | None, decision: Any) -> dict[str, Any]:
    from common.errors import UsageError
    from server.audit import MARK
    from server.release import release_simulation
    from server.run import RunFiles
    from server.run_inputs import finished_simulation, former_metrics

    files = RunFiles(run)
    if (run / MARK).exists():
        raise UsageError(f"{run}: the twin of an audit, which is never released", fix="name the folder of a run")
    with finished_simulation(files, sites, test) as (result, held_out):
        if not files.complete(result.protocol.study):
            raise UsageError(f"{run}: the simulation did not finish", fix="run it again")
        metrics = former_metrics(files) if test is None else None
        return release_simulation(result, held_out, decision=decision, metrics=metrics)
