"""Commands of `cohortium` for a running consortium: start-superlink, launch, resume, stop, status, audit-log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from common.console import progress, results, write_json

if TYPE_CHECKING:
    from server.gating import Decision
    from server.launch import Launch

app = typer.Typer()
audit_log = typer.Typer(help="The coordinator's audit log.", no_args_is_help=True)
app.add_typer(audit_log, name="audit-log")

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on standard error.")]
Consortium = Annotated[Path, typer.Option(help="The consortium's folder.")]
Out = Annotated[Path, typer.Argument(help="The --out of a launch.")]
Audit = Annotated[Path | None, typer.Option(help="audit.json of `cohortium audit`, for the gate on it.")]


@app.command("start-superlink")
def start(
    consortium: Consortium,
    public: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the sites connect; Fleet API only.")],
    private: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="For this machine's own commands; an address of the loopback.")
    ] = "127.0.0.1:8000",
    reply_mib: Annotated[
        int, typer.Option(min=1, max=4096, help="Most MiB that one reply of a site may have; larger ones are cut off.")
    ] = 64,
    health: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where gRPC health probes are answered; port 0: a free one.")
    ] = "127.0.0.1:0",
    log_format: Annotated[Literal["text", "json"], typer.Option(help="Form of the log lines.")] = "text",
) -> None:
    """Run the SuperLink and the coordinator's executor in the foreground, for systemd or a container."""
    from server.supervisor import start_superlink

    start_superlink(consortium, public, private, health=health, json_logs=log_format == "json", reply_mib=reply_mib)


@app.command("launch")
def launch_study(
    study: Annotated[Path, typer.Argument(help="study.toml")],
    consortium: Consortium,
    out: Annotated[Path, typer.Option(help="Directory for the results; must not exist or be empty.")],
    sites: Annotated[
        int | None, typer.Option(min=1, help="Sites to wait for; default: those the study or the consortium names.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of study.toml.")
    ] = None,
    audit: Audit = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Submit a study to the hospitals, follow it, and sign what comes out. Ctrl-C leaves it going on.

    Exit code 12: a gate of the study failed, and nothing was released.
    """
    from common.study import load_protocol
    from server.launch import launch

    decision = _decision(audit)
    started = launch(load_protocol(study, overrides or ()), consortium, out, sites)
    _follow(started, decision, as_json=as_json, quiet=quiet)


@app.command()
def resume(
    out: Out, consortium: Consortium, audit: Audit = None, as_json: AsJson = False, quiet: Quiet = False
) -> None:
    """Follow a study again; one that ended early goes on from its last complete round."""
    from server.launch import resume as again

    decision = _decision(audit)
    _follow(again(out, consortium), decision, as_json=as_json, quiet=quiet)


@app.command()
def stop(out: Out, consortium: Consortium) -> None:
    """End a study at the SuperLink; `resume` continues it."""
    from server.launch import stop as end

    end(out, consortium)
    results.print(f"stopped; continue with `cohortium resume {out} --consortium {consortium}`", soft_wrap=True)


@app.command()
def status(
    consortium: Consortium,
    spend: Annotated[
        bool, typer.Option("--spend", help="State ε of the last study even where the accounting takes seconds.")
    ] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="Ask the health services only: 0 if all are well, else exit code 8.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """SuperLink, sites, study, rounds and spend; exit code 8 while the SuperLink is down."""
    if probe:
        from server.probe import ask_health, health_code

        services = ask_health(consortium)
        if as_json:
            write_json(services)
        else:
            said = [f"{name}: {'well' if well else 'not well'}" for name, well in (services or {}).items()]
            results.print("\n".join(said or ["nobody answers health probes"]))
        raise typer.Exit(int(health_code(services)))
    from server.status import coordinator_status, status_code

    found = coordinator_status(consortium, spend=spend)
    if as_json:
        write_json(found)
    else:
        from server.status_view import status_view

        results.print(status_view(found))
    if status_code(found):
        raise typer.Exit(int(status_code(found)))


@app.command()
def bundle(
    out: Annotated[Path | None, typer.Option(help="Write the bundle here as well.")] = None, as_json: AsJson = False
) -> None:
    """The SHA-256 of the app bundle of this installation, which the sites approve."""
    from common.files import write_atomic
    from server.bundle import build_bundle

    built = build_bundle()
    if out is not None:
        write_atomic(out, built.content)
    if as_json:
        write_json({"sha256": built.digest, "files": built.files, "bytes": len(built.content)})
    else:
        results.print(built.digest)


@audit_log.command("verify")
def verify_audit(consortium: Consortium, as_json: AsJson = False) -> None:
    """Check the chain of the coordinator's audit log."""
    from common.audit import AUDIT_LOG, GENESIS, read_audit

    entries = read_audit(consortium / AUDIT_LOG)
    last = entries[-1]["hash"] if entries else GENESIS
    if as_json:
        write_json({"lines": len(entries), "last": last})
    else:
        results.print(f"{len(entries)} lines hold; keep this hash elsewhere: {last}", soft_wrap=True)


@audit_log.command("show")
def show_audit(consortium: Consortium, as_json: AsJson = False) -> None:
    """Print the coordinator's audit log, once its chain is checked."""
    from common.audit import AUDIT_LOG, FIELDS, read_audit

    entries = read_audit(consortium / AUDIT_LOG)
    if as_json:
        write_json(entries)
        return
    for entry in entries:
        about = "  ".join(f"{name}={_short(value)}" for name, value in entry.items() if name not in FIELDS)
        line = f"{entry['time']}  {entry['action']}  {entry['study']}  {entry['outcome']}  {about}"
        results.print(line.rstrip(), soft_wrap=True, markup=False)


def _short(value: object) -> str:
    """A field of an audit line in a word or two; `--json` prints it whole."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _decision(audit: Path | None) -> Decision:
    from server.gate_audit import load_audit
    from server.gating import Decision

    return Decision(audit=load_audit(audit) if audit else None)


def _follow(started: Launch, decision: Decision, *, as_json: bool, quiet: bool) -> None:
    from server.deployed import release_deployment
    from server.gate_commands import show_release
    from server.launch import follow
    from server.progress import show_rounds
    from server.simulation import RoundProgress
    from server.status import not_joined

    def waiting(sites: dict[str, str]) -> None:
        if sites and not quiet:
            progress.print(
                "waiting for " + "; ".join(f"{n}: {why}" for n, why in sorted(sites.items())), soft_wrap=True
            )

    def say(text: str) -> None:
        if not quiet:
            progress.print(text, soft_wrap=True)

    rounds = started.protocol().study.training.rounds
    say(f"following run {started.run}, results in {started.files.out}")
    with show_rounds(rounds, quiet=quiet) as on_round:
        follow(started, lambda report: on_round(RoundProgress(report, None, None)), waiting, say)
    if missing := not_joined(started.files):
        say("without " + "; ".join(f"{name}: {why}" for name, why in sorted(missing.items())))
    show_release(lambda: release_deployment(started, decision), as_json=as_json)
