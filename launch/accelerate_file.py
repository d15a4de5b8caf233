"""A user's own Accelerate YAML: every key at every depth is known and of the right type, and agrees with the plan.

The keys are those of Accelerate 1.15; `tests/test_accelerate_file.py` compares them with the installed one. Accelerate
itself takes any key within a section (`fsdp_verison: 2` trains with version 1).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, BeforeValidator, Field

from launch.config import ABSENT, Section, place_of, refuse_unrecordable, shown, validate
from launch.errors import ConfigError
from launch.source import Layer, read_yaml_1_1_file
from launch.strategy import ZERO_STRATEGIES, Strategy, strategy_with_offload

# --- the keys --------------------------------------------------------------------------------------------


def _quoted(value: Any) -> Any:
    if value is False:
        raise ValueError("an unquoted no is false in YAML; quote it: 'no', or 'NO'")
    return value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


# Accelerate does not mind the case of most words.
Lower, Upper, Quoted = BeforeValidator(_lower), BeforeValidator(_upper), BeforeValidator(_quoted)

# A number is the place of the name in its list, counted from 1.
Sharding = Literal["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2"]
Prefetch = Literal["BACKWARD_PRE", "BACKWARD_POST", "NO_PREFETCH"]
StateDict = Literal["FULL_STATE_DICT", "LOCAL_STATE_DICT", "SHARDED_STATE_DICT"]

Backend = Literal[
    "NO",
    "EAGER",
    "AOT_EAGER",
    "INDUCTOR",
    "AOT_TS_NVFUSER",
    "NVPRIMS_NVFUSER",
    "CUDAGRAPHS",
    "OFI",
    "FX2TRT",
    "ONNXRT",
    "TENSORRT",
    "AOT_TORCHXLA_TRACE_ONCE",
    "TORCHXLA_TRACE_ONCE",
    "TVM",
    "HPU_BACKEND",
    "NEURON",
]
Distributed = Literal[
    "NO",
    "MULTI_CPU",
    "MULTI_GPU",
    "MULTI_NPU",
    "MULTI_MLU",
    "MULTI_SDAA",
    "MULTI_MUSA",
    "MULTI_XPU",
    "MULTI_HPU",
    "MULTI_NEURON",
    "DEEPSPEED",
    "FSDP",
    "XLA",
    "MEGATRON_LM",
]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


class Fsdp(Section):
    """`fsdp_config`; the prefix may be left out."""

    fsdp_version: Annotated[int, Field(ge=1, le=2)] = ABSENT
    fsdp_offload_params: bool = ABSENT
    fsdp_min_num_params: Count = ABSENT
    fsdp_sharding_strategy: Annotated[Sharding, Upper] | Annotated[int, Field(ge=1, le=5)] = ABSENT
    fsdp_reshard_after_forward: bool | Annotated[Sharding, Upper] = ABSENT
    fsdp_auto_wrap_policy: Annotated[Literal["TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP", "NO_WRAP"], Upper] = ABSENT
    fsdp_transformer_layer_cls_to_wrap: str = ABSENT
    fsdp_backward_prefetch: Annotated[Prefetch, Upper] | Annotated[int, Field(ge=1, le=2)] = ABSENT
    fsdp_state_dict_type: Annotated[StateDict, Upper] | Annotated[int, Field(ge=1, le=3)] = ABSENT
    fsdp_forward_prefetch: bool = ABSENT
    fsdp_use_orig_params: bool = ABSENT
    fsdp_cpu_ram_efficient_loading: bool = ABSENT
    fsdp_sync_module_states: bool = ABSENT
    fsdp_activation_checkpointing: bool = ABSENT
    fsdp_activation_checkpointing_offload: bool = ABSENT
    fsdp_ignored_modules: str = ABSENT


class DeepSpeed(Section):
    """`deepspeed_config`."""

    deepspeed_config_file: str = ABSENT
    zero_stage: Annotated[int, Field(ge=0, le=3)] = ABSENT
    offload_optimizer_device: Annotated[Literal["none", "cpu", "nvme"], Lower] = ABSENT
    offload_param_device: Annotated[Literal["none", "cpu", "nvme"], Lower] = ABSENT
    offload_optimizer_nvme_path: str = ABSENT
    offload_param_nvme_path: str = ABSENT
    gradient_accumulation_steps: Literal["auto"] | Positive = ABSENT
    gradient_clipping: Literal["auto"] | Annotated[float, Field(ge=0)] = ABSENT
    zero3_init_flag: bool = ABSENT
    zero3_save_16bit_model: bool = ABSENT
    deepspeed_hostfile: str = ABSENT
    deepspeed_exclusion_filter: str = ABSENT
    deepspeed_inclusion_filter: str = ABSENT
    deepspeed_multinode_launcher: Literal["pdsh", "standard", "openmpi", "mvapich", "mpich", "nossh", "slurm"] = ABSENT
    deepspeed_moe_layer_cls_names: str = ABSENT


class Dynamo(Section):
    """`dynamo_config`; the prefix may be left out."""

    dynamo_backend: Annotated[Backend, Upper, Quoted] = ABSENT
    dynamo_mode: Literal["default", "reduce-overhead", "max-autotune"] = ABSENT
    dynamo_use_fullgraph: bool = ABSENT
    dynamo_use_dynamic: bool = ABSENT
    dynamo_use_regional_compilation: bool = ABSENT


class Parallelism(Section):
    """`parallelism_config`."""

    parallelism_config_dp_replicate_size: Positive = ABSENT
    parallelism_config_dp_shard_size: Positive = ABSENT
    parallelism_config_tp_size: Positive = ABSENT
    parallelism_config_cp_size: Positive = ABSENT
    parallelism_config_cp_backend: Literal["torch"] = ABSENT
    parallelism_config_cp_comm_strategy: Literal["allgather", "alltoall"] = ABSENT
    parallelism_config_sp_size: Positive = ABSENT
    parallelism_config_sp_backend: Literal["deepspeed"] = ABSENT
    parallelism_config_sp_seq_length: Positive = ABSENT
    parallelism_config_sp_seq_length_is_variable: bool = ABSENT
    parallelism_config_sp_attn_implementation: str = ABSENT


class Fp8(Section):
    """`fp8_config`; the prefix may be left out. The last three are what `accelerate config` writes."""

    fp8_backend: Annotated[Literal["NO", "AO", "TE", "MSAMP"], Upper] = ABSENT
    fp8_use_autocast_during_eval: bool = ABSENT
    fp8_margin: int = ABSENT
    fp8_interval: Positive = ABSENT
    fp8_format: Annotated[Literal["HYBRID", "E4M3", "E5M2"], Upper] = ABSENT
    fp8_amax_history_len: Positive = ABSENT
    fp8_amax_compute_algo: Literal["max", "most_recent"] = ABSENT
    fp8_override_linear_precision: list[bool] = ABSENT
    fp8_opt_level: Literal["O1", "O2"] = ABSENT
    fp8_enable_fsdp_float8_all_gather: bool = ABSENT
    fp8_pad_inner_dim: bool = ABSENT
    fp8_amax_history_length: Positive = ABSENT
    fp8_amax_compute_algorithm: Literal["max", "most_recent"] = ABSENT
    fp8_optimization_level: Literal["O1", "O2"] = ABSENT


class MegatronLm(Section):
    """`megatron_lm_config`."""

    megatron_lm_tp_degree: Positive = ABSENT
    megatron_lm_use_custom_fsdp: bool = ABSENT
    megatron_lm_no_load_optim: bool = ABSENT
    megatron_lm_eod_mask_loss: bool = ABSENT
    megatron_lm_overlap_cpu_optimizer_d2h_h2d: bool = ABSENT
    megatron_lm_no_save_optim: bool = ABSENT
    megatron_lm_optimizer_cpu_offload: bool = ABSENT
    megatron_lm_use_precision_aware_optimizer: bool = ABSENT
    megatron_lm_decoder_last_pipeline_num_layers: Positive = ABSENT
    megatron_lm_pp_degree: Positive = ABSENT
    megatron_lm_num_micro_batches: Positive = ABSENT
    megatron_lm_sequence_parallelism: bool = ABSENT
    megatron_lm_recompute_activations: bool = ABSENT
    megatron_lm_use_distributed_optimizer: bool = ABSENT
    megatron_lm_gradient_clipping: float = ABSENT
    megatron_lm_recompute_granularity: Literal["full", "selective"] = ABSENT
    megatron_lm_recompute_method: Literal["uniform", "block"] = ABSENT
    megatron_lm_recompute_num_layers: Positive = ABSENT
    megatron_lm_attention_backend: bool = ABSENT
    megatron_lm_expert_model_parallel_size: Positive = ABSENT
    megatron_lm_context_parallel_size: Positive = ABSENT
    megatron_lm_attention_dropout: float = ABSENT
    megatron_lm_hidden_dropout: float = ABSENT
    megatron_lm_attention_softmax_in_fp32: bool = ABSENT
    megatron_lm_expert_tensor_parallel_size: Positive = ABSENT
    megatron_lm_calculate_per_token_loss: bool = ABSENT
    megatron_lm_use_rotary_position_embeddings: bool = ABSENT


class Mpirun(Section):
    """`mpirun_config`."""

    mpirun_hostfile: str = ABSENT


class AccelerateFile(Section):
    """Every key of an Accelerate configuration for machines of one's own."""

    file: ClassVar[str] = "an Accelerate file"

    compute_environment: Literal["LOCAL_MACHINE"] = ABSENT
    distributed_type: Annotated[Distributed, Quoted]
    mixed_precision: Annotated[Literal["no", "fp16", "bf16", "fp8"], Lower, Quoted] | None = None
    use_cpu: bool = ABSENT
    debug: bool = ABSENT
    num_processes: Annotated[int, Field(ge=-1)] = ABSENT
    machine_rank: Count = ABSENT
    num_machines: Positive = ABSENT
    gpu_ids: str | None = None
    main_process_ip: str | None = None
    main_process_port: Count | None = None
    rdzv_backend: str | None = None
    same_network: bool | None = None
    main_training_function: str = ABSENT
    enable_cpu_affinity: bool = ABSENT
    downcast_bf16: bool | Literal["no", "yes"] = ABSENT
    fsdp_config: Fsdp | None = None
    deepspeed_config: DeepSpeed | None = None
    dynamo_config: Dynamo | None = None
    parallelism_config: Parallelism | None = None
    fp8_config: Fp8 | None = None
    megatron_lm_config: MegatronLm | None = None
    mpirun_config: Mpirun | None = None
    tpu_name: str | None = None
    tpu_zone: str | None = None
    tpu_use_cluster: bool = ABSENT
    tpu_use_sudo: bool = ABSENT
    command_file: str | None = None
    commands: list[str] | None = None
    tpu_vm: list[str] | None = None
    tpu_env: list[str] | None = None
    fp16: bool = ABSENT
    dynamo_backend: Annotated[Backend, Upper, Quoted] = ABSENT


# --- reading ---------------------------------------------------------------------------------------------

_PREFIXED: dict[str, tuple[str, type[BaseModel]]] = {
    "fsdp_config": ("fsdp_", Fsdp),
    "dynamo_config": ("dynamo_", Dynamo),
    "fp8_config": ("fp8_", Fp8),
}
"""Sections in which Accelerate supplies the prefix of a key."""


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
    for name, (prefix, section) in _PREFIXED.items():
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
            f"{places[old]}: {old} = {shown(_get(values, old))}: is another name of {new} ({places[new]}); keep one"
        )
    *sections, name = old.split(".")
    within = values
    for section in sections:
        within = within[section]
    stated = within.pop(name)
    *sections, name = new.split(".")
    within = values
    for section in sections:
        within[section] = within = within.get(section) or {}
    within[name] = stated if value is None else value
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
_NO_PODS = "shoal starts no TPU pods"

_TAKEN: dict[str, tuple[tuple[Any, ...], str]] = {
    "distributed_type": (
        ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP", "DEEPSPEED"),
        "shoal knows NO, MULTI_CPU, MULTI_GPU, FSDP and DEEPSPEED; use one of them",
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
            lines.append(f"{_place(layer, key)}: {key} = {shown(value)}: {reason}; {fix}")
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
    if key in decided:
        needed, cause = decided[key]
        if _same(key, value, needed):
            return None
        return f"the plan decides it: {shown(needed)} ({cause})", "state the same in both, or leave it out"
    if key in _TAKEN and not any(_same(key, value, taken) for taken in _TAKEN[key][0]):
        return _TAKEN[key][1], "leave it out"
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
                "(where no --config_file is given, that is accelerate/default_config.yaml in the Hugging Face cache)"
            )
    return lines


def _place(layer: Layer, key: str) -> str:
    return place_of(layer, tuple(key.split(".")))


def _get(values: Any, key: str) -> Any:
    for name in key.split("."):
        values = values[name]
    return values
