"""The verbs that show what a run would do, and why: `shoal plan` and `shoal explain`."""

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

from launch.cli_arguments import AsJson, DebugCpu, Out, Overrides, RunFile
from launch.cli_recipes import look_at_data
from launch.config import Loaded, load
from launch.devices import Devices, read_devices
from launch.errors import ConfigError
from launch.explain import consequences, explain
from launch.keys import Key, describe
from launch.nearest import listed, nearest_keys
from launch.needs import needs_table
from launch.nodes import world_of
from launch.plan import Decided, Plan, as_json, decide
from launch.printing import console_on
from launch.registry import Recipe, find_run_file
from launch.sections import RunConfig
from launch.topology import Machine, World, read_machine, torch_has_cuda, world_to_be
from launch.twin import decide_twin


def plan_command(
    file: RunFile,
    overrides: Overrides = None,
    out: Out = None,
    json_: AsJson = False,
    debug_cpu: DebugCpu = None,
    data: Annotated[bool, typer.Option("--data", help="Prepare the data too, and show what they look like.")] = False,
    on: Annotated[
        str | None,
        typer.Option("--on", metavar="NxKIND", help="Plan for other devices, such as 8xH100-80GB or 2xcpu-16GB."),
    ] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, help="parallel.nodes: so many such machines.")] = None,
) -> None:
    """Show what a run would do: arithmetic, memory, schedule, command, configuration. Starts nothing."""
    overrides = [*(overrides or []), *([f"parallel.nodes={nodes}"] if nodes else [])]
    differences: list[str] = []
    several = nodes is not None and nodes > 1
    if on and data:
        raise ConfigError("command line: --data prepares here, and --on plans for elsewhere; leave one out")
    if on:
        decided = _decide_elsewhere(file, overrides, out, on, debug_cpu)
    else:
        decided, differences = decide_as_asked(file, overrides, out, debug_cpu, several=several)
    shown = ""
    if data:
        shown = look_at_data(file, overrides, as_json=json_)
        decided, differences = decide_as_asked(file, overrides, out, debug_cpu, several=several)  # with their number
    plan = decided.plan
    for line in differences:
        print(line, file=sys.stderr if json_ else sys.stdout)
    if json_:
        print(json.dumps({**as_json(plan), **({"data": json.loads(shown)} if data else {})}, indent=2))
        return
    console = console_on()
    print_plan(plan, console)
    _print_needs(plan, console)
    _print_command(plan)
    _print_config(decided.loaded, decided.recipe, console)
    if data:
        print(f"\n{shown}", end="")


def explain_command(
    file: RunFile,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY | key=value …]", help="Keys or sections to explain, and overrides."),
    ] = None,
    json_: AsJson = False,
) -> None:
    """Show each key with its value, where that comes from, what it means, and what follows from it."""
    overrides = [each for each in arguments or [] if "=" in each]
    wanted = [each for each in arguments or [] if "=" not in each]
    decided = decide(file, overrides, None, World())
    keys = _keys(decided.recipe)
    chosen = [key for key in keys if not wanted or any(_covers(each, key.name) for each in wanted)]
    for each in wanted:
        if not any(_covers(each, key.name) for key in keys):
            there = [key.name for key in keys]
            section = each.rpartition(".")[0]
            near = nearest_keys(each, [name for name in there if name.rpartition(".")[0] == section], there)
            hint = f"; did you mean {listed(near)}?" if near else ""
            raise ConfigError(f"command line: {each}: no such key{hint}")
    facts = [_fact(decided, key) for key in chosen]
    if json_:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    for fact in facts:
        _print_fact(fact)


def _covers(wanted: str, key: str) -> bool:
    return key == wanted or key.startswith(f"{wanted}.")


def _keys(recipe: Recipe) -> list[Key]:
    """All keys of a run file of this recipe."""
    found: list[Key] = []
    for key in describe(RunConfig):
        found += describe(type(recipe.args), "recipe_args.") if key.name == "recipe_args" else [key]
    return found


def _fact(decided: Decided, key: Key) -> dict[str, Any]:
    lines = consequences(decided.plan, key.name)
    return {
        "key": key.name,
        "value": json.loads(_value(decided.loaded.config, key.name)),
        "from": decided.loaded.origin(key.name),
        "kind": key.kind,
        "default": key.default,
        "meaning": key.description,
        "follows": [f"{line.name}: {line.value}" + (f" ({line.because})" if line.because else "") for line in lines],
    }


def _print_fact(fact: dict[str, Any]) -> None:
    print(f"{fact['key']} = {json.dumps(fact['value'], ensure_ascii=False)}")
    print(f"    from     {fact['from']}")
    print(f"    kind     {fact['kind']}; default {fact['default']}")
    print(f"    meaning  {fact['meaning']}")
    for line in fact["follows"]:
        print(f"    so       {line}")


def decide_as_asked(
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


def print_plan(plan: Plan, console: Console) -> None:
    """Print the arithmetic of a plan."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_column(style="dim", overflow="fold")
    for line in explain(plan):
        table.add_row(line.name, Text(line.value), Text(line.because))
    console.print(table)


def _decide_elsewhere(file: str, overrides: list[str], out: Path | None, on: str, debug_cpu: int | None) -> Decided:
    """The run on devices that are not here.

    Raises:
        ConfigError: it is not said which, or --debug-cpu asks for others.
    """
    if debug_cpu is not None:
        raise ConfigError("command line: --on and --debug-cpu both say where the run is to be; leave one out")
    there = read_devices(on)
    device = "cpu" if there.on_cpu else "xla" if there.on_xla else "cuda"
    changes = [*overrides, f"parallel.device={device}", f"parallel.devices={there.number}"]
    nodes = load(find_run_file(file), changes).config.parallel.nodes
    world = World() if there.on_xla else world_to_be(nodes, there.number)
    return decide(file, changes, out, world, _machine_of(there))


def _machine_of(there: Devices) -> Machine:
    name, memory = there.kind.name, there.kind.memory_bytes
    if there.on_cpu:
        return Machine(
            name, cores=there.number, gpus=0, memory_bytes=memory * there.number, torch_has_cuda=torch_has_cuda()
        )
    if there.on_xla:
        return Machine(name, cores=0, gpus=0, tpus=there.number, tpu_name=name)
    return Machine(name, cores=0, gpus=there.number, gpu_name=name, gpu_memory_bytes=memory)


def _print_needs(plan: Plan, console: Console) -> None:
    if plan.memory is None:
        why = "its architecture is none that shoal knows, or its config.json cannot be seen from here"
        console.print(f"\nNothing is known of the memory that the model needs: {why}.")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("strategy", "memory", "checkpointed", "fits", "of that, at the moment that needs most"):
        table.add_column(title, overflow="fold")
    for row in needs_table(plan):
        mark = "bold" if row[0] == plan.processes.strategy else ""
        table.add_row(*(Text(cell, style=mark) for cell in row))
    console.print("\nMemory of a process with each strategy, the plainest first")
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
    for key in _keys(recipe):
        table.add_row(key.name, Text(_value(loaded.config, key.name)), Text(_origin(loaded, key.name), style="dim"))
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
