"""Every key of a DeepSpeed JSON, with the type of its value.

They are those of DeepSpeed 0.19 (https://www.deepspeed.ai/docs/config-json/); `tests/test_deepspeed_file.py` compares
them with the installed one.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, JsonValue

from launch.sections import ABSENT, Keys


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


class OffloadedWeights(Keys):
    """`zero_optimization.offload_param`."""

    device: OffloadDevice = ABSENT
    nvme_path: str | None = None
    buffer_count: Count = ABSENT
    buffer_size: Count = ABSENT
    max_in_cpu: Count = ABSENT
    pin_memory: Flag = ABSENT


class OffloadedOptimizer(Keys):
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


class ZenFlow(Keys):
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


class LeafModules(Keys):
    """`zero_optimization.leaf_module`."""

    classes: Names = ABSENT
    names: Names = ABSENT
    name_suffixes: Names = ABSENT


class ZeroOptimization(Keys):
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


class Fp16(Keys):
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


class Bf16(Keys):
    """`bf16`, once called `bfloat16`."""

    enabled: Flag = ABSENT
    immediate_grad_update: Flag = ABSENT
    check_grad_overflow: Flag = ABSENT
    bf16_master_weights_and_grads: Flag = ABSENT
    bf16_optimizer_states: Flag = ABSENT


class TorchAutocast(Keys):
    """`torch_autocast`."""

    enabled: bool = ABSENT
    dtype: NumberFormat = ABSENT
    lower_precision_safe_modules: list[str] = ABSENT


class DataTypes(Keys):
    """`data_types`."""

    grad_accum_dtype: NumberFormat | None = None
    param_dtype: NumberFormat | None = None
    buffer_dtype: NumberFormat | None = None
    keep_in_fp32_modules: Auto | list[str] = ABSENT


class ActivationCheckpointing(Keys):
    """`activation_checkpointing`."""

    partition_activations: bool = ABSENT
    number_checkpoints: ExactCount | None = None
    contiguous_memory_optimization: bool = ABSENT
    synchronize_checkpoint_boundary: bool = ABSENT
    profile: bool = ABSENT
    cpu_checkpointing: bool = ABSENT


class CommsLogger(Keys):
    """`comms_logger`."""

    enabled: Flag = ABSENT
    prof_all: Flag = ABSENT
    prof_ops: list[str] = ABSENT
    verbose: Flag = ABSENT
    debug: Flag = ABSENT


class TensorBoard(Keys):
    """`tensorboard`, and `csv_monitor`."""

    enabled: Flag = ABSENT
    output_path: str = ABSENT
    job_name: str = ABSENT


class Wandb(Keys):
    """`wandb`."""

    enabled: Flag = ABSENT
    group: str | None = None
    team: str | None = None
    project: str = ABSENT


class Comet(Keys):
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


class FlopsProfiler(Keys):
    """`flops_profiler`."""

    enabled: bool = ABSENT
    recompute_fwd_factor: float = ABSENT
    profile_step: ExactCount = ABSENT
    module_depth: int = ABSENT
    top_modules: ExactCount = ABSENT
    detailed: bool = ABSENT
    output_file: str | None = None


class AsynchronousIo(Keys):
    """`aio`."""

    block_size: ExactCount = ABSENT
    queue_depth: ExactCount = ABSENT
    intra_op_parallelism: ExactCount = ABSENT
    single_submit: bool = ABSENT
    overlap_events: bool = ABSENT
    use_gds: bool = ABSENT


class CheckpointWriter(Keys):
    """`checkpoint.writer`."""

    type: Annotated[Literal["mock", "python", "fast"], BeforeValidator(_lower)] | None = None
    io_buffer_size: Annotated[int, BeforeValidator(_whole), Field(ge=0)] = ABSENT
    io_buffer_double: bool = ABSENT
    show_statistics: bool = ABSENT
    data_parallel: Annotated[Literal["replica", "socket", "machine"], BeforeValidator(_lower)] | None = None
    decoupled: bool = ABSENT
    io_multiplier: ExactCount = ABSENT


class ParallelWrite(Keys):
    """`checkpoint.parallel_write`."""

    pipeline_stage: bool = ABSENT


class Checkpoint(Keys):
    """`checkpoint`."""

    tag_validation: Annotated[Literal["warn", "ignore", "fail"], BeforeValidator(_lower)] = ABSENT
    load_universal: bool = ABSENT
    use_node_local_storage: bool = ABSENT
    parallel_write: ParallelWrite = ABSENT
    checkpoint_serialization: bool = ABSENT
    writer: CheckpointWriter | None = None


class Compile(Keys):
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


class ThroughputTimer(Keys):
    """`timers.throughput`."""

    enabled: Flag = ABSENT
    synchronized: Flag = ABSENT


class Timers(Keys):
    """`timers`."""

    throughput: ThroughputTimer = ABSENT


# What follows is known, so that a typo in it is told, and then refused by `complete`.


class Optimizer(Keys):
    """`optimizer`; the parameters are those of the optimizer's class."""

    type: str = ABSENT
    params: FreeForm = ABSENT
    legacy_fusion: bool = ABSENT


class Scheduler(Keys):
    """`scheduler`; the parameters are those of the scheduler's class."""

    type: str | None = None
    params: FreeForm = ABSENT


class DataEfficiency(Keys):
    """`data_efficiency`."""

    enabled: bool = ABSENT
    seed: int = ABSENT
    data_sampling: FreeForm = ABSENT
    data_routing: FreeForm = ABSENT


class ModelInfo(Keys):
    """`autotuning.model_info`."""

    profile: bool = ABSENT
    num_params: Count | None = None
    hidden_size: Count | None = None
    num_layers: Count | None = None


class Autotuning(Keys):
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


class HybridEngine(Keys):
    """`hybrid_engine`."""

    enabled: Flag = ABSENT
    max_out_tokens: Positive = ABSENT
    inference_tp_size: Whole = ABSENT
    release_inference_cache: Flag = ABSENT
    pin_parameters: Flag = ABSENT
    tp_gather_partition_size: Whole = ABSENT
    enable_cuda_graph: Flag = ABSENT


class TensorParallelSplit(Keys):
    """`tensor_parallel.tensor_parallel`, also called `tp`."""

    tp_size: Whole = ABSENT
    tp_grain_size: Whole = ABSENT
    mpu: JsonValue = None
    tp_group: JsonValue = None


class TensorParallel(Keys):
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


class ExpertParallel(Keys):
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


class WeightQuantization(Keys):
    """`weight_quantization`."""

    enabled: Flag = ABSENT
    num_bits: Whole = ABSENT
    q_type: Literal["asymmetric", "symmetric"] = ABSENT
    q_groups: Whole = ABSENT
    quantized_initialization: FreeForm = ABSENT
    post_init_quant: FreeForm = ABSENT


class DeepSpeedFile(Keys):
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
