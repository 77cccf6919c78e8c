"""What the coordinator sees while rounds run (on standard error), and the last screen (on standard output)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from common.console import progress as console
from common.gates import read_gates
from server.simulation import RoundProgress


@contextmanager
def show_rounds(rounds: int, *, quiet: bool) -> Iterator[Callable[[RoundProgress], None]]:
    """A live line with round, sites, certificate, loss, update norm and time left; sites that drop out get a line."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        disable=quiet,
    ) as bar:
        task = bar.add_task("starting Flower", total=rounds, detail="")
        missing: set[str] = set()

        def on_round(done: RoundProgress) -> None:
            report = done.report
            # Fits a terminal of 80 columns; loss and update norm exist in a simulation only.
            detail = f"{len(report['answered'])} sites, Lipschitz {report['certificate']:.2f}"
            if done.loss is not None and done.update_norm is not None:
                detail += f", loss {done.loss:.1f}, norm {done.update_norm:.2f}"
            bar.update(task, completed=report["round"], description="rounds", detail=detail)
            for site, reason in report["dropped"].items():
                if site not in missing and not quiet:
                    console.print(f"round {report['round']}: {site} is missing: {reason}")
            missing.clear()
            missing.update(report["dropped"])

        yield on_round


def summary_table(summary: dict[str, Any]) -> RichTable:
    """The result of a run as a table of facts."""
    table = RichTable(title=f"{summary['study']}: {summary['rows']} synthetic rows", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    patients = sum(site["patients"] for site in summary["sites"].values())
    table.add_row("sites", f"{len(summary['sites'])} ({', '.join(summary['sites'])})")
    for name, reason in summary["not_joined"].items():
        table.add_row("not joined", f"{name}: {reason}")
    table.add_row("patients", f"{patients}, none of whose rows left its site")
    table.add_row("rounds", str(summary["rounds"]) if summary["rounds"] else "none: anchored")
    bound = summary["certificate_bound"]
    limit = f" (bound of the study: {bound:g})" if bound is not None else " (no bound declared)"
    table.add_row("Lipschitz certificate", f"{summary['certificate']:.4f}{limit}")
    moves = [e["largest_move_of_decoder_per_round"] for e in summary["exposure"].values()]
    if summary["rounds"] == 0:
        table.add_row("exposure", "two messages of noised statistics from each site")
    elif all(isinstance(move, float) for move in moves):
        table.add_row("exposure", f"a site moves the global decoder by at most {max(moves):.3f} a round (2wC)")
    else:
        table.add_row("exposure", "unbounded (non-private reference)")
    released = {site: e["released_rows"] for site, e in summary["exposure"].items() if "released_rows" in e}
    if released:
        by_site = ", ".join(f"{site} {rows}" for site, rows in released.items())
        table.add_row("released rows", f"{sum(released.values())} through the stochastic channel ({by_site})")
    table.add_row("formal privacy", summary["epsilon_in_words"])
    if len(summary["lines"]) > 1:
        for line in summary["lines"]:
            value = line["epsilon"] if isinstance(line["epsilon"], str) else f"{line['epsilon']:.3g}"
            given = ", conditional on the encoder and decoder" if line["conditional"] else ""
            table.add_row("largest ε", f"{value}: {line['applies_to']}{given}")
    fidelity = summary["fidelity"]
    table.add_row(
        "fidelity",
        f"KS {_number(fidelity['ks_mean'])}, TV {_number(fidelity['tv_mean'])},"
        f" correlation difference {_number(fidelity['correlation_difference'])}",
    )
    if summary["utility"]:
        synthetic, real = summary["utility"]["tstr"], summary["utility"]["trtr"]
        table.add_row(
            "AUROC, gradient boosting",
            f"{_number(synthetic['gradient_boosting'])} trained on synthetic rows,"
            f" {_number(real['gradient_boosting'])} on real rows",
        )
        table.add_row(
            "AUROC, logistic regr.",
            f"{_number(synthetic['logistic_regression'])} trained on synthetic rows,"
            f" {_number(real['logistic_regression'])} on real rows",
        )
        if synthetic["reason"]:
            table.add_row("note", synthetic["reason"])
    if "gates" in summary:
        table.add_row("gates", "\n".join(read_gates(summary["gates"]).in_words()).removeprefix("gates: "))
    table.add_row("seconds", ", ".join(f"{name} {value:.1f}" for name, value in summary["seconds"].items()))
    return table


def files_table(summary: dict[str, Any]) -> RichTable:
    """Every file the run left, with its purpose."""
    table = RichTable(title=f"left in {summary['out']}", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, purpose in summary["files"].items():
        table.add_row(name, purpose)
    return table


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"
