"""`shoal recipes`: what there is, what it takes, and a copy that runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from launch.assets import recipes_folder
from launch.cli import app
from launch.config import load
from launch.errors import ConfigError
from launch.keys import describe
from launch.recipe_copy import copy_recipe
from launch.registry import load_module, load_recipe, shipped_recipes
from tests.commands import shoal

SECTIONED = '''"""Rows of my own."""
from launch.sections import Section
from launch.recipe import RecipeArgs


class Adapters(Section):
    """Small weights beside the frozen ones."""

    r: int = 8
    """Their rank."""


class Args(RecipeArgs):
    """What a run file may set."""

    rows: int
    """How many."""
    lora: Adapters | None = None


def prepare(args, context):
    pass
'''


def said(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["recipes", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_list_names_every_recipe_and_every_run_file() -> None:
    listed = json.loads(said("list", "--json"))
    assert [each["name"] for each in listed] == shipped_recipes()
    for each in listed:
        assert f"{each['name']}.yaml" in each["run_files"]
        assert (load_module(each["name"], "here").__doc__ or "").startswith(each["summary"])
    named = sorted(name for each in listed for name in each["run_files"])
    assert named == sorted(path.name for path in recipes_folder().glob("*.yaml"))
    assert said() == said("list")
    assert [line.split()[0] for line in said().splitlines() if not line.startswith(" ")] == shipped_recipes()


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_is_shown_with_all_it_takes(name: str) -> None:
    module = load_module(name, "here")
    text, shown = said("show", name), json.loads(said("show", name, "--json"))
    assert text.startswith((module.__doc__ or "").splitlines()[0])
    assert [each["name"] for each in shown["args"]] == [key.name for key in describe(module.Args, "recipe_args.")]
    for each in shown["args"]:
        assert f"  {each['name']}  ({each['kind']}; " in text
        assert each["description"] and "function" not in each["kind"]


def test_sections_of_an_own_recipe_are_shown_and_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(SECTIONED)
    assert said("show", "./mine.py").splitlines() == [
        "Rows of my own.",
        "  recipe_args.rows  (whole number; required)",
        "      How many.",
        "  recipe_args.lora.r  (whole number; default 8)",
        "      Their rank.",
    ]
    Path("mine.yaml").write_text("recipe: ./mine.py\nrecipe_args: {rows: 3}\ntrain: {max_steps: 1}\n")
    planned = CliRunner().invoke(app, ["plan", "mine.yaml"], catch_exceptions=False).stdout
    (line,) = [line.split() for line in planned.splitlines() if "recipe_args.lora.r" in line]
    assert line[:2] == ["recipe_args.lora.r", "null"]


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_copy_is_the_same_recipe_from_any_folder(name: str, tmp_path: Path) -> None:
    run_file = copy_recipe(name, tmp_path / "my_recipe.py")
    original = recipes_folder() / f"{name}.py"
    assert (tmp_path / "my_recipe.py").read_bytes() == original.read_bytes()
    text, shipped = run_file.read_text(encoding="utf-8"), original.with_suffix(".yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == {**yaml.safe_load(shipped), "recipe": "./my_recipe.py"}
    assert "recipes/" not in text.partition("\nrecipe:")[0], "its header says how to run the copy"
    recipe = load_recipe(load(run_file, []))
    assert recipe.module.__file__ == str(tmp_path / "my_recipe.py")
    assert recipe.args.model_dump() == load_recipe(load(original.with_suffix(".yaml"), [])).args.model_dump()


def test_what_copy_says_is_a_command_that_runs(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    copied = shoal(tmp_path, "recipes", "copy", "causal_lm", "./mine/my_recipe.py")
    assert copied.returncode == 0, copied.stderr
    file = copied.stdout.strip().rpartition("shoal run ")[2]
    planned = shoal(tmp_path, "plan", file, "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["config"]["recipe"] == str(tmp_path / "mine/my_recipe.py")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("there.py", "command line: {folder}/there.py: exists already, and is not overwritten; give another name"),
        ("half.py", "command line: {folder}/half.yaml: exists already, and is not overwritten; give another name"),
        ("mine", "command line: {folder}/mine: a recipe is a Python file; name it mine.py"),
        ("none/mine.py", "command line: {folder}/none/mine.py: there is no folder {folder}/none; make it first"),
    ],
)
def test_nothing_is_overwritten(target: str, message: str, tmp_path: Path) -> None:
    for name in ("there.py", "half.yaml"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError) as caught:
        copy_recipe("causal_lm", tmp_path / target)
    assert str(caught.value) == message.format(folder=tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"there.py": "mine", "half.yaml": "mine"}


def test_an_own_recipe_without_a_run_file_is_copied_with_one_that_names_it(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("own_recipe.py"), tmp_path / "first.py")
    assert copy_recipe(str(tmp_path / "first.py"), tmp_path / "second.py").read_text() == "recipe: ./second.py\n"
