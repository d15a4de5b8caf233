"""Texts for other programs, from what a plan has decided: DeepSpeed's JSON and Accelerate's YAML. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launch.source import write_yaml
from launch.strategy import Precision, Strategy

if TYPE_CHECKING:
    from launch.plan import Plan


BUCKET = 25_000_000
"""Numbers that DeepSpeed gathers before it sums them, each in up to 14 bytes; by default twenty times as many."""


def deepspeed_config(
    strategy: Strategy,
    micro_batch_size: int,
    accumulation: int,
    world_size: int,
    max_grad_norm: float | None,
    precision: Precision,
) -> dict[str, Any]:
    """A complete DeepSpeed configuration: nothing in it is `auto`."""
    zero: dict[str, Any] = {"stage": strategy.stage, "reduce_bucket_size": BUCKET}
    if strategy.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if strategy.stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    if strategy.stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = False  # the export holds the fp32 master weights
    return {
        "train_batch_size": micro_batch_size * accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm or 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {
            "enabled": precision == "fp16",
            "loss_scale": 0,  # found as it goes; an update that overflows is repeated with half of it
            "initial_scale_power": 16,
            "hysteresis": 1,
            "min_loss_scale": 1,
        },
        "communication_data_type": "fp32",  # gradients are summed as DDP sums them
        # torch's optimizers, so that every strategy uses the same one and nothing is compiled at the first start
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def accelerate_values(strategy: Strategy, nodes: int, world_size: int) -> dict[str, Any]:
    """What a configuration of `accelerate launch` says of such a world.

    Batch sizes, precision and the like are not in it: the plan states them, and the worker reads the plan.
    """
    kinds = {"single": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero": "DEEPSPEED", "xla": "NO"}
    values: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "NO" if world_size == 1 else kinds[strategy.kind],
        "use_cpu": False,  # with `true` accelerate 1.15 starts one process, whatever num_processes says
        "num_machines": nodes,
        "num_processes": world_size,
        "machine_rank": 0,
        "mixed_precision": "no",
    }
    if world_size > 1:
        values |= {"main_process_port": 0, "rdzv_backend": "static", "same_network": True}
    if strategy.kind == "fsdp2":
        values["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": True,
            "fsdp_offload_params": strategy.offload,
            "fsdp_cpu_ram_efficient_loading": False,
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        }
    if strategy.kind == "zero":
        values["deepspeed_config"] = {
            "deepspeed_multinode_launcher": "standard",
            "zero_stage": strategy.stage,
            "zero3_init_flag": False,
            "offload_optimizer_device": "cpu" if strategy.offload else "none",
            "offload_param_device": "cpu" if strategy is Strategy.ZERO3_OFFLOAD else "none",
        }
    return values


def accelerate_yaml(plan: Plan) -> str:
    """The file with which plain `accelerate launch` starts the workers of this plan."""
    processes = plan.processes
    needed = {name: value for name, value in plan.environment.items() if name in _NEEDED}
    if processes.world_size > 1:
        needed |= TORCHRUN
    head = [
        f"Starts the run in {plan.run_folder} by plain `accelerate launch`:",
        "",
        *(f"  {name}={value} \\" for name, value in needed.items()),
        f"  accelerate launch --config_file {plan.run_folder}/accelerate.yaml -m launch.train {plan.run_folder}",
        "",
    ]
    if processes.nodes > 1:
        head += ["On each machine, with --machine_rank 0, 1, … and --main_process_ip, --main_process_port.", ""]
    head.append("Batch sizes, precision, clipping and schedule are in plan.json beside it, which the workers read.")
    values = accelerate_values(processes.strategy, processes.nodes, processes.world_size)
    return "".join(f"# {line}".rstrip() + "\n" for line in head) + "\n" + write_yaml(values)


_NEEDED = (
    *("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU"),
    *("USE_TORCH_XLA", "PJRT_DEVICE", "CPU_NUM_DEVICES", "XLA_NO_SPECIAL_SCALARS", "TF_CPP_MIN_LOG_LEVEL"),
)
"""What a user's own command must set; where our packages are found is not among it."""

TORCHRUN = {
    "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3600",
}
"""What torchrun, and `accelerate launch` which calls it, must know of signals where they start the workers.

It dies of a signal that it was not told to pass on, and kills the ranks; and of one that it passes on it kills them
after 30 s, however long their save takes (torch 2.13: distributed/run.py, distributed/launcher/api.py). Variables, not
options: older releases, which know none of this, pass over them.
"""
