"""The `shoal` command: its verbs, its way with errors, and the verbs that start and plan runs."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch import __version__, local
from launch.cache import Cache
from launch.cli_arguments import AsJson, CommandWithKeys, DebugCpu, Out, Overrides, Rdzv, RunFile
from launch.cli_cluster import cancel_command, logs_command, status_command, submit_command
from launch.cli_proofs import chaos_command, parity_command
from launch.cli_recipes import look_at_data, prepare_command, recipes_app, schema_command, tokenize_command
from launch.cli_results import checkpoints_command, eval_command, export_command, generate_command
from launch.cluster import refuse_candidates
from launch.config import Loaded, load
from launch.errors import EXIT_CODES, ConfigError, LaunchError, MemoryExhaustedError, RunFolderError
from launch.explain import explain
from launch.fitting import Fits, question, remember, smaller
from launch.keys import describe
from launch.nodes import follow, is_here, lead, read_address, world_of
from launch.plan import Decided, Plan, as_json, decide
from launch.printing import complain, console_on
from launch.record import (
    changed_settings,
    continue_run_folder,
    create_run_folder,
    held,
    is_finished,
    is_run_folder,
    read_json,
    refuse_results,
)
from launch.registry import Recipe, find_run_file
from launch.sections import RunConfig
from launch.supervise import Ending
from launch.topology import World, cache_folder, read_machine, stray_variables
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


@app.command("run", cls=CommandWithKeys)
def run_command(
    file: RunFile,
    overrides: Overrides = None,
    out: Out = None,
    json_: AsJson = False,
    debug_cpu: DebugCpu = None,
    rdzv: Rdzv = None,
) -> None:
    """Train, evaluate and export; everything is written to the run folder. A run that was interrupted goes on."""
    _carry_out(file, overrides, out, json_, debug_cpu, rdzv)


@app.command("resume", cls=CommandWithKeys)
def resume_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that was interrupted.")],
    overrides: Overrides = None,
    json_: AsJson = False,
    rdzv: Rdzv = None,
) -> None:
    """Go on with a run from its newest good checkpoint, with the settings it was begun with.

    Overrides may change what leaves its numbers alone: devices, strategy, micro-batch size, saving, tracking.
    """
    if not is_run_folder(run):
        raise RunFolderError(f"{run}: is not a run folder (no plan.json in it); give one that `shoal run` has made")
    _carry_out(str(run / "run.yaml"), overrides, run, json_, None, rdzv)


def _carry_out(
    file: str, overrides: list[str] | None, out: Path | None, json_: bool, debug_cpu: int | None, rdzv: str | None
) -> None:
    """Begin a run, or go on with the one in the run folder, and see it through to its end."""
    address = read_address(rdzv) if rdzv else None
    if address and debug_cpu:
        raise ConfigError("command line: --rdzv is for several machines, --debug-cpu for this one; leave one out")
    decided, differences = _decide(file, overrides, out, debug_cpu, several=address is not None)
    plan = decided.plan
    if address and not is_here(address):
        ending = follow(plan, address)
        _tell(ending)
        raise typer.Exit(ending.exit_code)
    folder, cache = Path(plan.run_folder), Cache(cache_folder())
    goes_on = is_run_folder(folder)
    if not goes_on:
        refuse_results(folder)
    elif is_finished(folder):
        changed_settings(plan)  # lest another run be taken for this one
        complain(f"{folder}: this run is finished already")
        return _print_result(folder, json_)
    if plan.batch.candidates and address:
        refuse_candidates(plan)
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
            _print_plan(plan, console_on(stderr=True))
        ending = lead(plan, folder, address) if address else local.run(plan, folder)
    _tell(ending)
    if ending.exit_code == MemoryExhaustedError.exit_code:
        _learn_from_too_large(plan, cache)
    if ending.exit_code:
        raise typer.Exit(ending.exit_code)
    return _print_result(folder, json_)


def _tell(ending: Ending) -> None:
    """Say how workers have ended, unless they ended well."""
    if ending.traceback:
        print(ending.traceback, file=sys.stderr)
    if ending.exit_code:
        complain(ending.message)


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
    file: str, overrides: list[str] | None, out: Path | None, debug_cpu: int | None, *, several: bool = False
) -> tuple[Decided, list[str]]:
    """The run that was asked for, on this machine or on `several`; or its twin on the CPU, and what to tell of that."""
    if several:
        config, machine = load(find_run_file(file), overrides or []).config, read_machine()
        return decide(file, overrides or [], out, world_of(config, machine), machine), []
    if debug_cpu is None:
        return decide(file, overrides or [], out, World()), []
    twin = decide_twin(file, overrides or [], out, debug_cpu)
    return twin.decided, twin.lines


@app.command("plan", cls=CommandWithKeys)
def plan_command(
    file: RunFile,
    overrides: Overrides = None,
    out: Out = None,
    json_: AsJson = False,
    debug_cpu: DebugCpu = None,
    data: Annotated[bool, typer.Option("--data", help="Prepare the data too, and show what they look like.")] = False,
) -> None:
    """Show what a run would do: arithmetic, schedule, command, configuration. Starts nothing."""
    decided, differences = _decide(file, overrides, out, debug_cpu)
    shown = ""
    if data:
        shown = look_at_data(file, overrides or [], as_json=json_)
        decided, differences = _decide(file, overrides, out, debug_cpu)  # now with the number of samples
    plan = decided.plan
    for line in differences:
        print(line, file=sys.stderr if json_ else sys.stdout)
    if json_:
        print(json.dumps({**as_json(plan), **({"data": json.loads(shown)} if data else {})}, indent=2))
        return
    console = console_on()
    _print_plan(plan, console)
    _print_command(plan)
    _print_config(decided.loaded, decided.recipe, console)
    if data:
        print(f"\n{shown}", end="")


app.command("submit", cls=CommandWithKeys)(submit_command)
app.command("status")(status_command)
app.command("logs")(logs_command)
app.command("cancel")(cancel_command)
app.command("prepare", cls=CommandWithKeys)(prepare_command)
app.command("tokenize")(tokenize_command)
app.command("parity")(parity_command)
app.command("chaos")(chaos_command)
app.command("checkpoints")(checkpoints_command)
app.command("export")(export_command)
app.command("eval", cls=CommandWithKeys)(eval_command)
app.command("generate")(generate_command)
app.add_typer(recipes_app, name="recipes")
app.command("config-schema")(schema_command)


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


def _print_plan(plan: Plan, console: Console) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(style="dim", overflow="fold")
    for line in explain(plan):
        table.add_row(line.name, Text(line.value), Text(line.because))
    console.print(table)


def _print_command(plan: Plan) -> None:
    size = plan.processes.world_size
    each = f"each of the {size} workers is" if size > 1 else "the worker is"
    print(f"\n{each.capitalize()} started with")
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
        if value is None:  # a section that is switched off
            break
        value = value[part]
    return json.dumps(value, ensure_ascii=False)
