"""The `shoal` command: its verbs, its way with errors, and the verbs that start and plan runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from launch import __version__, local
from launch.cache import Cache
from launch.cli_arguments import AsJson, CommandWithKeys, DebugCpu, Out, Overrides, Profile, Rdzv, RunFile
from launch.cli_cluster import cancel_command, logs_command, status_command, submit_command
from launch.cli_doctor import doctor_command
from launch.cli_plan import decide_as_asked, explain_command, plan_command, print_plan
from launch.cli_proofs import chaos_command, parity_command
from launch.cli_recipes import prepare_command, recipes_app, schema_command, tokenize_command
from launch.cli_report import report_command, runs_command
from launch.cli_results import (
    checkpoints_command,
    eval_command,
    export_command,
    generate_command,
    push_command,
    sync_command,
)
from launch.cluster import refuse_candidates
from launch.errors import EXIT_CODES, ConfigError, LaunchError, MemoryExhaustedError, RunFolderError
from launch.fitting import Fits, question, remember, smaller
from launch.nodes import follow, is_here, lead, read_address
from launch.plan import Plan
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
from launch.report.refresh import kept_reported
from launch.supervise import Ending
from launch.topology import cache_folder, stray_variables
from launch.trials import find

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
    profile: Profile = None,
) -> None:
    """Train, evaluate and export; everything is written to the run folder. A run that was interrupted goes on."""
    _carry_out(file, _with_profile(overrides, profile), out, json_, debug_cpu, rdzv)


@app.command("resume", cls=CommandWithKeys)
def resume_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that was interrupted.")],
    overrides: Overrides = None,
    json_: AsJson = False,
    rdzv: Rdzv = None,
    profile: Profile = None,
) -> None:
    """Go on with a run from its newest good checkpoint, with the settings it was begun with.

    Overrides may change what leaves its numbers alone: devices, strategy, micro-batch size, saving, tracking.
    """
    if not is_run_folder(run):
        raise RunFolderError(f"{run}: is not a run folder (no plan.json in it); give one that `shoal run` has made")
    _carry_out(str(run / "run.yaml"), _with_profile(overrides, profile), run, json_, None, rdzv)


def _with_profile(overrides: list[str] | None, updates: int | None) -> list[str]:
    return [*(overrides or []), *([f"track.profile={updates}"] if updates else [])]


def _carry_out(
    file: str, overrides: list[str] | None, out: Path | None, json_: bool, debug_cpu: int | None, rdzv: str | None
) -> None:
    """Begin a run, or go on with the one in the run folder, and see it through to its end."""
    address = read_address(rdzv) if rdzv else None
    if address and debug_cpu:
        raise ConfigError("command line: --rdzv is for several machines, --debug-cpu for this one; leave one out")
    decided, differences = decide_as_asked(file, overrides, out, debug_cpu, several=address is not None)
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
        decided, differences = decide_as_asked(file, overrides, folder, debug_cpu)
        plan = decided.plan
    if not goes_on:
        create_run_folder(plan)
    with kept_reported(folder), held(folder):
        if goes_on:
            for line in continue_run_folder(plan):
                print(f"changed since the last start: {line}", file=sys.stderr)
        stray = stray_variables()
        if stray:
            complain(f"not passed on from the environment, because the run file decides it: {', '.join(stray)}")
        for line in differences:
            print(line, file=sys.stderr)
        if not json_:
            print_plan(plan, console_on(stderr=True))
        ending = lead(plan, folder, address) if address else local.run(plan, folder, quiet=json_)
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


app.command("plan", cls=CommandWithKeys)(plan_command)
app.command("explain", cls=CommandWithKeys)(explain_command)
app.command("doctor")(doctor_command)
app.command("submit", cls=CommandWithKeys)(submit_command)
app.command("status")(status_command)
app.command("runs")(runs_command)
app.command("report")(report_command)
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
app.command("push")(push_command)
app.command("sync")(sync_command)
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
