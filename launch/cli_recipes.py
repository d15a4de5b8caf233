"""The verbs about what a recipe holds: `shoal recipes`, `prepare`, `tokenize` and `config-schema`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from launch.cli_arguments import AsJson, Overrides, RunFile, documented
from launch.keys import describe
from launch.plan import python_environment
from launch.printing import first_line
from launch.recipe_copy import copy_recipe
from launch.registry import load_module, run_files, shipped_recipes
from launch.sections import RunConfig
from launch.topology import worker_environment

recipes_app = typer.Typer(help="List the recipes, show what one lets you set, or copy one to make it your own.")

RecipeName = Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe, or the path of your own.")]


@recipes_app.callback(invoke_without_command=True)
def _recipes(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        list_recipes()


@recipes_app.command("list")
def list_recipes(json_: AsJson = False) -> None:
    """List the shipped recipes and their run files."""
    found = [
        {
            "name": name,
            "summary": first_line(load_module(name, "shipped").__doc__),
            "run_files": [path.name for path in run_files(name)],
        }
        for name in shipped_recipes()
    ]
    if json_:
        return print(json.dumps(found, indent=2))
    for each in found:
        print(f"{each['name']:<24}{each['summary']}")
        print(f"{'':<24}{', '.join(each['run_files'])}")
    return None


@recipes_app.command("show")
def show_recipe(name: RecipeName, json_: AsJson = False) -> None:
    """Show what a recipe does and every argument it takes."""
    module = load_module(name, "command line")
    keys, text = describe(module.Args, "recipe_args."), cleandoc(module.__doc__ or "")
    if json_:
        shown = {"name": name, "file": module.__file__, "text": text, "args": [asdict(key) for key in keys]}
        return print(json.dumps(shown, indent=2))
    print(f"{text}\n" if text else "", end="")
    for key in keys:
        print(documented(key, 100), end="")
    return None


@recipes_app.command("copy")
def copy_command(
    name: RecipeName,
    target: Annotated[Path, typer.Argument(metavar="./my_recipe.py", help="The file to make.")],
) -> None:
    """Copy a recipe and its run file, to change them as you like."""
    run_file = copy_recipe(name, target)
    print(f"{target}, with its run file {run_file}; run it: shoal run {run_file}")


def prepare_command(file: RunFile, overrides: Overrides = None, json_: AsJson = False) -> None:
    """Tokenise the data of a run into the cache, on any machine: no devices, no processes, no run folder."""
    _become("launch.prepare", [*(["--json"] if json_ else []), "--", file, *(overrides or [])])


def look_at_data(file: str, overrides: list[str], *, as_json: bool) -> str:
    """What the data of a run look like, in words, with colours where stdout shows them, or as JSON; prepares them."""
    options = ["--look", *(["--json"] if as_json else []), *(["--colour"] if sys.stdout.isatty() else [])]
    command = [sys.executable, "-m", "launch.prepare", *options, "--", file, *overrides]
    done = subprocess.run(command, env=_without_devices(), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:  # it has said why
        raise typer.Exit(done.returncode)
    return done.stdout


def tokenize_command(
    file: RunFile,
    texts: Annotated[
        list[str], typer.Argument(metavar="TEXT [SECOND TEXT] [key=value …]", help="Texts, and overrides of FILE.")
    ],
    batch: Annotated[bool, typer.Option("--batch", help="The texts are samples of a batch, not a pair.")] = False,
    json_: AsJson = False,
) -> None:
    """Show what the tokenizer of a run makes of a text, or of a pair: tokens, ids, model inputs, the text decoded."""
    options = [*(["--batch"] if batch else []), *(["--json"] if json_ else [])]
    _become("launch.tokenized", [*options, "--", file, *texts])


def _become(module: str, arguments: list[str]) -> NoReturn:
    """Go on as the process that has torch, so that a signal reaches it and its exit code is the command's."""
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], _without_devices())


def _without_devices() -> dict[str, str]:
    return worker_environment({**python_environment(), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"})


def schema_command() -> None:
    """Print the JSON schema of run files, with which editors complete and check them."""
    print(json.dumps(RunConfig.model_json_schema(), indent=2))
