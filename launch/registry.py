"""From the name of a recipe to its module, and from the name of a run file to its path."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from launch.assets import recipes_folder
from launch.config import Loaded, RunConfig, validate
from launch.errors import ConfigError
from launch.recipe import Prepared, Preview, RecipeArgs, RecipeContext
from launch.source import Layer


@dataclass(frozen=True)
class Recipe:
    """A recipe's module with the arguments of one run."""

    module: ModuleType
    args: RecipeArgs

    def prepare(self, context: RecipeContext) -> Prepared:
        """Every rank must call this."""
        prepared = self.module.prepare(self.args, context)
        if not isinstance(prepared, Prepared):
            raise ConfigError(
                f"{self.module.__file__}: prepare() returned {type(prepared).__name__}; "
                "it must return launch.recipe.Prepared"
            )
        return prepared

    def preview(self, context: RecipeContext) -> Preview:
        """What is known before launch; checks what can be checked without torch."""
        preview = getattr(self.module, "preview", None)
        return preview(self.args, context) if preview else Preview()


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with shoal: a module and a run file of the same name."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml") if path.with_suffix(".py").is_file())


def find_run_file(text: str) -> Path:
    """The run file a user means: a path, or the name of a shipped one with or without `recipes/` and `.yaml`.

    Raises:
        ConfigError: there is no such file.
    """
    path = Path(text)
    if path.is_file():
        return path
    shipped = {file.stem: file for file in recipes_folder().glob("*.yaml")}
    if path.stem in shipped and path.parent in (Path(), Path("recipes")) and path.suffix in ("", ".yaml"):
        return shipped[path.stem]
    close = difflib.get_close_matches(path.stem, shipped, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(f"{text}: no such run file; {hint}shipped: {', '.join(sorted(shipped))}")


def load_recipe(loaded: Loaded) -> Recipe:
    """Import the recipe a run names and validate its arguments.

    Raises:
        ConfigError: no such recipe, a module that is not one, or arguments it does not take.
    """
    module = load_module(loaded.config.recipe, loaded.place("recipe"))
    args = validate(module.Args, loaded.config.recipe_args, loaded.layer, "recipe_args")
    return Recipe(module, args)


def recipe_of(config: RunConfig) -> Recipe:
    """The recipe of a configuration that was resolved before, such as the one in a plan."""
    module = load_module(config.recipe, "plan")
    return Recipe(module, validate(module.Args, config.recipe_args, Layer(), "recipe_args"))


def load_module(recipe: str, place: str) -> ModuleType:
    """The module of a recipe, by name or by path; `place` is where the recipe was named, for messages.

    Raises:
        ConfigError: there is none, or it is not a recipe.
    """
    module = _import_file(Path(recipe), place) if recipe.endswith(".py") else _import_shipped(recipe, place)
    args = getattr(module, "Args", None)
    if not (isinstance(args, type) and issubclass(args, RecipeArgs)):
        raise ConfigError(f"{module.__file__}: a recipe needs `class Args(launch.recipe.RecipeArgs)`")
    if not callable(getattr(module, "prepare", None)):
        raise ConfigError(f"{module.__file__}: a recipe needs a function `prepare(args, context)`")
    return module


def _import_shipped(name: str, place: str) -> ModuleType:
    names = shipped_recipes()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(
            f"{place}: recipe = {name}: no such recipe; {hint}shipped: {', '.join(names)}; "
            "your own is named by its path, ./my_recipe.py"
        )
    spec = importlib.util.find_spec("recipes")
    found = [Path(folder).resolve() for folder in (spec.submodule_search_locations or [])] if spec else []
    if recipes_folder().resolve() not in found:
        where = found[0] if found else "nowhere"
        raise ConfigError(
            f"{place}: recipe = {name}: another package named `recipes` hides shoal's ({where} instead of "
            f"{recipes_folder()}); uninstall it, or run from a folder without one (torchtune installs one)"
        )
    return importlib.import_module(f"recipes.{name}")


def _import_file(path: Path, place: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"{place}: recipe = {path}: no such file")
    name = f"shoal_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pickling its samples to data workers needs it there
    spec.loader.exec_module(module)
    return module
