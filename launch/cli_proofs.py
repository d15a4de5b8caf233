"""The verbs that show that numbers are the same: `shoal parity` and `shoal chaos`."""

from __future__ import annotations

import json
import secrets
import sys
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from launch.chaos import INTERRUPTED as INTERRUPTED_RUN
from launch.chaos import UNDISTURBED, Interruption, Strike, draw, pace_of, run_interrupted, run_undisturbed, settings
from launch.chaos_report import TITLES as CHAOS_TITLES
from launch.chaos_report import rows as chaos_rows
from launch.chaos_report import verdict
from launch.chaos_report import write_report as write_report_of_chaos
from launch.cli_arguments import AsJson, Out, Overrides, RunFile
from launch.config import load
from launch.errors import ConfigError, ParityError, StoppedError
from launch.parity import Outcome, cases, compare
from launch.parity_report import write_report
from launch.plan import default_run_folder
from launch.printing import console_on, print_table
from launch.record import refuse_results
from launch.registry import find_run_file, load_recipe
from launch.sameness import Compared
from launch.sameness import compare as compare_runs
from launch.stop import StopRequest, StopSignal, exit_code, spoken
from launch.strategy import Strategy
from launch.words import roughly


def parity_command(
    file: RunFile,
    overrides: Overrides = None,
    strategies: Annotated[
        str, typer.Option(metavar="A,B,…", help="Strategies to compare with one process.")
    ] = "ddp,fsdp2,zero1,zero2,zero3",
    worlds: Annotated[str, typer.Option(metavar="N,M,…", help="Numbers of processes.")] = "1,2",
    out: Out = None,
    json_: AsJson = False,
) -> None:
    """Run FILE over strategies and numbers of processes on this machine, and show that the numbers are the same.

    Twelve updates unless train.max_steps or train.epochs is stated here. The run folder gets the numbers,
    parity.json, and a plot of them, parity.png.
    """
    selected = cases(_strategies(strategies), _world_sizes(worlds))
    if len(selected) < 2:
        raise ConfigError(
            f"command line: --strategies {strategies} --worlds {worlds}: is one run, with none to compare; "
            "use --worlds 1,2"
        )
    folder = (out or default_run_folder("parity")).absolute()
    stated = overrides or []
    if not any(item.startswith(("train.max_steps=", "train.epochs=")) for item in stated):
        stated = [*stated, "train.max_steps=12"]
    loaded = load(find_run_file(file), stated)  # a mistake in it is told once, and before anything starts
    config = loaded.with_recipe_args(load_recipe(loaded).args.model_dump(mode="json")).config
    refuse_results(folder)
    outcomes: list[Outcome] = []
    stopped: StoppedError | None = None
    try:
        for outcome in compare(file, stated, selected, folder, lambda text: print(text, file=sys.stderr)):
            outcomes.append(outcome)  # one by one: what was done before Ctrl-C is kept
    except StoppedError as error:
        stopped = error
    report = write_report(folder, config, outcomes, complete=not stopped)
    if json_:
        print(json.dumps(report, indent=2))
    else:
        _print_parity(outcomes, report)
    if stopped:
        raise stopped
    different = [
        f"{each.strategy} on {each.world_size}" for each in outcomes if each.verdict in ("DIFFERENT", "failed")
    ]
    if different:
        raise ParityError(f"not the same numbers: {', '.join(different)}; runs: {folder}")


def chaos_command(
    file: RunFile,
    overrides: Overrides = None,
    kills: Annotated[int, typer.Option(min=1, metavar="K", help="How often to interrupt the run.")] = 3,
    seed: Annotated[int | None, typer.Option(help="Of kinds and moments; without it others each time.")] = None,
    out: Out = None,
    json_: AsJson = False,
) -> None:
    """Run FILE twice, undisturbed and interrupted by signals and kills, and show that the numbers are the same.

    Forty updates unless train.max_steps or train.epochs is stated here. The run folder gets chaos.json.
    """
    folder = (out or default_run_folder("chaos")).absolute()
    seed = secrets.randbelow(10**6) if seed is None else seed
    stated, config, told = settings(file, overrides or [], folder)
    refuse_results(folder)
    for line in told:
        print(line, file=sys.stderr)
    StopRequest().install()
    happened: list[Interruption] = []
    strikes: list[Strike] = []
    compared: Compared | None = None
    try:
        print("undisturbed run", file=sys.stderr)
        took = run_undisturbed([file, *stated], folder)
        updates, pace = pace_of(folder)
        strikes = draw(kills, updates, seed)
        print(f"{roughly(took)}; now with {kills} interruptions (--seed {seed})", file=sys.stderr)
        said = lambda text: print(text, file=sys.stderr)  # noqa: E731
        for each in run_interrupted([file, *stated], folder, strikes, pace, took, said):
            happened.append(each)
        compared = compare_runs(folder / UNDISTURBED, folder / INTERRUPTED_RUN)
    except StopSignal as signal:
        raise StoppedError(f"stopped by {spoken(signal.number)}; runs: {folder}", exit_code(signal.number)) from None
    finally:
        report = write_report_of_chaos(folder, config, seed, strikes, happened, compared)
    if json_:
        print(json.dumps(report, indent=2))
    else:
        print_table(CHAOS_TITLES, chaos_rows(happened))
        print("\n".join(verdict(compared, kills, len(happened))))
        print(f"data: {report['data']}\nruns: {folder}")
    if not compared.same:
        raise ParityError(f"not the same numbers: {compared.differences[0]}; runs: {folder}")
    if not happened:
        raise ConfigError(f"the run was over before any interruption; make it longer: train.max_steps={10 * updates}")


def _listed(text: str) -> list[str]:
    """The parts of a list with commas, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


def _strategies(text: str) -> list[Strategy]:
    known = [str(strategy) for strategy in Strategy if strategy is not Strategy.SINGLE]
    for name in _listed(text):
        if name not in known:
            raise ConfigError(f"command line: --strategies {name}: no such strategy; there are {', '.join(known)}")
    return [Strategy(name) for name in _listed(text)]


def _world_sizes(text: str) -> list[int]:
    if not all(part.isdecimal() and int(part) for part in _listed(text)):
        raise ConfigError(f"command line: --worlds {text}: must be numbers of processes, such as 1,2,3")
    return list(dict.fromkeys(int(part) for part in _listed(text)))


def _print_parity(outcomes: list[Outcome], report: dict[str, Any]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("strategy", "processes", "loss", "weights", "learning rate", "metrics", "samples", "verdict"):
        table.add_column(title, overflow="fold")
    for outcome in outcomes:
        table.add_row(*_parity_row(outcome))
    console_on().print(table)
    for each in outcomes:
        if each.problem:
            print(f"{each.strategy} on {each.world_size}: {each.problem}")
    print("Differences are the largest against the first row, which is the reference.")
    if not report["config"]["save"]["export"]:
        print("Weights were not compared, because save.export = false.")
    if report["plot"]:
        print(f"plot: {report['plot']}")
    print(f"data: {report['data']}")
    print(f"runs: {report['folder']}")


def _parity_row(outcome: Outcome) -> list[str]:
    head = [str(outcome.strategy), str(outcome.world_size)]
    if outcome.verdict in ("failed", "reference"):
        return [*head, "", "", "", "", "", outcome.verdict]
    loss, weight = ("" if value is None else f"{value:.1e}" for value in (outcome.loss, outcome.weight))
    same = ["equal" if yes else "DIFFERENT" for yes in (outcome.same_rates, outcome.same_metrics, outcome.same_samples)]
    return [*head, loss, weight if outcome.same_tensors else "other tensors", *same, outcome.verdict]
