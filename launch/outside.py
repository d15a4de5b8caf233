"""What a user's Accelerate YAML and DeepSpeed JSON, or `accelerate launch` itself, say of a run.

Where the run file is silent, the strategy and the devices are taken from them; all else must agree with the plan.
Whatever DeepSpeed's file says beyond the plan is passed on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.accelerate_file import (
    contradictions,
    deepspeed_file_of,
    launcher_contradictions,
    read_accelerate_file,
    strategy_of_accelerate,
)
from launch.config import Loaded
from launch.deepspeed_file import complete, read_deepspeed_file, strategy_of_deepspeed
from launch.errors import ConfigError, TopologyError
from launch.source import DEFAULT, Layer
from launch.strategy import Strategy
from launch.topology import World

if TYPE_CHECKING:
    from launch.plan import Plan


@dataclass(frozen=True)
class Outside:
    """The files of other launchers, read and checked, and the world that one has made."""

    accelerate: Layer | None
    deepspeed: Layer | None
    deepspeed_named_at: str
    """Where the DeepSpeed file is named."""
    world: World


def read_outside(loaded: Loaded, world: World) -> Outside:
    """Read the files that the run file names, or the DeepSpeed file that `accelerate launch` was given.

    Raises:
        ConfigError: one cannot be read, several DeepSpeed files are named, or one line for each key that is wrong.
    """
    parallel = loaded.config.parallel
    accelerate = None
    if parallel.accelerate_config:
        accelerate = read_accelerate_file(_existing(loaded, "parallel.accelerate_config", parallel.accelerate_config))
    named = list(_deepspeed_files(loaded, accelerate, world))
    for first, other in pairwise(named):
        if first.path.resolve() != other.path.resolve():
            raise ConfigError(
                f"{first}: is another DeepSpeed file than {other.key} = {other.path} ({other.place}); "
                "name the same in both, or only one"
            )
    deepspeed = read_deepspeed_file(named[0].path) if named else None
    return Outside(accelerate, deepspeed, named[0].place if named else DEFAULT, world)


@dataclass(frozen=True)
class _Named:
    """A DeepSpeed file, and where it is named."""

    place: str
    key: str
    path: Path

    def __str__(self) -> str:
        return f"{self.place}: {self.key} = {self.path}"


def _deepspeed_files(loaded: Loaded, accelerate: Layer | None, world: World) -> Iterator[_Named]:
    key, stated = "parallel.deepspeed_config", loaded.config.parallel.deepspeed_config
    if stated:
        yield _Named(loaded.place(key), key, _existing(loaded, key, stated))
    if accelerate and (path := deepspeed_file_of(accelerate, Path(accelerate.source))):
        key = "deepspeed_config.deepspeed_config_file"
        yield _Named(accelerate.places[key], key, path.absolute())
    if world.deepspeed_file:
        yield _Named("`accelerate launch`", "deepspeed_config_file", Path(world.deepspeed_file))


def _existing(loaded: Loaded, key: str, path: str) -> Path:
    if not Path(path).exists():
        raise ConfigError(
            f"{loaded.place(key)}: {key} = {path}: no such file; a path in a run file starts beside it, one on "
            "the command line where you stand"
        )
    return Path(path)


# --- what is taken over ----------------------------------------------------------------------------------


def take_over(loaded: Loaded, outside: Outside) -> Loaded:
    """The configuration, with strategy, DeepSpeed file and devices from `outside` where it leaves them open.

    Raises:
        ConfigError: the two files ask for different strategies, or the DeepSpeed file for none.
        TopologyError: the run file states another strategy.
    """
    found = list(_strategies(outside))
    for (one, here), (other, there) in pairwise(found):
        if one != other:
            raise ConfigError(f"{here}: asks for {one}, but {there} asks for {other}; let both ask for the same")
    if found:
        loaded = _with_strategy(loaded, *found[-1])
    if outside.deepspeed:
        loaded = loaded.with_parallel("deepspeed_config", outside.deepspeed.source, outside.deepspeed_named_at)
    if loaded.config.parallel.device == "auto" and (place := _on_cpu(outside)):
        loaded = loaded.with_parallel("device", "cpu", place)
    if outside.accelerate and not outside.world.launched:
        loaded = _with_devices(loaded, outside.accelerate)
    return loaded


def _strategies(outside: Outside) -> Iterator[tuple[Strategy, str]]:
    if outside.accelerate and (strategy := strategy_of_accelerate(outside.accelerate)):
        yield strategy, outside.accelerate.places["distributed_type"]
    if outside.deepspeed:
        key = "zero_optimization.stage"
        if key not in outside.deepspeed.places:
            raise ConfigError(
                f'{outside.deepspeed.source}: {key}: must be set, to 1, 2 or 3, or to "auto" where parallel.strategy '
                "says it"
            )
        if strategy := strategy_of_deepspeed(outside.deepspeed):
            yield strategy, outside.deepspeed.places[key]


def _with_strategy(loaded: Loaded, strategy: Strategy, place: str) -> Loaded:
    key, stated = "parallel.strategy", loaded.config.parallel.strategy
    if stated == "auto":
        return loaded.with_parallel("strategy", str(strategy), place)
    if stated != strategy:
        raise TopologyError(
            f"{loaded.place(key)}: {key} = {stated}: {place} asks for {strategy}; state the same in both, or leave "
            f"{key} out"
        )
    return loaded


def _on_cpu(outside: Outside) -> str | None:
    """Where the CPU is asked for."""
    if outside.accelerate and outside.accelerate.values.get("use_cpu"):
        return outside.accelerate.places["use_cpu"]
    stated = outside.world.variables.get("ACCELERATE_USE_CPU", "").lower()
    return "`accelerate launch`" if stated in ("true", "1", "yes") else None


def _with_devices(loaded: Loaded, accelerate: Layer) -> Loaded:
    machines = accelerate.values.get("num_machines")
    if machines and machines > 1 and loaded.origin("parallel.nodes") == DEFAULT:
        loaded = loaded.with_parallel("nodes", machines, accelerate.places["num_machines"])
    size, nodes = accelerate.values.get("num_processes"), loaded.config.parallel.nodes
    if "xla" in (loaded.config.parallel.strategy, loaded.config.parallel.device):
        return loaded  # one process has all devices
    if loaded.config.parallel.devices != "auto" or not size or size == -1 or size % nodes:
        return loaded
    return loaded.with_parallel("devices", size // nodes, accelerate.places["num_processes"])


# --- what must agree -------------------------------------------------------------------------------------


def agreed(plan: Plan, loaded: Loaded, outside: Outside) -> dict[str, Any] | None:
    """DeepSpeed's configuration of the plan, with what its file says beyond.

    Raises:
        ConfigError: one line for each value that contradicts the plan, naming both places.
        TopologyError: there is a DeepSpeed file, but another strategy.
    """
    decided = _decided(plan, loaded.origin)
    if outside.world.launched:
        decided["num_processes"] = (plan.processes.world_size, "the launcher started them")
    problems = contradictions(outside.accelerate, decided) if outside.accelerate else []
    # A worker's variables say what its file says: once is enough.
    problems = problems or launcher_contradictions(outside.world.variables, decided)
    if problems:
        raise ConfigError("\n".join(problems))
    if outside.deepspeed is None:
        return plan.deepspeed
    if plan.deepspeed is None:
        key = "parallel.deepspeed_config"
        raise TopologyError(
            f"{loaded.place(key)}: {key} = {outside.deepspeed.source}: the strategy is "
            f"{plan.processes.strategy}, not one of DeepSpeed's; set parallel.strategy to zero1, zero2 or zero3, or "
            "zero_optimization.stage in the file"
        )
    return complete(outside.deepspeed, plan.deepspeed, _because(plan, loaded))


def refuse_another(plan: Plan, folder: Path, world: World) -> None:
    """See that a launcher which starts the run of `folder` asks for nothing but its plan.

    Raises:
        ConfigError: one line for each value that contradicts it.
        TopologyError: it was configured for another strategy.
    """
    own = folder / "deepspeed.json"
    if world.deepspeed_file and Path(world.deepspeed_file).resolve() != own.resolve():
        raise ConfigError(
            f"{folder}: a run folder is decided, DeepSpeed's configuration too; {world.deepspeed_file} goes with a run "
            "file"
        )
    if world.strategy and world.strategy != plan.processes.strategy:
        raise TopologyError(
            f"{folder}: the strategy is {plan.processes.strategy}, but the launcher was configured for "
            f"{world.strategy}; start it with {folder}/accelerate.yaml"
        )
    problems = launcher_contradictions(world.variables, _decided(plan, lambda _: f"{folder}/run.yaml"))
    if problems:
        raise ConfigError("\n".join(problems))


def _decided(plan: Plan, place: Callable[[str], str]) -> dict[str, tuple[Any, str]]:
    """For keys of Accelerate's configuration, the value that the plan implies, and why."""

    def by(key: str) -> str:
        return f"{key}, {place(key)}"

    train, processes, strategy = plan.config.train, plan.processes, plan.processes.strategy
    decided: dict[str, tuple[Any, str]] = {
        "num_processes": (processes.world_size, by("parallel.devices")),
        "num_machines": (processes.nodes, by("parallel.nodes")),
        "mixed_precision": ("no" if train.precision == "fp32" else train.precision, by("train.precision")),
        "dynamo_config.dynamo_backend": ("inductor" if train.compile else "no", by("train.compile")),
        "fsdp_config.fsdp_activation_checkpointing": (
            train.activation_checkpointing,
            by("train.activation_checkpointing"),
        ),
        "deepspeed_config.gradient_accumulation_steps": (plan.batch.accumulation, by("train.micro_batch_size")),
        "deepspeed_config.gradient_clipping": (train.max_grad_norm or 0.0, by("train.max_grad_norm")),
    }
    if processes.device != "cpu":
        decided["use_cpu"] = (False, by("parallel.device"))
    if strategy.shards:
        decided["distributed_type"] = (
            "FSDP" if strategy.kind == "fsdp2" else "DEEPSPEED",
            by("parallel.strategy"),
        )
    if strategy.kind == "fsdp2":
        decided["fsdp_config.fsdp_offload_params"] = (strategy.offload, by("parallel.strategy"))
    return decided


def _because(plan: Plan, loaded: Loaded) -> dict[str, str]:
    """For keys of DeepSpeed's configuration, the key of the run file that decides it."""
    keys = {
        "train_batch_size": "train.global_batch_size",
        "train_micro_batch_size_per_gpu": "train.micro_batch_size",
        "gradient_accumulation_steps": "train.micro_batch_size",
        "gradient_clipping": "train.max_grad_norm",
        "zero_optimization.stage": "parallel.strategy",
        "bf16.enabled": "train.precision",
        "fp16.enabled": "train.precision",
    }
    world = f"on {plan.processes.world_size} processes"
    extra = {"train_micro_batch_size_per_gpu": world, "gradient_accumulation_steps": world}
    return {name: ", ".join(filter(None, (key, extra.get(name), loaded.origin(key)))) for name, key in keys.items()}
