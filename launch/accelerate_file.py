"""A user's own Accelerate YAML: read, every key checked, and compared with the plan, which it must agree with.

Accelerate itself takes any key within a section (`fsdp_verison: 2` trains with version 1).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from launch.accelerate_keys import PREFIXED, AccelerateFile, Fsdp, Parallelism, Prefetch, Sharding, StateDict
from launch.dotted import drop, get, put
from launch.errors import ConfigError
from launch.source import Layer, place_of, read_yaml_1_1_file, shown
from launch.strategy import ZERO_STRATEGIES, Strategy, strategy_with_offload
from launch.validation import refuse_unrecordable, validate


def read_accelerate_file(path: Path) -> Layer:
    """Read what `accelerate config` writes, by the rules of YAML that Accelerate reads it by.

    Each key comes under its full and present name: `offload_params` within `fsdp_config` as `fsdp_offload_params`,
    `fp16: true` as `mixed_precision`, `dynamo_backend` as `dynamo_config.dynamo_backend`.

    Raises:
        ConfigError: it is no mapping, is meant for Amazon SageMaker, or one line for each key that Accelerate does
            not know, or of another type.
    """
    layer = read_yaml_1_1_file(path, AccelerateFile.file, "it needs at least `distributed_type: …`")
    refuse_unrecordable(layer)
    if layer.values.get("compute_environment") == "AMAZON_SAGEMAKER":
        raise ConfigError(
            f'{layer.places["compute_environment"]}: compute_environment = "AMAZON_SAGEMAKER": shoal starts no jobs on '
            "Amazon SageMaker; use LOCAL_MACHINE, and the keys that go with it"
        )
    layer = _with_prefixes(layer)
    validate(AccelerateFile, layer.values, layer, root=AccelerateFile)
    problems = list(_stated_beside_a_file(layer))
    if problems:
        raise ConfigError("\n".join(problems))
    return _with_present_names(layer)


def _with_prefixes(layer: Layer) -> Layer:
    for name, (prefix, section) in PREFIXED.items():
        stated = layer.values.get(name)
        for key in stated if isinstance(stated, dict) else ():
            if not key.startswith(prefix) and prefix + key in section.model_fields:
                layer = _renamed(layer, f"{name}.{key}", f"{name}.{prefix}{key}")
    return layer


def _with_present_names(layer: Layer) -> Layer:
    if layer.values.get("fp16") and "mixed_precision" not in layer.values:
        layer = _renamed(layer, "fp16", "mixed_precision", "fp16")
    if "dynamo_backend" in layer.values:
        layer = _renamed(layer, "dynamo_backend", "dynamo_config.dynamo_backend")
    return layer


def _renamed(layer: Layer, old: str, new: str, value: Any = None) -> Layer:
    values, places = copy.deepcopy(layer.values), dict(layer.places)
    if new in places:
        raise ConfigError(
            f"{places[old]}: {old} = {shown(get(values, old))}: is another name of {new} ({places[new]}); keep one"
        )
    stated = drop(values, old)
    put(values, new, stated if value is None else value)
    places[new] = places.pop(old)
    return Layer(values, places, layer.source)


_FILE = "deepspeed_config.deepspeed_config_file"


def _stated_beside_a_file(layer: Layer) -> Iterator[str]:
    """Accelerate stops in front of what a DeepSpeed file states as well."""
    section = layer.values.get("deepspeed_config") or {}
    if section.get("deepspeed_config_file", "none") == "none":
        return
    for name in (
        *("zero_stage", "offload_optimizer_device", "offload_param_device", "offload_optimizer_nvme_path"),
        *("offload_param_nvme_path", "gradient_accumulation_steps", "gradient_clipping", "zero3_save_16bit_model"),
    ):
        if name in section:
            key = f"deepspeed_config.{name}"
            yield (
                f"{layer.places[key]}: {key} = {shown(section[name])}: excludes {_FILE} ({layer.places[_FILE]}), "
                f"which states it; leave one of the two out"
            )


# --- what it means ---------------------------------------------------------------------------------------


def strategy_of_accelerate(layer: Layer) -> Strategy | None:
    """The strategy that a file read by `read_accelerate_file` asks for, where that is more than data parallelism.

    None for all kinds of plain processes (their number decides between `single` and `ddp`), for what shoal does not
    do (`contradictions` tells), and where `deepspeed_file_of` names the file that decides.

    Raises:
        ConfigError: FSDP of version 1, or a ZeRO stage or offload that there is no strategy for.
    """
    kind = layer.values["distributed_type"]
    if kind == "FSDP":
        return _fsdp_strategy(layer)
    section = layer.values.get("deepspeed_config") or {}
    if kind != "DEEPSPEED" or section.get("deepspeed_config_file", "none") != "none":
        return None
    stage = section.get("zero_stage", 2)  # as Accelerate does
    optimizer_on, weights_on = (
        section.get(f"offload_{what}_device", "none").lower() for what in ("optimizer", "param")
    )
    strategy = strategy_with_offload(stage, optimizer_on, weights_on)
    if strategy is None:
        raise ConfigError(
            f"{_stated_or_default(layer, 'deepspeed_config.zero_stage', stage)}: with "
            f"offload_optimizer_device = {optimizer_on} and offload_param_device = {weights_on} there is no such "
            f"strategy; there are {ZERO_STRATEGIES}"
        )
    return strategy


def _fsdp_strategy(layer: Layer) -> Strategy:
    section = layer.values.get("fsdp_config") or {}
    version = section.get("fsdp_version", 1)  # as Accelerate does
    if version != 2:
        raise ConfigError(
            f"{_stated_or_default(layer, 'fsdp_config.fsdp_version', version)}: version 1 loses its optimizer "
            "state on resuming; use fsdp_version: 2, as in accelerate_configs/fsdp2.yaml"
        )
    return Strategy.FSDP2_OFFLOAD if section.get("fsdp_offload_params") else Strategy.FSDP2


def _stated_or_default(layer: Layer, key: str, value: int) -> str:
    """`place: key = value`; what is stated nowhere follows from the kind of processes."""
    if key in layer.places:
        return f"{layer.places[key]}: {key} = {value}"
    return f"{layer.places['distributed_type']}: {key} = {value} (Accelerate's default)"


def deepspeed_file_of(layer: Layer, path: Path) -> Path | None:
    """The DeepSpeed file that an Accelerate file at `path` names; Accelerate looks for it from where the user stands.

    Raises:
        ConfigError: there is no such file.
    """
    stated = (layer.values.get("deepspeed_config") or {}).get("deepspeed_config_file", "none")
    if layer.values["distributed_type"] != "DEEPSPEED" or stated == "none":
        return None
    found = Path(stated)
    if not found.is_file():
        beside = path.parent / stated
        hint = f"; there is {beside}, but Accelerate looks from where you stand" if beside.is_file() else ""
        raise ConfigError(f"{layer.places[_FILE]}: {_FILE} = {shown(stated)}: no such file in {Path.cwd()}{hint}")
    return found


# --- against the plan ------------------------------------------------------------------------------------

_NO_SIZE = "shoal shards over all processes and splits no model or sequence; use parallel.strategy"
_NO_PODS = "a TPU pod cannot be started: torch_xla 2.9 lacks what Accelerate starts one with; shoal uses one host"

_TAKEN: dict[str, tuple[tuple[Any, ...], str]] = {
    "distributed_type": (
        ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED"),
        "shoal knows NO, MULTI_CPU, MULTI_GPU, FSDP and DEEPSPEED; for TPUs use NO, as in accelerate_configs/tpu.yaml: "
        "one process has all devices of a host",
    ),
    "mixed_precision": (("no", "bf16", "fp16"), "shoal trains in fp32, bf16 or fp16; use train.precision"),
    "fsdp_config.fsdp_reshard_after_forward": ((True,), "shoal frees the gathered weights of a block after its use"),
    "fsdp_config.fsdp_auto_wrap_policy": (("TRANSFORMER_BASED_WRAP",), "shoal gathers one transformer block at a time"),
    "fsdp_config.fsdp_activation_checkpointing_offload": ((False,), "shoal computes activations again instead"),
    "fsdp_config.fsdp_ignored_modules": ((), "shoal shards the whole model"),
    "deepspeed_config.deepspeed_moe_layer_cls_names": (
        (),
        "shoal passes it on from a DeepSpeed file only; use zero_optimization.leaf_module there",
    ),
    "parallelism_config.parallelism_config_dp_replicate_size": ((1,), _NO_SIZE),
    "parallelism_config.parallelism_config_dp_shard_size": ((1,), _NO_SIZE),
    "parallelism_config.parallelism_config_tp_size": ((1,), _NO_SIZE),
    "parallelism_config.parallelism_config_cp_size": ((1,), _NO_SIZE),
    "parallelism_config.parallelism_config_sp_size": ((1,), _NO_SIZE),
    "fp8_config": ((), "shoal trains in fp32, bf16 or fp16; use train.precision"),
    "megatron_lm_config": ((), "shoal does not use Megatron-LM; use parallel.strategy"),
    "mpirun_config": ((), "shoal starts its processes without mpirun"),
    "tpu_name": ((), _NO_PODS),
    "tpu_zone": ((), _NO_PODS),
    "tpu_use_cluster": ((False,), _NO_PODS),
    "tpu_use_sudo": ((False,), _NO_PODS),
    "command_file": ((), _NO_PODS),
    "commands": ((), _NO_PODS),
    "tpu_vm": (([""],), _NO_PODS),
    "tpu_env": (([""],), _NO_PODS),
}
"""Keys and sections of which shoal takes these values, or nothing, and what it says of others."""

_NUMBERED = {
    "fsdp_config.fsdp_sharding_strategy": get_args(Sharding),
    "fsdp_config.fsdp_backward_prefetch": get_args(Prefetch),
    "fsdp_config.fsdp_state_dict_type": get_args(StateDict),
}
"""Names that Accelerate also takes by their number."""


def contradictions(layer: Layer, decided: Mapping[str, tuple[Any, str]]) -> list[str]:
    """One line for each value that differs from the plan, or asks for what shoal does not do.

    Args:
        layer: What `read_accelerate_file` read.
        decided: For dotted keys what the plan implies, and the key of the run file that decides it, with its place:
            `{"num_processes": (4, "parallel.devices, run.yaml:7")}`.

    Keys in neither pass: they are about starting the processes, or have no effect on what is computed.
    """
    lines = []
    for key, value in _stated(layer.values):
        problem = _problem(key, value, decided)
        if problem:
            reason, fix = problem
            lines.append(f"{place_of(layer, key)}: {key} = {shown(value)}: {reason}; {fix}")
    return lines


def _stated(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Key by key; a section that shoal does not do as a whole."""
    for name, value in values.items():
        if isinstance(value, dict) and name not in _TAKEN:
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())
        else:
            yield name, value


def _problem(key: str, value: Any, decided: Mapping[str, tuple[Any, str]]) -> tuple[str, str] | None:
    """What is wrong with a value, and what to do about it."""
    if _is_no_opinion(key, value):
        return None
    or_leave_it_out = "" if key == "distributed_type" else ", or leave it out"
    if key in decided:
        needed, cause = decided[key]
        if _same(key, value, needed):
            return None
        return f"the plan decides it: {shown(needed)} ({cause})", f"state the same in both{or_leave_it_out}"
    if key in _TAKEN and not any(_same(key, value, taken) for taken in _TAKEN[key][0]):
        return _TAKEN[key][1], or_leave_it_out.removeprefix(", or ") or "state one of these"
    return None


def _is_no_opinion(key: str, value: Any) -> bool:
    if value in (None, "", [], {}) or value == "auto":
        return True
    return (key == "mixed_precision" and _same(key, value, "no")) or (key == "num_processes" and value == -1)


def _same(key: str, stated: Any, needed: Any) -> bool:
    one, other = _as_accelerate_reads(key, stated), _as_accelerate_reads(key, needed)
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def _as_accelerate_reads(key: str, value: Any) -> Any:
    """Text in any case; numbers and truth as text are what they say; a number may stand for a name."""
    if isinstance(value, str):
        text = value.lower()
        if text in ("true", "false"):
            return text == "true"
        try:
            value = float(text)
        except ValueError:
            return text
    names = _NUMBERED.get(key, ())
    if not isinstance(value, bool) and isinstance(value, int | float) and value in range(1, len(names) + 1):
        return names[int(value) - 1].lower()
    return value


# --- what `accelerate launch` passes on ------------------------------------------------------------------

_FSDP_VARIABLES = {
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "fsdp_config.fsdp_transformer_layer_cls_to_wrap",
    **{
        name.upper(): f"fsdp_config.{name}"
        for name in Fsdp.model_fields
        if name != "fsdp_transformer_layer_cls_to_wrap"
    },
}
_PARALLELISM_VARIABLES = {name.upper(): f"parallelism_config.{name}" for name in Parallelism.model_fields}

VARIABLES: dict[str, str] = {
    "ACCELERATE_MIXED_PRECISION": "mixed_precision",
    "ACCELERATE_USE_CPU": "use_cpu",
    "ACCELERATE_DEBUG_MODE": "debug",
    "ACCELERATE_CPU_AFFINITY": "enable_cpu_affinity",
    "ACCELERATE_DYNAMO_BACKEND": "dynamo_config.dynamo_backend",
    "ACCELERATE_DYNAMO_MODE": "dynamo_config.dynamo_mode",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "dynamo_config.dynamo_use_fullgraph",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "dynamo_config.dynamo_use_dynamic",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "dynamo_config.dynamo_use_regional_compilation",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "deepspeed_config.gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "deepspeed_config.gradient_clipping",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "deepspeed_config.zero_stage",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "deepspeed_config.offload_optimizer_device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "deepspeed_config.offload_param_device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH": "deepspeed_config.offload_optimizer_nvme_path",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": "deepspeed_config.offload_param_nvme_path",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "deepspeed_config.zero3_init_flag",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "deepspeed_config.zero3_save_16bit_model",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": _FILE,
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "deepspeed_config.deepspeed_moe_layer_cls_names",
    "ACCELERATE_USE_MEGATRON_LM": "megatron_lm_config",
    "ACCELERATE_FP8_BACKEND": "fp8_config",
    **_FSDP_VARIABLES,
    **_PARALLELISM_VARIABLES,
}
"""The variables that a worker gets, and the key each comes from."""

UNSTATED: dict[str, Any] = {
    "mixed_precision": "no",
    "use_cpu": False,
    "dynamo_config.dynamo_backend": "no",
    "dynamo_config.dynamo_mode": "default",
    "dynamo_config.dynamo_use_fullgraph": False,
    "dynamo_config.dynamo_use_dynamic": False,
    "dynamo_config.dynamo_use_regional_compilation": False,
    "deepspeed_config.gradient_accumulation_steps": 1,
    "fsdp_config.fsdp_offload_params": False,
    "fsdp_config.fsdp_min_num_params": 100_000_000,
    "fsdp_config.fsdp_sharding_strategy": "FULL_SHARD",
    "fsdp_config.fsdp_reshard_after_forward": True,
    "fsdp_config.fsdp_forward_prefetch": False,
    "fsdp_config.fsdp_use_orig_params": True,
    "fsdp_config.fsdp_cpu_ram_efficient_loading": True,
    "fsdp_config.fsdp_sync_module_states": True,
    "fsdp_config.fsdp_activation_checkpointing": False,
    "fsdp_config.fsdp_activation_checkpointing_offload": False,
    **{
        f"parallelism_config.parallelism_config_{kind}_size": 1
        for kind in ("dp_replicate", "dp_shard", "tp", "cp", "sp")
    },
    "parallelism_config.parallelism_config_cp_backend": "torch",
    "parallelism_config.parallelism_config_cp_comm_strategy": "allgather",
    "parallelism_config.parallelism_config_sp_backend": "deepspeed",
    "parallelism_config.parallelism_config_sp_seq_length_is_variable": True,
    "parallelism_config.parallelism_config_sp_attn_implementation": "sdpa",
}
"""What `accelerate launch` passes on where its user stated nothing."""


def launcher_contradictions(environ: Mapping[str, str], decided: Mapping[str, tuple[Any, str]]) -> list[str]:
    """`contradictions` for a worker that `accelerate launch` started: its configuration comes as variables.

    What Accelerate passes on where nothing was stated is no opinion. The strategy and the number of processes are
    not looked at here (`topology.read_world`).
    """
    lines = []
    for variable, key in VARIABLES.items():
        value = environ.get(variable)
        if value is None or (key in UNSTATED and _same(key, value, UNSTATED[key])):
            continue
        problem = _problem(key, value, decided)
        if problem:
            lines.append(
                f"{variable} = {shown(value)}: {problem[0]}; change {key} in the configuration of `accelerate launch` "
                "(where no --config_file is given, that is accelerate/default_config.yaml in the Hugging Face cache), "
                "or unset the variable"
            )
    return lines
