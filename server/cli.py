"""`cohortium`, the command line of the consortium's coordinator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.console import new_app, progress, results, run_cli, write_json
from server.audit_commands import app as audit_app
from server.deploy_commands import app as deploy_app
from server.enrol_commands import app as enrol_app
from server.gate_commands import app as gate_app
from server.release_commands import app as release_app

if TYPE_CHECKING:
    from server.run_inputs import RunInputs

app = new_app("The coordinator's side of a Cohortium study.")

app.add_typer(audit_app)
app.add_typer(enrol_app)
app.add_typer(deploy_app)
app.add_typer(release_app)
app.add_typer(gate_app)

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on standard error.")]
Out = Annotated[Path, typer.Option(help="Directory for the results; must not exist or be empty.")]
Audit = Annotated[Path | None, typer.Option(help="audit.json of `cohortium audit`, for the gate on it.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a key of study.toml.")
]


@app.command()
def init(
    directory: Annotated[Path, typer.Argument(help="Where to write study.toml and schema.json.")],
    header: Annotated[Path, typer.Option(help="A CSV of the study's table; only its first line is read.")],
    dictionary: Annotated[
        Path | None, typer.Option(help="A data dictionary: REDCap's CSV export, or name,type,minimum,maximum,levels.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the study; default: the directory's name.")] = None,
) -> None:
    """Write a commented study.toml and a schema.json from a header and a data dictionary, never from values."""
    from server.init import init_study

    results.print(init_study(directory, header, dictionary, name).describe(), soft_wrap=True)


@app.command()
def simulate(
    study: Annotated[Path, typer.Argument(help="study.toml")],
    sites: Annotated[Path, typer.Option(help="Directory with one CSV file a site.")],
    out: Out,
    test: Annotated[Path | None, typer.Option(help="Held-out patients, for utility only.")] = None,
    audit: Audit = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run a whole study on this machine: Flower's simulation runtime, one SuperNode a site.

    Exit code 12: a gate of the study failed, and nothing was released.
    """
    from common.study import load_protocol
    from server.run_inputs import RunInputs

    protocol = load_protocol(study, overrides or ())
    _run(protocol, RunInputs(sites.resolve(), test and test.resolve()), out, audit, as_json=as_json, quiet=quiet)


@app.command()
def demo(
    out: Out = Path("demo-out"),
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """A real federation on real patients: the OPT trial, four US centres, 814 women."""
    from server.demo_study import prepare_demo
    from server.run_inputs import RunInputs

    with prepare_demo(overrides or ()) as demo_run:
        inputs = RunInputs(demo_run.sites, demo_run.test, demo=True)
        _run(demo_run.protocol, inputs, out, None, as_json=as_json, quiet=quiet)


@app.command()
def compare(
    study: Annotated[Path, typer.Argument(help="study.toml")],
    sites: Annotated[Path, typer.Option(help="Directory with one CSV file a site.")],
    out: Out,
    test: Annotated[Path | None, typer.Option(help="Held-out patients; without them no utility.")] = None,
    epsilons: Annotated[
        list[float] | None, typer.Option("--epsilon", help="ε of a dpsgd run; may be repeated. Default: 1, 3 and 10.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Repeat every run with study.seed = 0, 1, … this many times.")] = 1,
    overrides: Overrides = None,
    dpsgd: Annotated[
        list[str] | None,
        typer.Option("--dpsgd", metavar="SECTION.KEY=VALUE", help="Override a key for the dpsgd runs only."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run constrained, dpsgd at several ε and the non-private reference: one table and one figure."""
    from server.compare import EPSILONS, Inputs, plan_comparison, require_finished, run_comparison
    from server.compare_report import comparison_notes, comparison_table, write_comparison
    from server.run import claim_output

    plan = plan_comparison(
        study, epsilons=epsilons or EPSILONS, seeds=seeds, overrides=overrides or (), dpsgd=dpsgd or ()
    )
    inputs = Inputs.read(plan, sites, test)
    folder = claim_output(out.resolve()).out
    comparison = run_comparison(plan, inputs, folder, quiet=quiet)
    write_comparison(comparison, folder)
    if as_json:
        write_json(comparison.model_dump(mode="json"))
    else:
        results.print(comparison_table(comparison))
        results.print(comparison_notes(comparison, folder), soft_wrap=True)
    require_finished(comparison)


def _run(protocol: Any, inputs: RunInputs, out: Path, audit: Path | None, *, as_json: bool, quiet: bool) -> None:
    from common.privacy.update_noise import require_useful_noise
    from common.table import read_table
    from server.anchor.expectation import require_useful_anchor
    from server.checkpoint import build_decoder
    from server.gate_audit import load_audit
    from server.gate_commands import show_release
    from server.gating import Decision
    from server.progress import show_rounds
    from server.release import release_simulation
    from server.run import claim_output
    from server.simulation import load_sites
    from server.simulation import simulate as run_simulation

    # Everything that can be wrong with the input is found before Flower starts.
    tables = load_sites(inputs.sites, protocol)
    held_out = read_table(inputs.test, protocol.schema)[0] if inputs.test else None
    decision = Decision(audit=load_audit(audit) if audit else None)
    patients = {name: len(table) for name, table in tables.items()}
    require_useful_noise(protocol.study, build_decoder(protocol, seed=0).size, patients)
    require_useful_anchor(protocol, patients)
    files = claim_output(out.resolve())
    inputs.save(files)
    with show_rounds(protocol.study.training.rounds, quiet=quiet) as on_round:
        result = run_simulation(protocol, inputs.sites, tables, files, on_round)
    if not quiet:
        progress.print("evaluating the cohort and writing the report")
    show_release(lambda: release_simulation(result, held_out, decision=decision), as_json=as_json)


def main() -> None:
    """Entry point of `cohortium`."""
    run_cli(app, "cohortium")
