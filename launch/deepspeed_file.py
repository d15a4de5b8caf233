"""A user's own DeepSpeed JSON: read, every key checked, and completed from the plan, which it must agree with.

DeepSpeed itself ignores most keys it does not know.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launch.deepspeed_keys import AUTO, DeepSpeedFile
from launch.dotted import NOTHING, drop, get, leaves, put
from launch.errors import ConfigError
from launch.source import Layer, place_of, read_json_file, shown
from launch.strategy import ZERO_STRATEGIES, Strategy, strategy_with_offload
from launch.validation import refuse_unrecordable, validate

_ZERO = "zero_optimization"
_STAGE = f"{_ZERO}.stage"
_OPTIMIZER_ON = f"{_ZERO}.offload_optimizer.device"
_WEIGHTS_ON = f"{_ZERO}.offload_param.device"
_GATHER = f"{_ZERO}.stage3_gather_16bit_weights_on_model_save"

_OTHER_NAMES = {
    "bfloat16": "bf16",
    f"{_ZERO}.gather_16bit_weights_on_model_save": _GATHER,
    f"{_ZERO}.stage3_gather_fp16_weights_on_model_save": _GATHER,
    f"{_ZERO}.cpu_offload": f"{_ZERO}.offload_optimizer",
    f"{_ZERO}.cpu_offload_param": f"{_ZERO}.offload_param",
    **{
        f"{_ZERO}.{name}": f"{_ZERO}.stage3_{name}"
        for name in (
            *("prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold"),
            *("max_live_parameters", "max_reuse_distance", "module_granularity_threshold"),
            *("use_all_reduce_for_fetch_params", "allgather_sequential"),
        )
    },
}
"""Keys that DeepSpeed takes for another one."""


def read_deepspeed_file(path: Path) -> Layer:
    """Read a DeepSpeed configuration; each key comes under one name, whichever the file uses.

    Raises:
        ConfigError: it is no JSON object, or one line for each key that DeepSpeed does not know, has removed, or
            is of another type.
    """
    layer = read_json_file(path, DeepSpeedFile.file)
    refuse_unrecordable(layer)
    validate(DeepSpeedFile, layer.values, layer, root=DeepSpeedFile)
    return _with_one_name_each(layer)


def _with_one_name_each(layer: Layer) -> Layer:
    values, places = copy.deepcopy(layer.values), dict(layer.places)
    problems = []
    for name, right in _OTHER_NAMES.items():
        value = get(values, name)
        if value is NOTHING:
            continue
        if get(values, right) is not NOTHING:
            problems.append(
                f"{places[name]}: {name} = {shown(value)}: is another name of {right} ({places[right]}); keep one"
            )
            continue
        drop(values, name)
        for key in [key for key in places if f"{key}.".startswith(f"{name}.")]:
            places[right + key.removeprefix(name)] = places.pop(key)
        put(values, right, _device_of(value) if right.startswith(f"{_ZERO}.offload_") else value)
    if problems:
        raise ConfigError("\n".join(problems))
    for section in (f"{_ZERO}.offload_optimizer", f"{_ZERO}.offload_param"):
        if get(values, section) is None:
            put(values, section, {"device": "none"})
    return Layer(values, places, layer.source)


def _device_of(cpu_offload: Any) -> dict[str, str]:
    return {"device": {True: "cpu", AUTO: AUTO}.get(cpu_offload, "none")}


# --- what it means ---------------------------------------------------------------------------------------


def strategy_of_deepspeed(layer: Layer) -> Strategy | None:
    """The strategy that a file read by `read_deepspeed_file` asks for; None where it states no stage, or "auto".

    Raises:
        ConfigError: there is no such strategy.
    """
    stage = get(layer.values, _STAGE)
    if stage in (NOTHING, AUTO):
        return None
    devices = [get(layer.values, key) for key in (_OPTIMIZER_ON, _WEIGHTS_ON)]
    optimizer_on, weights_on = ("none" if device in (NOTHING, AUTO) else str(device) for device in devices)
    strategy = strategy_with_offload(stage, optimizer_on, weights_on)
    if strategy is None:
        raise ConfigError(
            f"{place_of(layer, _STAGE)}: {_STAGE} = {stage}: with offload_optimizer.device = {optimizer_on} and "
            f"offload_param.device = {weights_on} there is no such strategy; there are {ZERO_STRATEGIES}"
        )
    return strategy


_REFUSED = {
    "optimizer": "shoal builds the optimizer; use train.optimizer, train.learning_rate, train.weight_decay",
    "scheduler": "shoal sets the learning rate of every update; use train.schedule, and train.warmup_steps or "
    "train.warmup_ratio",
    "wandb": "shoal records the run; use track.wandb and track.project",
    "data_efficiency": "shoal decides which samples make a batch, in the order of train.seed",
    "autotuning": "shoal decides the batch sizes; use train.global_batch_size and train.micro_batch_size",
    "pipeline": "shoal has no pipeline parallelism; use parallel.strategy",
    "tensor_parallel": "shoal has no tensor parallelism; use parallel.strategy",
    "expert_parallel": "shoal has no expert parallelism; use parallel.strategy",
    "sequence_parallel_size": "shoal has no sequence parallelism; use parallel.strategy",
    "data_parallel_size": "every process holds data of its own; use parallel.devices",
    "hybrid_engine": "shoal trains without generating",
    "weight_quantization": "shoal trains the weights as they are; use train.precision",
    "datastates_ckpt": "shoal writes the checkpoints; use save.every_steps",
    f"{_ZERO}.zenflow": "it needs an optimizer of DeepSpeed, and shoal uses torch's",
}
"""What shoal does itself or does not do; a section that says `"enabled": false` passes."""

_ALWAYS: dict[str, tuple[Any, str]] = {
    "fp16.fp16_master_weights_and_grads": (False, "shoal keeps weights and optimizer in fp32"),
    "bf16.bf16_master_weights_and_grads": (False, "shoal keeps weights and optimizer in fp32"),
    "bf16.bf16_optimizer_states": (False, "shoal keeps weights and optimizer in fp32"),
    "bf16.check_grad_overflow": (True, "shoal stops before a gradient that is not finite changes the weights"),
    "torch_autocast.enabled": (False, "train.precision decides the number format"),
    "gradient_allreduce_op": ("mean", "shoal counts on gradients that are averaged over the processes"),
    "managed_gradient_accumulation": (True, "shoal tells DeepSpeed which micro-batch is the last of an update"),
    "dataloader_drop_last": (False, "shoal hands out the batches, and every sample counts"),
    "compile.deepcompile": (False, "shoal compiles the blocks of the model; use train.compile"),
    "checkpoint.load_universal": (False, "shoal reads the checkpoints it wrote"),
    f"{_ZERO}.compute_grad_norm": (True, "shoal records the gradient norm"),
    f"{_ZERO}.offload_optimizer.super_offload": (False, "it needs an optimizer of DeepSpeed; shoal uses torch's"),
}
"""Values that a run of shoal always has, without stating them, and why."""

_BUCKET = f"{_ZERO}.reduce_bucket_size"
_FREE = {"steps_per_print", _GATHER, _BUCKET, "fp16.initial_scale_power", "fp16.hysteresis"}
"""What `render.deepspeed_config` states, but a file may state otherwise: which updates there are does not change.

Not the loss scale itself, nor its least value: an update that overflows is repeated until half of the scale, and half
of that, is small enough; with a scale that stays as it is that would take for ever.
"""


def bucket_of_deepspeed(layer: Layer) -> int | None:
    """How many numbers are gathered before they are summed; None where the file leaves that to shoal."""
    stated = get(layer.values, _BUCKET)
    return None if stated in (NOTHING, AUTO) else int(stated)


def complete(layer: Layer, decided: dict[str, Any], because: Mapping[str, str]) -> dict[str, Any]:
    """`decided`, and what the file states beyond it.

    Args:
        layer: What `read_deepspeed_file` read.
        decided: A full configuration (`render.deepspeed_config`).
        because: For dotted keys of `decided` the key of the run file that decides it, and its place:
            `{"train_batch_size": "train.global_batch_size, run.yaml:4"}`. What is not in it is shoal's own choice.

    An "auto" in the file takes the decided value; where there is none, DeepSpeed's own default holds.

    Raises:
        ConfigError: one line for each value that contradicts `decided`, and each key that asks DeepSpeed for what
            shoal does itself.
    """
    result = copy.deepcopy(decided)
    problems = list(_refusals(layer))
    for key, value in leaves(layer.values):
        if any(f"{key}.".startswith(f"{refused}.") for refused in _REFUSED):
            continue  # told above, or switched off
        needed, reason, fix = _decision(decided, because, key)
        if key in _FREE and value != AUTO:
            needed = NOTHING
        if needed is NOTHING and value != AUTO:
            put(result, key, value)
        elif needed is not NOTHING and (value == AUTO or _same(value, needed)):
            put(result, key, needed)
        elif needed is not NOTHING:
            problems.append(f"{place_of(layer, key)}: {key} = {shown(value)}: {reason}; {fix}")
    if problems:
        raise ConfigError("\n".join(problems))
    return result


def _refusals(layer: Layer) -> Iterator[str]:
    for key, instead in _REFUSED.items():
        value = get(layer.values, key)
        if not _is_off(value):
            yield f"{place_of(layer, key)}: {key} = {shown(value)}: {instead}; leave {key} out"


def _is_off(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("enabled") is False or not value
    return value is NOTHING or value is None or value is False or value == 1


def _decision(decided: dict[str, Any], because: Mapping[str, str], key: str) -> tuple[Any, str, str]:
    """What the value of a key must be (`NOTHING`: the file's own affair), why, and what to do about another."""
    needed = get(decided, key)
    if needed is NOTHING and key in _ALWAYS:
        needed, why = _ALWAYS[key]
        return needed, f"must be {shown(needed)}, because {why}", "leave it out"
    cause = because.get(key)
    if key in (_OPTIMIZER_ON, _WEIGHTS_ON):
        needed = "none" if needed is NOTHING else needed
        cause = cause or because.get(_STAGE)
    if cause:
        return needed, f"the run file decides it: {shown(needed)} ({cause})", 'state the same in both, or write "auto"'
    return needed, f"shoal decides it: {shown(needed)}", "leave it out"


def _same(stated: Any, needed: Any) -> bool:
    """1 and 1.0 are the same, 1 and true are not."""
    return bool(stated == needed) and isinstance(stated, bool) == isinstance(needed, bool)
