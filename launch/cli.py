"""The `shoal` command: reads arguments, prints, and turns every error into one line and an exit code."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from launch import __version__, local
from launch.cache import Cache
from launch.chaos import INTERRUPTED as INTERRUPTED_RUN
from launch.chaos import UNDISTURBED, Interruption, Strike, draw, pace_of, run_interrupted, run_undisturbed, settings
from launch.chaos_report import TITLES as CHAOS_TITLES
from launch.chaos_report import rows as chaos_rows
from launch.chaos_report import verdict
from launch.chaos_report import write_report as write_report_of_chaos
from launch.checkpoint_export import export
from launch.config import Key, Loaded, RunConfig, describe, load
from launch.disk import size_in_words
from launch.errors import (
    EXIT_CODES,
    ConfigError,
    LaunchError,
    MemoryExhaustedError,
    ParityError,
    RunFolderError,
    StoppedError,
)
from launch.explain import explain
from launch.fitting import Fits, question, remember, smaller
from launch.inventory import TITLES, Entry, discard, inventory, newest, rows, superfluous
from launch.inventory import as_json as inventory_as_json
from launch.parity import Outcome, cases, compare, duration
from launch.parity_report import write_report
from launch.plan import Decided, Plan, as_json, decide, default_run_folder, python_environment
from launch.record import (
    changed_settings,
    continue_run_folder,
    create_run_folder,
    held,
    is_finished,
    is_run_folder,
    model_folder,
    read_json,
    read_plan,
    refuse_results,
)
from launch.registry import Recipe, find_run_file, load_module, load_recipe, shipped_recipes
from launch.sameness import Compared
from launch.sameness import compare as compare_runs
from launch.stop import StopRequest, StopSignal, exit_code, spoken
from launch.strategy import Strategy
from launch.topology import World, cache_folder, stray_variables, worker_environment
from launch.trials import find
from launch.twin import decide_twin

app = typer.Typer(
    name="shoal",
    help="Train and evaluate Hugging Face models from one recipe, with the same numbers on any devices.",
    epilog="Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + ".",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line; a `LaunchError` becomes its message and its exit code."""
    try:
        app()
    except LaunchError as error:
        complain(str(error))
        sys.exit(error.exit_code)


def complain(message: str) -> None:
    """Print an error on stderr, each line with our name in front."""
    for line in message.splitlines():
        print(f"shoal: {line}", file=sys.stderr)


class _CommandWithKeys(TyperCommand):
    """A command whose `--help` ends with every key of a run file."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        formatter.write("\nKeys of a run file, set on the command line as section.key=value:\n\n")
        for key in describe(RunConfig):
            formatter.write(_documented(key, formatter.width))


def _documented(key: Key, width: int) -> str:
    head = f"  {key.name}  ({key.kind}; default {key.default})\n".replace("; default required", "; required")
    return head + textwrap.fill(key.description, width, initial_indent=" " * 6, subsequent_indent=" " * 6) + "\n"


RunFile = Annotated[str, typer.Argument(metavar="FILE", help="A run file, or the name of a shipped one.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value …]", help="Overrides, such as train.max_steps=20.")
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="RUN_FOLDER", help="Where to keep the run [runs/<recipe>-<time>]."),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON on stdout and nothing else.")]


DebugCpu = Annotated[
    int | None,
    typer.Option("--debug-cpu", min=1, metavar="N", help="Do it with N processes on this machine's CPU (gloo)."),
]


@app.command("run", cls=_CommandWithKeys)
def run_command(
    file: RunFile,
    overrides: Overrides = None,
    out: Out = None,
    json_: AsJson = False,
    debug_cpu: DebugCpu = None,
) -> None:
    """Train, evaluate and export; everything is written to the run folder. A run that was interrupted goes on."""
    _carry_out(file, overrides, out, json_, debug_cpu)


@app.command("resume", cls=_CommandWithKeys)
def resume_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that was interrupted.")],
    overrides: Overrides = None,
    json_: AsJson = False,
) -> None:
    """Go on with a run from its newest good checkpoint, with the settings it was begun with.

    Overrides may change what leaves its numbers alone: devices, strategy, micro-batch size, saving, tracking.
    """
    if not is_run_folder(run):
        raise RunFolderError(f"{run}: is not a run folder (no plan.json in it); give one that `shoal run` has made")
    _carry_out(str(run / "run.yaml"), overrides, run, json_, None)


def _carry_out(file: str, overrides: list[str] | None, out: Path | None, json_: bool, debug_cpu: int | None) -> None:
    """Begin a run, or go on with the one in the run folder, and see it through to its end."""
    decided, differences = _decide(file, overrides, out, debug_cpu)
    plan = decided.plan
    folder, cache = Path(plan.run_folder), Cache(cache_folder())
    goes_on = is_run_folder(folder)
    if not goes_on:
        refuse_results(folder)
    elif is_finished(folder):
        changed_settings(plan)  # lest another run be taken for this one
        complain(f"{folder}: this run is finished already")
        return _print_result(folder, json_)
    if plan.batch.candidates:
        remember(cache, question(plan), find(plan, complain))
        decided, differences = _decide(file, overrides, folder, debug_cpu)
        plan = decided.plan
    if not goes_on:
        create_run_folder(plan)
    with held(folder):
        if goes_on:
            for line in continue_run_folder(plan):
                print(f"changed since the last start: {line}", file=sys.stderr)
        stray = stray_variables()
        if stray:
            complain(f"not passed on from the environment, because the run file decides it: {', '.join(stray)}")
        for line in differences:
            print(line, file=sys.stderr)
        if not json_:
            _print_plan(plan, _console(stderr=True))
        ending = local.run(plan, folder)
    if ending.exit_code:
        if ending.traceback:
            print(ending.traceback, file=sys.stderr)
        complain(ending.message)
        if ending.exit_code == MemoryExhaustedError.exit_code:
            _learn_from_too_large(plan, cache)
        raise typer.Exit(ending.exit_code)
    return _print_result(folder, json_)


def _print_result(folder: Path, json_: bool) -> None:
    result = read_json(folder / "result.json")
    print(json.dumps(result) if json_ else result["summary"])


def _learn_from_too_large(plan: Plan, cache: Cache) -> None:
    """Remember a smaller micro-batch size where one was found by trials and turned out too large after all."""
    size = smaller(plan)
    if size and plan.config.train.micro_batch_size == "auto":
        remember(cache, question(plan), Fits(size, plan.batch.micro_batch_size))
        complain(f"remembered: with train.micro_batch_size=auto the next run takes {size}")


def _decide(
    file: str, overrides: list[str] | None, out: Path | None, debug_cpu: int | None
) -> tuple[Decided, list[str]]:
    """The run that was asked for; or its twin on the CPU, and what to tell of that."""
    if debug_cpu is None:
        return decide(file, overrides or [], out, World()), []
    twin = decide_twin(file, overrides or [], out, debug_cpu)
    return twin.decided, twin.lines


@app.command("plan", cls=_CommandWithKeys)
def plan_command(
    file: RunFile,
    overrides: Overrides = None,
    out: Out = None,
    json_: AsJson = False,
    debug_cpu: DebugCpu = None,
) -> None:
    """Show what a run would do: arithmetic, schedule, command, configuration. Starts nothing."""
    decided, differences = _decide(file, overrides, out, debug_cpu)
    plan = decided.plan
    for line in differences:
        print(line, file=sys.stderr if json_ else sys.stdout)
    if json_:
        print(json.dumps(as_json(plan), indent=2))
        return
    console = _console()
    _print_plan(plan, console)
    _print_command(plan)
    _print_config(decided.loaded, decided.recipe, console)


@app.command("prepare", cls=_CommandWithKeys)
def prepare_command(file: RunFile, overrides: Overrides = None, json_: AsJson = False) -> None:
    """Tokenise the data of a run into the cache, on any machine: no devices, no processes, no run folder."""
    command = [sys.executable, "-m", "launch.prepare", *(["--json"] if json_ else []), "--", file, *(overrides or [])]
    environment = worker_environment({**python_environment(), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"})
    # This process becomes the one with torch, so that a signal reaches it and its exit code is the command's.
    os.execve(sys.executable, command, environment)


@app.command("parity")
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


@app.command("chaos")
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
        print(f"{duration(took)}; now with {kills} interruptions (--seed {seed})", file=sys.stderr)
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
        _print_table(CHAOS_TITLES, chaos_rows(happened))
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
    _console().print(table)
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


@app.command("checkpoints")
def checkpoints_command(
    run: RunFolder,
    json_: AsJson = False,
    verify: Annotated[bool, typer.Option(help="Hash every file, or look at marks and sizes only.")] = True,
    prune: Annotated[bool, typer.Option("--prune", help="Remove what need not be kept, and leftovers.")] = False,
    keep_last: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="With --prune: keep the newest N good ones [the run's save.keep_last]."),
    ] = None,
) -> None:
    """List the checkpoints of a run: which are good, which one `shoal resume` goes on from, which is the best.

    Ends with 5 where there are checkpoints and none is good.
    """
    if keep_last is not None and not prune:
        raise ConfigError(f"command line: --keep-last {keep_last}: says what --prune keeps; add --prune")
    if prune and not verify:
        raise ConfigError("command line: --prune --no-verify: what is kept must be seen to be good; drop --no-verify")
    save = read_plan(run).config.save
    if prune:
        with held(run):
            entries = inventory(run, verify=True)
            removed = discard(superfluous(entries, keep_last or save.keep_last, save.keep_best))
    else:
        entries, removed = inventory(run, verify=verify), []
    left = [entry for entry in entries if entry not in removed]
    if json_:
        print(json.dumps(inventory_as_json(run, left, removed, verified=verify), indent=2))
    else:
        _print_checkpoints(run, left, removed)
    if not newest(left) and any(entry.state == "damaged" for entry in left):
        raise RunFolderError(f"{run}: none of its checkpoints is good; `shoal resume` begins the run anew")


def _print_checkpoints(run: Path, entries: list[Entry], removed: list[Entry]) -> None:
    for entry in removed:
        print(f"removed {entry.name} ({size_in_words(entry.bytes)}, {entry.verdict})")
    if removed:
        print(f"{sum(entry.bytes for entry in removed):,} bytes freed")
    if not entries:
        return print(f"{run}: has no checkpoints (yet)")
    _print_table(TITLES, rows(entries))
    damaged = [entry.update for entry in entries if entry.state == "damaged"]
    if (going_on := newest(entries)) and damaged and damaged[0] > going_on.update:
        print(f"The newest one is damaged: `shoal resume` sets it aside and goes on from {going_on.name}.")
    return None


def _print_table(titles: Iterable[str], lines: list[list[str]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in titles:
        table.add_column(title, overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))
    _console().print(table)


@app.command("export")
def export_command(
    run: RunFolder,
    checkpoint: Annotated[
        str, typer.Option(metavar="NAME", help="Which one: newest, best (lowest validation loss), or its name.")
    ] = "newest",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FOLDER", help="Where to write the model [RUN/export-<checkpoint>].")
    ] = None,
    json_: AsJson = False,
) -> None:
    """Make a plain Hugging Face folder of a checkpoint, and see that it loads as what is stored."""
    read_plan(run)
    done = export(run, checkpoint, out)
    if json_:
        print(json.dumps({**asdict(done), "folder": str(done.folder), "checkpoint": str(done.checkpoint)}))
        return
    tied = "".join(f"; one weight: {', '.join(group)}" for group in done.tied)
    print(f"{done.parameters:,} parameters of {done.checkpoint.name}; {done.tensors} tensors load as stored{tied}")
    print(f"model: {done.folder}")


@app.command("generate")
def generate_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or any Hugging Face model folder.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 60,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
) -> None:
    """Continue a text with the model that a run exported."""
    command = [sys.executable, "-m", "launch.engine.exported", "continue", str(model_folder(run)), prompt]
    command += [str(max_new_tokens), str(temperature), str(seed)]
    # A process of its own: this one stays free of torch.
    raise typer.Exit(subprocess.run(command, env=worker_environment(python_environment()), check=False).returncode)


@app.command("recipes")
def recipes_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show what this recipe lets you set.")] = None,
) -> None:
    """List the shipped recipes, or the arguments of one."""
    if name is None:
        for each in shipped_recipes():
            print(f"{each:<24}{_first_line(load_module(each, 'shipped').__doc__)}")
        return
    for key in describe(load_module(name, "command line").Args, "recipe_args."):
        print(_documented(key, 100), end="")


@app.command("config-schema")
def schema_command() -> None:
    """Print the JSON schema of run files, with which editors complete and check them."""
    print(json.dumps(RunConfig.model_json_schema(), indent=2))


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"shoal {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Train and evaluate Hugging Face models from one recipe, with the same numbers on any devices."""


WIDE = 200
"""Columns of what is not a terminal: a file or a pipe wraps nothing."""


def _console(*, stderr: bool = False) -> Console:
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, highlight=False, width=None if terminal else WIDE)


def _print_plan(plan: Plan, console: Console) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(style="dim", overflow="fold")
    for line in explain(plan):
        table.add_row(line.name, Text(line.value), Text(line.because))
    console.print(table)


def _print_command(plan: Plan) -> None:
    print("\nThe workers are started with")
    for name, value in plan.environment.items():
        print(f"  {name}={shlex.quote(value)} \\")
    print(f"  {shlex.join(plan.command)}\n")


def _print_config(loaded: Loaded, recipe: Recipe, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("key", "value", "from"):
        table.add_column(title, overflow="fold")
    own = [key.name for key in describe(type(recipe.args), "recipe_args.")]
    for key in describe(RunConfig):
        for name in own if key.name == "recipe_args" else [key.name]:
            table.add_row(name, Text(_value(loaded.config, name)), Text(_origin(loaded, name), style="dim"))
    if loaded.run_file:
        print(f"Configuration, from {loaded.run_file}")
    console.print(table)


def _origin(loaded: Loaded, key: str) -> str:
    """Where a value comes from; the run file itself is named above the table."""
    origin = loaded.origin(key)
    return f"line {origin.removeprefix(f'{loaded.run_file}:')}" if origin.startswith(f"{loaded.run_file}:") else origin


def _value(config: RunConfig, dotted: str) -> str:
    value: Any = config.model_dump(mode="json")
    for part in dotted.split("."):
        value = value[part]
    return json.dumps(value, ensure_ascii=False)


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]
