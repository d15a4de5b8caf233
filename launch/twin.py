"""The CPU twin of a run: the same run with real processes on this machine's CPU, and all that differs, computed.

Both are planned, the run itself as on a machine that has the devices it asks for; the plans are compared key by key.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.config import Loaded, load
from launch.errors import ConfigError, LaunchError
from launch.outside import read_outside, take_over
from launch.plan import Decided, Plan, as_json, decide
from launch.registry import find_run_file
from launch.sections import ParallelSection, RunConfig
from launch.strategy import Strategy
from launch.topology import Machine, World, read_machine, world_to_be


@dataclass(frozen=True)
class Target:
    """The machine, or machines, that a run is meant for, as far as one can tell without them."""

    machine: Machine
    world: World
    assumed: str
    """What was assumed, in words."""


@dataclass(frozen=True)
class Twin:
    """A twin, decided, and what to tell of it."""

    decided: Decided
    lines: list[str]


def decide_twin(file: str, overrides: list[str], out: Path | None, processes: int) -> Twin:
    """Plan a run with this many processes on this machine's CPU, and say how that differs from the run itself.

    Raises:
        LaunchError: the twin cannot be; nothing was started or written.
    """
    here, config = read_machine(), _with_outside(load(find_run_file(file), overrides)).config
    target = assume(config.parallel, here, processes)
    original = _plan_or_reason(file, overrides, out, target)
    if isinstance(original, Plan):
        _check_is_possible(original, processes)
    stated = changes(config, original if isinstance(original, Plan) else None, processes)
    twin = decide(file, [*overrides, *stated], out, World(), here)
    return Twin(
        twin, [f"CPU twin of this run, strategy {twin.plan.processes.strategy}", *_told(original, target, twin)]
    )


def _with_outside(loaded: Loaded) -> Loaded:
    """With what the files of other launchers say of the run itself."""
    return take_over(loaded, read_outside(loaded, World()))


def _plan_or_reason(file: str, overrides: list[str], out: Path | None, target: Target) -> Plan | str:
    try:
        return decide(file, overrides, out, target.world, target.machine).plan
    except LaunchError as error:
        return str(error)


def of_twin(strategy: Strategy) -> Strategy:
    """The strategy of a run's twin on the CPU: its own; of a run on TPUs, which is one process, that of one process."""
    return Strategy.SINGLE if strategy is Strategy.XLA else strategy


def _told(original: Plan | str, target: Target, twin: Decided) -> list[str]:
    if isinstance(original, str):
        return [f"what differs cannot be told, because the run itself cannot be planned: {original}"]
    strategy = of_twin(original.processes.strategy)
    assert strategy == twin.plan.processes.strategy, "the twin of another strategy is none"
    assumed = f"the run is planned as on {target.assumed}"
    lines = differences(original, twin.plan)
    if not lines:
        return [assumed, "nothing differs"]
    return [assumed, "what differs, run → twin; all else in the plan is the same:", *(f"  {line}" for line in lines)]


def assume(parallel: ParallelSection, here: Machine, processes: int) -> Target:
    """The devices that a run asks for, as if they were there, on a machine that is otherwise as the one we are on.

    Where a run file leaves the number of GPUs open and there are not several here, the run is taken to have as many
    as its twin has processes: one would be another strategy.
    """
    if parallel.device in ("cpu", "mps"):
        return Target(replace(here, mps=True), World(), f"this machine's {parallel.device}")
    if "xla" in (parallel.strategy, parallel.device):
        tpus = parallel.devices if isinstance(parallel.devices, int) else here.tpus or 1
        there = replace(here, tpus=tpus, tpu_name=here.tpu_name or "TPU")
        number = f"{tpus} TPU device{'s' if tpus > 1 else ''}"
        return Target(there, World(), f"a machine with {number}, otherwise as this one")
    if isinstance(parallel.devices, int):
        gpus, source = parallel.devices, "parallel.devices"
    elif here.gpus > 1:
        gpus, source = here.gpus, "as here"
    else:
        gpus, source = processes, "as many as the twin has processes"
    nodes = parallel.nodes
    # Several nodes can only be planned as within the world that a launcher has made of them.
    world = world_to_be(nodes, gpus) if nodes > 1 else World()
    where = f"each of {nodes} nodes" if nodes > 1 else "a machine"
    assumed = f"{where} with {gpus} GPU{'s' if gpus > 1 else ''} ({source}), otherwise as this one"
    return Target(replace(here, gpus=gpus, mps=False), world, assumed)


def _check_is_possible(original: Plan, processes: int) -> None:
    strategy = original.processes.strategy
    if strategy in (Strategy.SINGLE, Strategy.XLA) and processes > 1:
        more = ", or parallel.devices=2 or more" if strategy is Strategy.SINGLE else ""
        raise ConfigError(
            f"command line: --debug-cpu {processes}: this run is one process (strategy {strategy}), and so is its "
            f"twin; use --debug-cpu 1{more}"
        )
    if strategy.shards and processes == 1:
        raise ConfigError(
            f"command line: --debug-cpu 1: this run's strategy is {strategy}, and one process has nothing to shard "
            "over; use --debug-cpu 2 or more"
        )


def changes(config: RunConfig, original: Plan | None, processes: int) -> list[str]:
    """The overrides that make a run its twin; `config` holds what the files of other launchers say of the run."""
    stated = ["parallel.device=cpu", f"parallel.devices={processes}", "parallel.nodes=1"]
    auto_differs = config.parallel.strategy == "auto" and original is not None and original.processes.strategy.shards
    if original is not None and (processes == 1 or auto_differs):  # where `auto` would mean another strategy
        stated.append(f"parallel.strategy={of_twin(original.processes.strategy)}")
    if config.parallel.accelerate_config:  # which states the devices of the run itself; all else of it is in `config`
        stated.append("parallel.accelerate_config=null")
        stated += [
            f"parallel.{name}={value}"
            for name in ("strategy", "deepspeed_config")
            if (value := getattr(config.parallel, name)) not in ("auto", None)
        ]
    if original is not None and original.by_length != "off" and not original.padding_free:  # as only a CPU goes without
        stated.append("train.padding_free=off")
    if config.train.precision == "fp16":  # only a GPU computes in it
        stated.append("train.precision=fp32")
    return stated


def differences(original: Plan, twin: Plan) -> list[str]:
    """`key: value → value of the twin` for every key of the two plans."""
    before, after = _facts(original), _facts(twin)
    keys = [*before, *(key for key in after if key not in before)]
    return [
        f"{key}: {_shown(before, key)} → {_shown(after, key)}"
        for key in keys
        if (key in before, before.get(key)) != (key in after, after.get(key))
    ]


def _facts(plan: Plan) -> dict[str, Any]:
    """A plan by dotted keys, without the run folder, and with what follows from it for the communication."""
    content = as_json(plan)
    del content["run_folder"], content["command"], content["memory"]
    content["communication"] = _communication(plan)
    return flatten(content)


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    if not isinstance(value, dict) or not value:
        return {key: value}
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= flatten(inner, f"{key}.{name}" if key else name)
    return flat


def _communication(plan: Plan) -> str:
    if plan.processes.world_size == 1:
        return "none"
    return "nccl" if plan.processes.device == "cuda" else "gloo"


def _shown(facts: dict[str, Any], key: str) -> str:
    if key not in facts:
        return "(not set)"
    value = facts[key]
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
