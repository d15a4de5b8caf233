"""A user's own DeepSpeed JSON: every key at every depth is known and of the right type, and agrees with the plan.

The keys are those of DeepSpeed 0.19 (https://www.deepspeed.ai/docs/config-json/); `tests/test_deepspeed_file.py`
compares them with the installed one. DeepSpeed itself ignores most keys it does not know.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, JsonValue

from launch.config import ABSENT, Section, place_of, refuse_unrecordable, shown, validate
from launch.errors import ConfigError
from launch.source import Layer, read_json_file
from launch.strategy import ZERO_STRATEGIES, Strategy, strategy_with_offload

# --- the keys --------------------------------------------------------------------------------------------


def _whole(value: Any) -> Any:
    """`5e8`, which everyone writes and JSON calls no whole number, is one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _lower(value: Any) -> Any:
    """DeepSpeed does not mind the case of these words."""
    return value.lower() if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    """One text is a list of one."""
    return [value] if isinstance(value, str) else value


def _removed(_: Any) -> Any:
    raise ValueError("no longer exists in DeepSpeed, which refuses to start with it; leave it out")


AUTO = "auto"

# Whoever reads these takes "auto" for "not stated" (DeepSpeedConfigModel and the integrations of Hugging Face do).
Auto = Literal["auto"]
Flag = Auto | bool
Count = Auto | Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Positive = Auto | Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Whole = Auto | Annotated[int, BeforeValidator(_whole)]
Number = Auto | Annotated[float, Field(ge=0)]
Share = Auto | Annotated[float, Field(ge=0, le=1)]
Stage = Auto | Annotated[int, Field(ge=0, le=3)]
OffloadDevice = Literal["none", "cpu", "nvme", "auto"]

# Where a plain dictionary is asked for the value, "auto" would be taken for it.
ExactCount = Annotated[int, Field(ge=0)]
NumberFormat = (
    Literal["fp32", "float32", "float", "torch.float32", "fp16", "float16", "half", "torch.float16"]
    | Literal["bf16", "bfloat16", "torch.bfloat16", "int8", "torch.int8"]
)
Communicated = Annotated[Literal["fp32", "fp16", "bf16"], BeforeValidator(_lower)] | None
Names = Annotated[list[str], BeforeValidator(_listed)]
FreeForm = dict[str, JsonValue]
Removed = Annotated[Any, BeforeValidator(_removed)]


class OffloadedWeights(Section):
    """`zero_optimization.offload_param`."""

    device: OffloadDevice = ABSENT
    nvme_path: str | None = None
    buffer_count: Count = ABSENT
    buffer_size: Count = ABSENT
    max_in_cpu: Count = ABSENT
    pin_memory: Flag = ABSENT


class OffloadedOptimizer(Section):
    """`zero_optimization.offload_optimizer`."""

    device: OffloadDevice = ABSENT
    nvme_path: str | None = None
    buffer_count: Count = ABSENT
    pin_memory: Flag = ABSENT
    pipeline_read: Flag = ABSENT
    pipeline_write: Flag = ABSENT
    fast_init: Flag = ABSENT
    ratio: Share = ABSENT
    super_offload: Flag = ABSENT
    cpuadam_cores_perc: Share = ABSENT


class ZenFlow(Section):
    """`zero_optimization.zenflow`."""

    topk_ratio: Auto | Annotated[float, Field(gt=0, lt=1)] = ABSENT
    select_strategy: Literal["auto", "step", "epoch"] = ABSENT
    select_interval: Whole = ABSENT
    update_interval: Positive = ABSENT
    overlap_step: Flag = ABSENT
    offload: Flag = ABSENT
    auto_ratio: Share = ABSENT
    full_warm_up_rounds: Count = ABSENT
    pt_reserved_cores_perc: Share = ABSENT
    steps_per_epoch: Whole | None = None


class LeafModules(Section):
    """`zero_optimization.leaf_module`."""

    classes: Names = ABSENT
    names: Names = ABSENT
    name_suffixes: Names = ABSENT


class ZeroOptimization(Section):
    """`zero_optimization`; the short names, and those called deprecated, mean the same as others."""

    stage: Stage = ABSENT
    contiguous_gradients: Flag = ABSENT
    reduce_scatter: Flag = ABSENT
    reduce_bucket_size: Positive = ABSENT
    use_multi_rank_bucket_allreduce: Flag = ABSENT
    allgather_partitions: Flag = ABSENT
    allgather_bucket_size: Count = ABSENT
    overlap_comm: Flag | None = None
    compute_grad_norm: Flag = ABSENT
    load_from_fp32_weights: Flag = ABSENT
    elastic_checkpoint: Flag = ABSENT
    offload_param: OffloadedWeights | None = None
    offload_optimizer: OffloadedOptimizer | None = None
    zenflow: ZenFlow | None = None
    sub_group_size: Count = ABSENT
    cpu_offload_param: Flag | None = None
    cpu_offload_use_pin_memory: Flag | None = None
    cpu_offload: Flag | None = None
    stage3_prefetch_bucket_size: Count = ABSENT
    prefetch_bucket_size: Count = ABSENT
    stage3_param_persistence_threshold: Count = ABSENT
    param_persistence_threshold: Count = ABSENT
    stage3_model_persistence_threshold: Count = ABSENT
    model_persistence_threshold: Count = ABSENT
    stage3_max_live_parameters: Count = ABSENT
    max_live_parameters: Count = ABSENT
    stage3_max_reuse_distance: Count = ABSENT
    max_reuse_distance: Count = ABSENT
    stage3_gather_16bit_weights_on_model_save: Flag = ABSENT
    gather_16bit_weights_on_model_save: Flag = ABSENT
    stage3_gather_fp16_weights_on_model_save: Flag = ABSENT
    stage3_module_granularity_threshold: Whole = ABSENT
    module_granularity_threshold: Whole = ABSENT
    stage3_use_all_reduce_for_fetch_params: Flag = ABSENT
    use_all_reduce_for_fetch_params: Flag = ABSENT
    stage3_allgather_sequential: Flag = ABSENT
    allgather_sequential: Flag = ABSENT
    ignore_unused_parameters: Flag = ABSENT
    legacy_stage1: Flag = ABSENT
    round_robin_gradients: Flag = ABSENT
    parameter_alignment: Flag = ABSENT
    zero_hpz_partition_size: Count = ABSENT
    zero_quantized_weights: Flag = ABSENT
    zero_quantized_nontrainable_weights: Flag = ABSENT
    zero_quantized_gradients: Flag = ABSENT
    memory_efficient_linear: Flag = ABSENT
    pipeline_loading_checkpoint: Flag = ABSENT
    override_module_apply: Flag = ABSENT
    log_trace_cache_warnings: Flag = ABSENT
    enable_sanity_checks: Flag = ABSENT
    save_muon_momentum_buffer_in_memory: Flag = ABSENT
    leaf_module: LeafModules | None = None
    mics_shard_size: Removed = None
    mics_hierarchical_params_gather: Removed = None
    zeropp_loco_param: Removed = None


class Fp16(Section):
    """`fp16`."""

    enabled: Flag = ABSENT
    auto_cast: Flag = ABSENT
    loss_scale: Number = ABSENT
    initial_scale_power: Whole = ABSENT
    loss_scale_window: Whole = ABSENT
    hysteresis: Whole = ABSENT
    consecutive_hysteresis: Flag = ABSENT
    min_loss_scale: Whole = ABSENT
    fp16_master_weights_and_grads: Flag = ABSENT


class Bf16(Section):
    """`bf16`, once called `bfloat16`."""

    enabled: Flag = ABSENT
    immediate_grad_update: Flag = ABSENT
    check_grad_overflow: Flag = ABSENT
    bf16_master_weights_and_grads: Flag = ABSENT
    bf16_optimizer_states: Flag = ABSENT


class TorchAutocast(Section):
    """`torch_autocast`."""

    enabled: bool = ABSENT
    dtype: NumberFormat = ABSENT
    lower_precision_safe_modules: list[str] = ABSENT


class DataTypes(Section):
    """`data_types`."""

    grad_accum_dtype: NumberFormat | None = None
    param_dtype: NumberFormat | None = None
    buffer_dtype: NumberFormat | None = None
    keep_in_fp32_modules: Auto | list[str] = ABSENT


class ActivationCheckpointing(Section):
    """`activation_checkpointing`."""

    partition_activations: bool = ABSENT
    number_checkpoints: ExactCount | None = None
    contiguous_memory_optimization: bool = ABSENT
    synchronize_checkpoint_boundary: bool = ABSENT
    profile: bool = ABSENT
    cpu_checkpointing: bool = ABSENT


class CommsLogger(Section):
    """`comms_logger`."""

    enabled: Flag = ABSENT
    prof_all: Flag = ABSENT
    prof_ops: list[str] = ABSENT
    verbose: Flag = ABSENT
    debug: Flag = ABSENT


class TensorBoard(Section):
    """`tensorboard`, and `csv_monitor`."""

    enabled: Flag = ABSENT
    output_path: str = ABSENT
    job_name: str = ABSENT


class Wandb(Section):
    """`wandb`."""

    enabled: Flag = ABSENT
    group: str | None = None
    team: str | None = None
    project: str = ABSENT


class Comet(Section):
    """`comet`."""

    enabled: Flag = ABSENT
    samples_log_interval: Whole = ABSENT
    project: str | None = None
    workspace: str | None = None
    api_key: str | None = None
    experiment_name: str | None = None
    experiment_key: str | None = None
    online: Flag | None = None
    mode: str | None = None


class FlopsProfiler(Section):
    """`flops_profiler`."""

    enabled: bool = ABSENT
    recompute_fwd_factor: float = ABSENT
    profile_step: ExactCount = ABSENT
    module_depth: int = ABSENT
    top_modules: ExactCount = ABSENT
    detailed: bool = ABSENT
    output_file: str | None = None


class AsynchronousIo(Section):
    """`aio`."""

    block_size: ExactCount = ABSENT
    queue_depth: ExactCount = ABSENT
    intra_op_parallelism: ExactCount = ABSENT
    single_submit: bool = ABSENT
    overlap_events: bool = ABSENT
    use_gds: bool = ABSENT


class CheckpointWriter(Section):
    """`checkpoint.writer`."""

    type: Annotated[Literal["mock", "python", "fast"], BeforeValidator(_lower)] | None = None
    io_buffer_size: Annotated[int, BeforeValidator(_whole), Field(ge=0)] = ABSENT
    io_buffer_double: bool = ABSENT
    show_statistics: bool = ABSENT
    data_parallel: Annotated[Literal["replica", "socket", "machine"], BeforeValidator(_lower)] | None = None
    decoupled: bool = ABSENT
    io_multiplier: ExactCount = ABSENT


class ParallelWrite(Section):
    """`checkpoint.parallel_write`."""

    pipeline_stage: bool = ABSENT


class Checkpoint(Section):
    """`checkpoint`."""

    tag_validation: Annotated[Literal["warn", "ignore", "fail"], BeforeValidator(_lower)] = ABSENT
    load_universal: bool = ABSENT
    use_node_local_storage: bool = ABSENT
    parallel_write: ParallelWrite = ABSENT
    checkpoint_serialization: bool = ABSENT
    writer: CheckpointWriter | None = None


class Compile(Section):
    """`compile`."""

    deepcompile: Flag = ABSENT
    autoep_non_moe: Flag = ABSENT
    free_activation: Flag = ABSENT
    free_activation_threshold: Count = ABSENT
    offload_activation: Flag = ABSENT
    offload_activation_pin_memory: Flag = ABSENT
    offload_opt_states: Flag = ABSENT
    double_buffer: Flag = ABSENT
    symmetric_memory: Flag = ABSENT
    debug_log: Flag = ABSENT
    offload_parameters: Flag = ABSENT
    sync_before_reduce: Flag = ABSENT
    sync_after_reduce: Flag = ABSENT
    sync_before_allgather: Flag = ABSENT
    sync_after_allgather: Flag = ABSENT
    keep_int_input_tensors: Flag = ABSENT
    keep_all_input_tensors: Flag = ABSENT
    passes: list[Literal["z1", "z3", "autosp", "autotp"]] | None = None


class ThroughputTimer(Section):
    """`timers.throughput`."""

    enabled: Flag = ABSENT
    synchronized: Flag = ABSENT


class Timers(Section):
    """`timers`."""

    throughput: ThroughputTimer = ABSENT


# What follows is known, so that a typo in it is told, and then refused by `complete`.


class Optimizer(Section):
    """`optimizer`; the parameters are those of the optimizer's class."""

    type: str = ABSENT
    params: FreeForm = ABSENT
    legacy_fusion: bool = ABSENT


class Scheduler(Section):
    """`scheduler`; the parameters are those of the scheduler's class."""

    type: str | None = None
    params: FreeForm = ABSENT


class DataEfficiency(Section):
    """`data_efficiency`."""

    enabled: bool = ABSENT
    seed: int = ABSENT
    data_sampling: FreeForm = ABSENT
    data_routing: FreeForm = ABSENT


class ModelInfo(Section):
    """`autotuning.model_info`."""

    profile: bool = ABSENT
    num_params: Count | None = None
    hidden_size: Count | None = None
    num_layers: Count | None = None


class Autotuning(Section):
    """`autotuning`."""

    enabled: bool = ABSENT
    fast: bool = ABSENT
    results_dir: str = ABSENT
    exps_dir: str = ABSENT
    overwrite: bool = ABSENT
    start_profile_step: ExactCount = ABSENT
    end_profile_step: ExactCount = ABSENT
    metric: str = ABSENT
    metric_path: str | None = None
    tuner_type: Literal["gridsearch", "random", "model_based"] = ABSENT
    tuner_early_stopping: ExactCount = ABSENT
    tuner_num_trials: ExactCount = ABSENT
    arg_mappings: FreeForm | None = None
    model_info: ModelInfo | None = None
    model_info_path: str | None = None
    mp_size: ExactCount = ABSENT
    max_train_batch_size: ExactCount | None = None
    min_train_batch_size: ExactCount = ABSENT
    max_train_micro_batch_size_per_gpu: ExactCount = ABSENT
    min_train_micro_batch_size_per_gpu: ExactCount = ABSENT
    num_tuning_micro_batch_sizes: ExactCount = ABSENT


class HybridEngine(Section):
    """`hybrid_engine`."""

    enabled: Flag = ABSENT
    max_out_tokens: Positive = ABSENT
    inference_tp_size: Whole = ABSENT
    release_inference_cache: Flag = ABSENT
    pin_parameters: Flag = ABSENT
    tp_gather_partition_size: Whole = ABSENT
    enable_cuda_graph: Flag = ABSENT


class TensorParallelSplit(Section):
    """`tensor_parallel.tensor_parallel`, also called `tp`."""

    tp_size: Whole = ABSENT
    tp_grain_size: Whole = ABSENT
    mpu: JsonValue = None
    tp_group: JsonValue = None


class TensorParallel(Section):
    """`tensor_parallel`."""

    dtype: NumberFormat = ABSENT
    autotp_size: Whole = ABSENT
    tp_overlap_comm: Flag = ABSENT
    vocab_parallel_lm_head: Flag | None = None
    vocab_parallel_ce_backend: Literal["torch", "liger"] = ABSENT
    tensor_parallel: TensorParallelSplit = ABSENT
    tp: TensorParallelSplit = ABSENT
    injection_policy_tuple: list[JsonValue] | None = None
    partition_config: FreeForm | None = None
    preset_model: str | None = None
    keep_module_on_host: Flag = ABSENT
    replace_with_kernel_inject: Flag = ABSENT
    kernel_inject: Flag = ABSENT


class ExpertParallel(Section):
    """`expert_parallel`."""

    enabled: bool = ABSENT
    autoep_size: ExactCount = ABSENT
    expert_tensor_parallel_size: ExactCount = ABSENT
    validate_folding_routing: bool = ABSENT
    async_split_plan: bool = ABSENT
    preset_model: str | None = None
    moe_layer_pattern: str | None = None
    expert_pattern: str | None = None
    router_pattern: str | None = None
    use_grouped_mm: bool = ABSENT
    disable_triton_grouped_mm: bool = ABSENT
    route_norm: bool | None = None
    route_scale: float = ABSENT
    score_apply: Literal["auto", "pre", "post"] = ABSENT
    combine_impl: Literal["auto", "weighted_sum", "fused_weighted_sum", "legacy_bmm"] = ABSENT
    row_weighting_impl: Literal["auto", "eager", "fused"] = ABSENT
    gate_up_impl: Literal["separate", "fused"] = ABSENT
    comm_backend: Literal["comm", "deepep"] = ABSENT
    comm_num_sm: ExactCount = ABSENT
    comm_qp_margin: ExactCount = ABSENT
    comm_max_tokens_per_rank: ExactCount = ABSENT
    num_expert_groups: ExactCount | None = None
    num_limited_groups: ExactCount | None = None
    score_func: Literal["auto", "softmax", "sigmoid"] = ABSENT
    top_k: Auto | ExactCount = ABSENT
    load_balance_coeff: float | None = None
    routed_scaling_factor: Auto | float = ABSENT
    expert_w1: str | None = None
    expert_w2: str | None = None
    expert_w3: str | None = None
    num_experts_attr: str | None = None
    top_k_attr: str | None = None
    has_shared_experts: bool | None = None
    shared_experts_pattern: str | None = None
    shared_experts_gate_pattern: str | None = None
    expert_activation: str | None = None


class WeightQuantization(Section):
    """`weight_quantization`."""

    enabled: Flag = ABSENT
    num_bits: Whole = ABSENT
    q_type: Literal["asymmetric", "symmetric"] = ABSENT
    q_groups: Whole = ABSENT
    quantized_initialization: FreeForm = ABSENT
    post_init_quant: FreeForm = ABSENT


class DeepSpeedFile(Section):
    """Every key of a DeepSpeed configuration."""

    file: ClassVar[str] = "a DeepSpeed file"

    train_batch_size: Auto | Annotated[int, Field(ge=1)] = ABSENT
    train_micro_batch_size_per_gpu: Auto | Annotated[int, Field(ge=1)] = ABSENT
    gradient_accumulation_steps: Auto | Annotated[int, Field(ge=1)] = ABSENT
    managed_gradient_accumulation: bool = ABSENT
    gradient_clipping: Number = ABSENT
    zero_optimization: ZeroOptimization = ABSENT
    fp16: Fp16 = ABSENT
    bf16: Bf16 = ABSENT
    bfloat16: Bf16 = ABSENT
    torch_autocast: TorchAutocast = ABSENT
    data_types: DataTypes = ABSENT
    communication_data_type: Communicated = None
    seq_parallel_communication_data_type: Communicated = None
    prescale_gradients: bool = ABSENT
    gradient_predivide_factor: float = ABSENT
    gradient_allreduce_op: Annotated[Literal["mean", "sum"], BeforeValidator(_lower)] = ABSENT
    disable_allgather: bool = ABSENT
    zero_allow_untested_optimizer: bool = ABSENT
    zero_force_ds_cpu_optimizer: bool = ABSENT
    steps_per_print: Annotated[int, BeforeValidator(_whole), Field(ge=1)] | None = None
    wall_clock_breakdown: bool = ABSENT
    memory_breakdown: bool = ABSENT
    dump_state: bool = ABSENT
    disable_python_gc: bool = ABSENT
    vocabulary_size: ExactCount | None = None
    log_level: Literal["debug", "info", "warning", "error", "critical"] | None = None
    activation_checkpointing: ActivationCheckpointing = ABSENT
    comms_logger: CommsLogger = ABSENT
    tensorboard: TensorBoard = ABSENT
    csv_monitor: TensorBoard = ABSENT
    comet: Comet = ABSENT
    flops_profiler: FlopsProfiler = ABSENT
    timers: Timers = ABSENT
    aio: AsynchronousIo | None = None
    checkpoint: Checkpoint | None = None
    compile: Compile = ABSENT
    use_data_before_expert_parallelism: bool = ABSENT
    dataloader_drop_last: bool = ABSENT
    wandb: Wandb = ABSENT
    optimizer: Optimizer = ABSENT
    scheduler: Scheduler = ABSENT
    pipeline: FreeForm = ABSENT
    data_efficiency: DataEfficiency = ABSENT
    autotuning: Autotuning = ABSENT
    hybrid_engine: HybridEngine = ABSENT
    tensor_parallel: TensorParallel = ABSENT
    expert_parallel: ExpertParallel = ABSENT
    sequence_parallel_size: ExactCount = ABSENT
    data_parallel_size: ExactCount = ABSENT
    weight_quantization: WeightQuantization = ABSENT
    datastates_ckpt: Literal[False] | FreeForm = ABSENT
    nebula: Removed = None
    compression_training: Removed = None
    amp: Removed = None
    quantize_training: Removed = None
    sparse_gradients: Removed = None
    eigenvalue: Removed = None
    sparse_attention: Removed = None
    elasticity: Removed = None
    graph_harvesting: Removed = None
    curriculum_learning: Removed = None
    progressive_layer_drop: Removed = None


# --- reading ---------------------------------------------------------------------------------------------

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
        value = _get(values, name)
        if value is _NOTHING:
            continue
        if _get(values, right) is not _NOTHING:
            problems.append(
                f"{places[name]}: {name} = {shown(value)}: is another name of {right} ({places[right]}); keep one"
            )
            continue
        _drop(values, name)
        for key in [key for key in places if f"{key}.".startswith(f"{name}.")]:
            places[right + key.removeprefix(name)] = places.pop(key)
        _put(values, right, _device_of(value) if right.startswith(f"{_ZERO}.offload_") else value)
    if problems:
        raise ConfigError("\n".join(problems))
    for section in (f"{_ZERO}.offload_optimizer", f"{_ZERO}.offload_param"):
        if _get(values, section) is None:
            _put(values, section, {"device": "none"})
    return Layer(values, places, layer.source)


def _device_of(cpu_offload: Any) -> dict[str, str]:
    return {"device": {True: "cpu", AUTO: AUTO}.get(cpu_offload, "none")}


# --- what it means ---------------------------------------------------------------------------------------


def strategy_of_deepspeed(layer: Layer) -> Strategy | None:
    """The strategy that a file read by `read_deepspeed_file` asks for; None where it states no stage, or "auto".

    Raises:
        ConfigError: there is no such strategy.
    """
    stage = _get(layer.values, _STAGE)
    if stage in (_NOTHING, AUTO):
        return None
    devices = [_get(layer.values, key) for key in (_OPTIMIZER_ON, _WEIGHTS_ON)]
    optimizer_on, weights_on = ("none" if device in (_NOTHING, AUTO) else str(device) for device in devices)
    strategy = strategy_with_offload(stage, optimizer_on, weights_on)
    if strategy is None:
        raise ConfigError(
            f"{_place(layer, _STAGE)}: {_STAGE} = {stage}: with offload_optimizer.device = {optimizer_on} and "
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

_FREE = {
    "steps_per_print",
    _GATHER,
    *(f"fp16.{name}" for name in ("loss_scale", "initial_scale_power", "hysteresis", "min_loss_scale")),
}
"""What `render.deepspeed_config` states, but a file may state otherwise: no number of a run depends on it."""


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
    for key, value in _leaves(layer.values):
        if any(f"{key}.".startswith(f"{refused}.") for refused in _REFUSED):
            continue  # told above, or switched off
        needed, reason, fix = _decision(decided, because, key)
        if key in _FREE and value != AUTO:
            needed = _NOTHING
        if needed is _NOTHING and value != AUTO:
            _put(result, key, value)
        elif needed is not _NOTHING and (value == AUTO or _same(value, needed)):
            _put(result, key, needed)
        elif needed is not _NOTHING:
            problems.append(f"{_place(layer, key)}: {key} = {shown(value)}: {reason}; {fix}")
    if problems:
        raise ConfigError("\n".join(problems))
    return result


def _refusals(layer: Layer) -> Iterator[str]:
    for key, instead in _REFUSED.items():
        value = _get(layer.values, key)
        if not _is_off(value):
            yield f"{_place(layer, key)}: {key} = {shown(value)}: {instead}; leave {key} out"


def _is_off(value: Any) -> bool:
    if isinstance(value, dict):
        return value.get("enabled") is False or not value
    return value is _NOTHING or value is None or value is False or value == 1


def _decision(decided: dict[str, Any], because: Mapping[str, str], key: str) -> tuple[Any, str, str]:
    """What the value of a key must be (`_NOTHING`: the file's own affair), why, and what to do about another."""
    needed = _get(decided, key)
    if needed is _NOTHING and key in _ALWAYS:
        needed, why = _ALWAYS[key]
        return needed, f"must be {shown(needed)}, because {why}", "leave it out"
    cause = because.get(key)
    if key in (_OPTIMIZER_ON, _WEIGHTS_ON):
        needed = "none" if needed is _NOTHING else needed
        cause = cause or because.get(_STAGE)
    if cause:
        return needed, f"the run file decides it: {shown(needed)} ({cause})", 'state the same in both, or write "auto"'
    return needed, f"shoal decides it: {shown(needed)}", "leave it out"


def _same(stated: Any, needed: Any) -> bool:
    """1 and 1.0 are the same, 1 and true are not."""
    return bool(stated == needed) and isinstance(stated, bool) == isinstance(needed, bool)


# --- nested values by dotted key -------------------------------------------------------------------------

_NOTHING = object()
"""The value of a key that is not there."""


def _place(layer: Layer, key: str) -> str:
    return place_of(layer, tuple(key.split(".")))


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _get(values: Any, key: str) -> Any:
    for name in key.split("."):
        if not isinstance(values, dict) or name not in values:
            return _NOTHING
        values = values[name]
    return values


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[name] = value


def _drop(values: dict[str, Any], key: str) -> None:
    *sections, name = key.split(".")
    for section in sections:
        values = values[section]
    del values[name]
