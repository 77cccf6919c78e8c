"""Benchmarks: `python -m tests.bench COMMAND` (or `make bench BENCH="COMMAND ..."`). They measure, they assert nothing.

quality     federated, pooled, single-site and unconstrained models on real tables, over seeds
simulate    wall-clock, peak memory and where the time goes in one `cohortium simulate`
training    milliseconds a training step, and what the spectral projection costs
anchor      quality against ε: noised statistics once, and a generator made of them
channel     quality against ε: rows of the stochastic channel beside rows of the latent prior
generation  synthetic rows a second on one core, and memory for many rows
evaluation  seconds that every part of an evaluation takes
federated-evaluation  seconds of a site's answer to an evaluation, and widths of intervals against ε
deployment  a real consortium of many sites on this machine: seconds a round, processor time, memory, requests
accounting  seconds that accountant and ledger take in a study of 18 sites and 60 rounds
frontier    leakage (canaries, membership) against utility, over the settings that a study chooses
picture     the README's picture of columns, from a finished `cohortium demo`
report-picture  the README's picture of the report, from a finished run; needs Chromium
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    quality = commands.add_parser("quality", help="TSTR, KS, TV of every kind of run")
    simulate = commands.add_parser("simulate", help="time and memory of a simulation")
    training = commands.add_parser("training", help="time of a training step")
    anchor = commands.add_parser("anchor", help="quality against epsilon of noised statistics")
    channel = commands.add_parser("channel", help="quality against epsilon")
    generation = commands.add_parser("generation", help="rows a second")
    evaluation = commands.add_parser("evaluation", help="time of an evaluation, by part")
    federated = commands.add_parser("federated-evaluation", help="time and intervals of an evaluation by the sites")
    accounting = commands.add_parser("accounting", help="what accountant and ledger cost")
    accounting.add_argument("run", type=Path, nargs="?", help="finished `simulate` of 18 sites, for its wall-clock")
    accounting.add_argument("--wall-clock", type=float, help="seconds to compare with, instead of a run's")
    deployment = commands.add_parser("deployment", help="what a round between many sites costs")
    deployment.add_argument("folder", type=Path, help="new folder, or one of an earlier run with as many sites")
    deployment.add_argument("--sites", type=int, default=30)
    deployment.add_argument("--rounds", type=int, default=5)
    deployment.add_argument("--idle", type=float, default=0.0, help="seconds to look at the idle consortium as well")
    frontier = commands.add_parser("frontier", help="leakage against utility")
    picture = commands.add_parser("picture", help="the README's picture")
    picture.add_argument("demo", type=Path, help="the demo's output directory")
    picture.add_argument("png", type=Path, help="where to write the picture")
    report = commands.add_parser("report-picture", help="the README's picture of the report")
    report.add_argument("run", type=Path, help="the folder of a finished run")
    report.add_argument("png", type=Path, help="where to write the picture")
    for command in (quality, simulate, training, anchor, channel, generation, frontier, evaluation, federated):
        command.add_argument("data", type=Path, help="folder with schema.json, sites/*.csv and test.csv")
        command.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    quality.add_argument("--seeds", type=int, default=3)
    quality.add_argument("--rows", type=int, default=20_000, help="synthetic rows of every run")
    quality.add_argument("--runs", nargs="+", default=["federated", "pooled", "single", "unconstrained"])
    quality.add_argument("--out", type=Path, help="write every single result as JSON lines to this file")
    anchor.add_argument("--seeds", type=int, default=5)
    anchor.add_argument("--rows", type=int, default=20_000, help="synthetic rows of every generator")
    anchor.add_argument("--epsilon", type=float, nargs="+", default=[0.5, 1.0, 3.0, 10.0])
    anchor.add_argument("--noise", nargs="+", choices=["sites", "pooled"], default=["sites", "pooled"])
    anchor.add_argument("--generators", nargs="+", choices=["copula", "decoder", "nearest"], default=["nearest"])
    channel.add_argument("--seeds", type=int, default=3)
    channel.add_argument("--rows", type=int, default=20_000, help="synthetic rows of every release")
    channel.add_argument("--epsilon", type=float, nargs="+", default=[0.3, 1.0, 3.0, 10.0, 100.0])
    channel.add_argument("--radius", type=float, nargs="+", default=[1.0, 3.0])
    frontier.add_argument("--seeds", type=int, default=3)
    frontier.add_argument("--canaries", type=int, default=200)
    frontier.add_argument("--patients", type=int, help="about so many patients of all sites, drawn at random")
    frontier.add_argument("--points", nargs="+", help="some of the points; default: all")
    frontier.add_argument("--out", type=Path, default=Path("frontier.jsonl"), help="one line a result; goes on from it")
    frontier.add_argument("--figure", type=Path, help="write leakage against utility as a picture")
    generation.add_argument("--rows", type=int, default=200_000)
    evaluation.add_argument("--rows", type=int, default=10_000, help="synthetic rows, and real ones")
    evaluation.add_argument("--cohort", type=Path, help="a cohort; default: noisy copies of test rows")
    evaluation.add_argument("--groups", nargs="*", default=[], help="columns by whose groups everything is scored")
    federated.add_argument("--cohort", type=Path, required=True, help="a cohort")
    federated.add_argument("--epsilon", type=float, nargs="+", default=[1.0, 3.0, 10.0])
    federated.add_argument("--holdout", type=float, default=0.2)
    federated.add_argument("--seeds", type=int, default=10, help="draws of the noise")
    arguments = parser.parse_args()

    # Imported per command, so that one benchmark's libraries do not weigh on another's memory.
    if arguments.command == "quality":
        from tests.bench.quality import run
    elif arguments.command == "simulate":
        from tests.bench.simulate import run
    elif arguments.command == "training":
        from tests.bench.training import run
    elif arguments.command == "anchor":
        from tests.bench.anchor import run
    elif arguments.command == "channel":
        from tests.bench.channel import run
    elif arguments.command == "generation":
        from tests.bench.generation import run
    elif arguments.command == "evaluation":
        from tests.bench.evaluation import run
    elif arguments.command == "federated-evaluation":
        from tests.bench.federated_evaluation import run
    elif arguments.command == "deployment":
        from tests.bench.deployment import run
    elif arguments.command == "frontier":
        from tests.bench.frontier import run
    elif arguments.command == "accounting":
        from tests.bench.accounting import run
    elif arguments.command == "report-picture":
        from tests.bench.picture import photograph as run
    else:
        from tests.bench.picture import run
    run(arguments)


if __name__ == "__main__":
    main()
