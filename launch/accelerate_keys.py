"""Every key of an Accelerate YAML, with the type of its value.

They are those of Accelerate 1.15; `tests/test_accelerate_file.py` compares them with the installed one.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field

from launch.sections import ABSENT, Keys


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


class Fsdp(Keys):
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


class DeepSpeed(Keys):
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


class Dynamo(Keys):
    """`dynamo_config`; the prefix may be left out."""

    dynamo_backend: Annotated[Backend, Upper, Quoted] = ABSENT
    dynamo_mode: Literal["default", "reduce-overhead", "max-autotune"] = ABSENT
    dynamo_use_fullgraph: bool = ABSENT
    dynamo_use_dynamic: bool = ABSENT
    dynamo_use_regional_compilation: bool = ABSENT


class Parallelism(Keys):
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


class Fp8(Keys):
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


class MegatronLm(Keys):
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


class Mpirun(Keys):
    """`mpirun_config`."""

    mpirun_hostfile: str = ABSENT


class AccelerateFile(Keys):
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


PREFIXED: dict[str, tuple[str, type[BaseModel]]] = {
    "fsdp_config": ("fsdp_", Fsdp),
    "dynamo_config": ("dynamo_", Dynamo),
    "fp8_config": ("fp8_", Fp8),
}
"""Sections in which Accelerate supplies the prefix of a key."""
