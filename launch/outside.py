"""What a user's Accelerate YAML and DeepSpeed JSON, or `accelerate launch` itself, say of a run.

Where the run file is silent, the strategy and the number of processes are taken from them; all else must agree with
the plan. Whatever DeepSpeed's file says beyond the plan is passed on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
from launch.source import Layer
from launch.strategy import Strategy
from launch.topology import World

if TYPE_CHECKING:
    from launch.plan import Plan


@dataclass(frozen=True)
class Outside:
    """The files of other launchers, read and checked, and the variables that one has set."""

    accelerate: Layer | None
    deepspeed: Layer | None
    variables: Mapping[str, str]


def read_outside(loaded: Loaded, world: World) -> Outside:
    """Read the files that the run file names, or the DeepSpeed file that `accelerate launch` was given.

    Raises:
        ConfigError: one cannot be read, or one line for each key that is wrong in it.
    """
    parallel = loaded.config.parallel
    accelerate = read_accelerate_file(Path(parallel.accelerate_config)) if parallel.accelerate_config else None
    named = deepspeed_file_of(accelerate, Path(parallel.accelerate_config or "")) if accelerate else None
    files = {
        loaded.place("parallel.deepspeed_config"): parallel.deepspeed_config,
        f"{parallel.accelerate_config}": str(named.absolute()) if named else None,
        "`accelerate launch`": world.deepspeed_file,
    }
    stated = {place: file for place, file in files.items() if file}
    if len(set(stated.values())) > 1:
        named_by = ", ".join(f"{file} ({place})" for place, file in stated.items())
        raise ConfigError(f"several DeepSpeed files are named: {named_by}; name one")
    deepspeed = read_deepspeed_file(Path(next(iter(stated.values())))) if stated else None
    return Outside(accelerate, deepspeed, {} if accelerate else world.variables)


def take_over(loaded: Loaded, outside: Outside, world: World) -> Loaded:
    """The configuration, with strategy and devices from `outside` where it leaves them open.

    Raises:
        ConfigError: both state a strategy, and not the same one.
    """
    for strategy, place in _strategies(outside):
        loaded = _with_strategy(loaded, strategy, place)
    if outside.accelerate and not world.launched:
        loaded = _with_devices(loaded, outside.accelerate)
    return loaded


def _strategies(outside: Outside) -> Iterator[tuple[Strategy, str]]:
    if outside.accelerate and (strategy := strategy_of_accelerate(outside.accelerate)):
        yield strategy, outside.accelerate.places["distributed_type"]
    if outside.deepspeed:
        strategy = strategy_of_deepspeed(outside.deepspeed)
        place = outside.deepspeed.places.get("zero_optimization.stage", outside.deepspeed.source)
        if strategy:
            yield strategy, place
        elif "zero_optimization.stage" not in outside.deepspeed.places:
            raise ConfigError(f"{place}: zero_optimization.stage: must be set, to 1, 2 or 3")


def _with_strategy(loaded: Loaded, strategy: Strategy, place: str) -> Loaded:
    key, stated = "parallel.strategy", loaded.config.parallel.strategy
    if stated == "auto":
        return loaded.with_parallel("strategy", str(strategy), place)
    if stated != strategy:
        raise TopologyError(
            f"{loaded.place(key)}: {key} = {stated}, but {place} asks for {strategy}; state the same in both, or leave "
            f"{key} out"
        )
    return loaded


def _with_devices(loaded: Loaded, accelerate: Layer) -> Loaded:
    size, nodes = accelerate.values.get("num_processes"), accelerate.values.get("num_machines") or 1
    if loaded.config.parallel.devices != "auto" or not size or size == -1 or size % nodes:
        return loaded
    loaded = loaded.with_parallel("devices", size // nodes, accelerate.places["num_processes"])
    return loaded.with_parallel("nodes", nodes, accelerate.places["num_machines"]) if nodes > 1 else loaded


def agreed(plan: Plan, loaded: Loaded, outside: Outside) -> dict[str, Any] | None:
    """DeepSpeed's configuration of the plan, with what its file says beyond.

    Raises:
        ConfigError: one line for each value that contradicts the plan, naming both places.
    """
    problems = []
    if outside.accelerate:
        problems += contradictions(outside.accelerate, _decided(plan, loaded))
    problems += launcher_contradictions(outside.variables, _decided(plan, loaded))
    if problems:
        raise ConfigError("\n".join(problems))
    if outside.deepspeed is None:
        return plan.deepspeed
    if plan.deepspeed is None:
        place = loaded.place("parallel.deepspeed_config")
        raise TopologyError(
            f"{place}: a DeepSpeed file is given, but the strategy is {plan.processes.strategy}; set "
            "parallel.strategy to zero1, zero2 or zero3, or zero_optimization.stage in the file"
        )
    return complete(outside.deepspeed, plan.deepspeed, _because(plan, loaded))


def _decided(plan: Plan, loaded: Loaded) -> dict[str, tuple[Any, str]]:
    """For keys of Accelerate's configuration, the value that the plan implies, and why."""

    def by(key: str) -> str:
        return f"{key}, {loaded.origin(key)}"

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
