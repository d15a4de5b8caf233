"""The run configuration: a run file with overrides laid over it, checked, and where each value comes from.

Read once, frozen, never mutated. Knows nothing of machines, files of a run, or torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from launch.errors import ConfigError, LaunchError
from launch.keys import names_of
from launch.sections import EXCLUSIVE, RunConfig
from launch.source import (
    COMMAND_LINE,
    DEFAULT,
    Layer,
    merge,
    place_of,
    read_overrides,
    read_run_file,
    shown,
    write_yaml,
)
from launch.validation import refuse_unrecordable, validate


@dataclass(frozen=True)
class Loaded:
    """A valid configuration and the place each stated key came from."""

    config: RunConfig
    layer: Layer
    run_file: Path | None

    def place(self, key: str) -> str:
        """Where `key` was stated, or the nearest section above it; "default" where nowhere."""
        return place_of(self.layer, key)

    def origin(self, key: str) -> str:
        """Where the value of `key` comes from: "default" unless the key itself was stated."""
        return self.layer.places.get(key, DEFAULT)

    def with_parallel(self, name: str, value: Any, place: str) -> Loaded:
        """The same, with a value of the section `parallel` that another file states."""
        parallel = self.config.parallel.model_copy(update={name: value})
        layer = replace(self.layer, places={**self.layer.places, f"parallel.{name}": place})
        return replace(self, config=self.config.model_copy(update={"parallel": parallel}), layer=layer)

    def with_recipe_args(self, recipe_args: dict[str, JsonValue]) -> Loaded:
        """The same, with the arguments of the recipe resolved: defaults filled in, paths absolute."""
        return replace(self, config=self.config.model_copy(update={"recipe_args": recipe_args}))


def load(run_file: Path | None, overrides: list[str], beneath: Layer | None = None) -> Loaded:
    """Read a run file, lay the overrides over it and it over what is `beneath`, validate.

    Raises:
        ConfigError: one line per problem, with place, key, value, rule and the nearest right key.
    """
    layer = read_run_file(run_file) if run_file else Layer()
    if beneath:
        layer = replace(merge(beneath, layer), source=layer.source)
    layer = merge(layer, read_overrides(overrides), EXCLUSIVE)
    refuse_unrecordable(layer)
    config = validate(
        RunConfig, _with_default_length(layer.values), layer, also=lambda: _recipe_arguments(layer, run_file)
    )
    loaded = _with_absolute_paths(Loaded(config, layer, run_file))
    problems = list(_impossible_combinations(loaded))
    if problems:
        raise ConfigError("\n".join(problems))
    return loaded


def _recipe_arguments(layer: Layer, run_file: Path | None) -> list[str]:
    """The dotted keys that the recipe takes, as far as it can be found: what was stated is wrong anyway."""
    from launch.registry import load_module  # which is built on this module

    recipe = layer.values.get("recipe")
    if not isinstance(recipe, str) or not recipe:
        return []
    if recipe.endswith(".py"):
        recipe = _beside(layer, run_file, "recipe", recipe)
    try:
        return names_of(load_module(recipe, place_of(layer, "recipe")).Args, "recipe_args.")
    except LaunchError:
        return []


def _beside(layer: Layer, run_file: Path | None, key: str, path: str) -> str:
    """The absolute path that `key` states: a run file names files beside it, a command line where the user stands."""
    beside = run_file is not None and layer.places.get(key) != COMMAND_LINE
    return str(((run_file.parent if beside and run_file else Path()) / path).absolute())


def _with_absolute_paths(loaded: Loaded) -> Loaded:
    """Files named in a run file are looked for beside it, those named on the command line where the user stands."""
    config, parallel = loaded.config, loaded.config.parallel
    files = {
        name: _beside(loaded.layer, loaded.run_file, f"parallel.{name}", path)
        for name in ("accelerate_config", "deepspeed_config")
        if (path := getattr(parallel, name))
    }
    update: dict[str, Any] = {"parallel": parallel.model_copy(update=files)} if files else {}
    if config.recipe.endswith(".py"):
        update["recipe"] = _beside(loaded.layer, loaded.run_file, "recipe", config.recipe)
    return replace(loaded, config=config.model_copy(update=update))


def _with_default_length(values: dict[str, Any]) -> dict[str, Any]:
    """One epoch where the user states no length, so that the resolved configuration always states one."""
    train = values.get("train", {})
    if not isinstance(train, dict) or train.get("max_steps") is not None or train.get("epochs") is not None:
        return values
    return {**values, "train": {**train, "epochs": 1.0}}


def _impossible_combinations(loaded: Loaded) -> Iterator[str]:
    train, parallel = loaded.config.train, loaded.config.parallel
    for first, second in EXCLUSIVE:
        values = [getattr(train, key.removeprefix("train.")) for key in (first, second)]
        if None not in values:
            yield (
                f"{loaded.place(second)}: {second} = {shown(values[1])}: excludes {first} = "
                f"{shown(values[0])} ({loaded.place(first)}); state one of the two"
            )
    evaluation = loaded.config.eval
    if train.early_stopping_patience and not (evaluation.every_steps or evaluation.every_epochs):
        key = "train.early_stopping_patience"
        yield (
            f"{loaded.place(key)}: {key} = {train.early_stopping_patience}: "
            "needs evaluations while training; set eval.every_steps or eval.every_epochs"
        )
    if train.max_steps is not None and (train.warmup_steps or 0) > train.max_steps:
        key = "train.warmup_steps"
        yield (
            f"{loaded.place(key)}: {key} = {train.warmup_steps}: is more than train.max_steps = "
            f"{train.max_steps}; the peak learning rate would never be reached"
        )
    for key, value in (("parallel.devices", parallel.devices), ("train.micro_batch_size", train.micro_batch_size)):
        if isinstance(value, int) and value < 1:
            yield f'{loaded.place(key)}: {key} = {value}: must be at least 1, or "auto"'
    if train.on_spike == "rewind" and loaded.config.save.every_steps is None:
        key = "train.on_spike"
        yield (
            f"{loaded.place(key)}: {key} = rewind: needs checkpoints to go back to, after the same updates whatever "
            "happens; set save.every_steps"
        )
    if train.sgd_momentum and train.optimizer != "sgd":
        key = "train.sgd_momentum"
        yield f"{loaded.place(key)}: {key} = {train.sgd_momentum}: needs train.optimizer=sgd, not {train.optimizer}"
    if parallel.strategy == "single" and (parallel.devices not in ("auto", 1) or parallel.nodes > 1):
        key = "parallel.strategy"
        yield (
            f"{loaded.place(key)}: {key} = single: is one process, but parallel.devices = {parallel.devices} "
            f"and parallel.nodes = {parallel.nodes}; use parallel.strategy=ddp, or one device"
        )


def dump_yaml(config: RunConfig) -> str:
    """The resolved configuration as a run file."""
    return write_yaml(config.model_dump(mode="json"))
