"""From the name of a recipe to its module, and from the name of a run file to its path."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from launch.assets import recipes_folder
from launch.config import Loaded
from launch.errors import ConfigError, DataError
from launch.keys import names_of
from launch.own_recipe import import_file
from launch.recipe import Prepared, Preview, RecipeArgs, RecipeContext
from launch.sections import RunConfig
from launch.source import DEFAULT, Layer, place_of, read_run_file
from launch.validation import validate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Recipe:
    """A recipe's module with the arguments of one run."""

    module: ModuleType
    args: RecipeArgs
    layer: Layer = field(default_factory=Layer)
    """Where the arguments were stated, for messages."""

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
        """What is known before launch; checks what can be checked without torch.

        Raises:
            LaunchError: as the recipe has it, and of an argument that was stated where that was.
        """
        preview = getattr(self.module, "preview", None)
        try:
            return preview(self.args, context) if preview else Preview()
        except (ConfigError, DataError) as error:
            lines = "\n".join(_placed(line, self.layer) for line in str(error).splitlines())
            raise type(error)(lines) from error.__cause__

    def tokenizer(self, context: RecipeContext) -> PreTrainedTokenizerBase | None:
        """The tokenizer without the data; None where the recipe gives it with the data only."""
        tokenizer = getattr(self.module, "tokenizer", None)
        return tokenizer(self.args, context) if tokenizer else None


def _placed(line: str, layer: Layer) -> str:
    """A message about an argument, begun by the place where that was stated."""
    key = re.match(r"recipe_args(\.\w+)+", line)
    place = place_of(layer, key[0]) if key else DEFAULT
    return line if place == DEFAULT else f"{place}: {line}"


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with shoal: a module and a run file of the same name."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml") if path.with_suffix(".py").is_file())


def run_files(recipe: str) -> list[Path]:
    """The shipped run files that name this shipped recipe."""
    return [
        path for path in sorted(recipes_folder().glob("*.yaml")) if read_run_file(path).values.get("recipe") == recipe
    ]


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
    taken = names_of(module.Args, "recipe_args.")
    args = validate(module.Args, loaded.config.recipe_args, loaded.layer, "recipe_args", also=lambda: taken)
    return Recipe(module, args, loaded.layer)


def recipe_of(config: RunConfig) -> Recipe:
    """The recipe of a configuration that was resolved before, such as the one in a plan."""
    module = load_module(config.recipe, "plan")
    return Recipe(module, validate(module.Args, config.recipe_args, Layer(), "recipe_args"))


def load_module(recipe: str, place: str) -> ModuleType:
    """The module of a recipe, by name or by path; `place` is where the recipe was named, for messages.

    Raises:
        ConfigError: there is none, or it is not a recipe.
    """
    module = import_file(Path(recipe), place) if recipe.endswith(".py") else _import_shipped(recipe, place)
    args = getattr(module, "Args", None)
    if not (isinstance(args, type) and issubclass(args, RecipeArgs)):
        found = f"is {args!r}" if not isinstance(args, type) else f"derives from {args.__mro__[1].__qualname__}"
        got = "it has none" if args is None else f"its Args {found}"
        raise ConfigError(f"{module.__file__}: a recipe needs `class Args(launch.recipe.RecipeArgs)`; {got}")
    for name, optional in (("prepare", False), ("preview", True), ("tokenizer", True)):
        if hasattr(module, name) or not optional:
            _check_function(module, name)
    return module


def _check_function(module: ModuleType, name: str) -> None:
    """See that a recipe's function can be called with the arguments and the context."""
    function = getattr(module, name, None)
    if not callable(function):
        got = f"its {name} is a {type(function).__name__}" if hasattr(module, name) else "it has none"
        raise ConfigError(f"{module.__file__}: a recipe needs a function `{name}(args, context)`; {got}")
    signature = inspect.signature(function)
    try:
        signature.bind(None, None)
    except TypeError:
        code = getattr(function, "__code__", None)
        place = f"{module.__file__}:{code.co_firstlineno}" if code else module.__file__
        raise ConfigError(
            f"{place}: {name}{signature} is called with two arguments; write `def {name}(args, context)`"
        ) from None


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
