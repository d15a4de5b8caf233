"""How weights, gradients and optimizer state are spread over ranks: one Accelerator for each strategy.

With `engine.updating` the only place that knows DDP from FSDP2 from DeepSpeed ZeRO, and the CPU from a GPU under them.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    fsdp_utils,
    patch_environment,
)
from torch.distributed import Store, TCPStore, distributed_c10d  # type: ignore[attr-defined]
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers.integrations import unset_hf_deepspeed_config

from launch.errors import TopologyError
from launch.plan import Plan
from launch.strategy import Strategy


def make_accelerator(plan: Plan) -> Accelerator:
    """The planned process group and sharding, and nothing else. Every rank must call this.

    Raises:
        TopologyError: Accelerate understood its environment differently, or the devices cannot do it.
    """
    processes, train = plan.processes, plan.config.train
    strategy, on_cpu = processes.strategy, processes.device == "cpu"
    _check_precision(processes.device, train.precision)
    options: dict[str, Any] = {"kwargs_handlers": [_process_group(plan), _ddp()]}
    environment: dict[str, str] = {}
    if strategy.kind == "zero":
        options["deepspeed_plugin"] = _deepspeed_plugin(plan)
        if on_cpu:
            environment = {"accelerate_use_cpu": "false", "ds_accelerator": "cpu"}
    elif strategy.kind == "fsdp2":
        options["fsdp_plugin"] = _fsdp_plugin(strategy, on_cpu, getattr(torch, plan.dtypes.forward))
        if on_cpu:
            environment = {"accelerate_use_cpu": "false", "accelerate_torch_device": "cpu"}
    elif strategy.kind == "xla":
        from launch.engine.xla import start

        start(processes.devices)
    else:
        options["cpu"] = on_cpu
    with patch_environment(**environment), _gloo_counts_as_a_device(on_cpu and strategy.kind == "fsdp2"):
        accelerator = Accelerator(
            # Precision is ours (engine.precision), too: Accelerate's FSDP2 would sum gradients in bf16, and its fp16
            # skips an update that overflows and advances the schedule all the same.
            mixed_precision="no",
            # Accumulation is ours (engine.loop); a plugin, because ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the
            # environment silently replaces the plain argument (accelerate 1.15, Accelerator.__init__).
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            **options,
        )
    _check(accelerator, plan)
    if strategy.kind == "zero":
        # Accelerate tells transformers too, and `from_pretrained` would then hand out weights that are sharded already
        # and have no shape: every one would look like a bias to `optim.parameter_groups`, and none would decay.
        unset_hf_deepspeed_config()
    return accelerator


def serve_store(listener: socket.socket) -> Store:
    """Serve the store that the ranks meet in, at the port that `listener` is bound to. On rank 0."""
    host, port = listener.getsockname()
    return TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _process_group(plan: Plan) -> InitProcessGroupKwargs:
    """With what the process group is made: above all, how long a rank waits for the others."""
    timeout = timedelta(seconds=plan.config.parallel.timeout_seconds)
    # Groups made later, such as DeepSpeed's clone of the world, take torch's own defaults (10 minutes for NCCL, else
    # 30) and not the world's. So does the world itself for 600 s: Accelerate 1.15 takes that for "not set".
    for default in ("default_pg_timeout", "default_pg_nccl_timeout"):
        setattr(distributed_c10d, default, timeout)
    if plan.processes.strategy.kind == "zero" and plan.processes.device == "cpu":
        # Without a backend Accelerate 1.15 takes each rank for a world of one (PartialState._prepare_backend).
        return InitProcessGroupKwargs(backend="gloo", timeout=timeout)
    return InitProcessGroupKwargs(timeout=timeout)


def _ddp() -> DistributedDataParallelKwargs:
    """Gradients lie in the buckets that they are exchanged in, not in tensors of their own besides: a fifth less."""
    return DistributedDataParallelKwargs(gradient_as_bucket_view=True)


def _check_precision(device: str, precision: str) -> None:
    """Refuse a number format that the device has no arithmetic for."""
    if precision == "bf16" and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name()
        raise TopologyError(
            f"train.precision = bf16: {name} has no bf16 arithmetic; use train.precision=fp16 or train.precision=fp32"
        )
    if precision == "bf16" and device == "mps":
        try:
            torch.ones(1, dtype=torch.bfloat16, device=device)
        except TypeError as error:
            raise TopologyError(
                f"train.precision = bf16: {error}; use train.precision=fp16 or train.precision=fp32"
            ) from None


def _check(accelerator: Accelerator, plan: Plan) -> None:
    """See that what was planned is what there is: no strategy is ever replaced by another without a word."""
    processes, strategy = plan.processes, plan.processes.strategy
    several = {DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
    kinds = {
        "single": {DistributedType.NO},
        "ddp": several if processes.world_size > 1 else {DistributedType.NO},
        "fsdp2": {DistributedType.FSDP},
        "zero": {DistributedType.DEEPSPEED},
        "xla": {DistributedType.XLA},
    }[strategy.kind]
    size, kind, device = accelerator.num_processes, accelerator.distributed_type, accelerator.device.type
    if size != processes.world_size or kind not in kinds or device != processes.device:
        raise TopologyError(
            f"the plan says {processes.world_size} processes on {processes.device}, strategy {strategy}; "
            f"Accelerate found {size} on {device}, {kind.value}; check the configuration given to "
            "`accelerate launch` and ACCELERATE_* in the environment"
        )


def _deepspeed_plugin(plan: Plan) -> DeepSpeedPlugin:
    import deepspeed

    if plan.processes.device == "cpu":
        # It would be compiled at every start on a CPU (minutes), and training never uses it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # What the file given to `accelerate launch` says is in the plan already; Accelerate refuses to be told twice.
    with patch_environment(accelerate_config_ds_fields=""):
        return DeepSpeedPlugin(hf_ds_config=plan.deepspeed, zero3_init_flag=False)


def _fsdp_plugin(strategy: Strategy, on_cpu: bool, forward: torch.dtype) -> FullyShardedDataParallelPlugin:
    offload: Any = False
    if strategy.offload:
        offload = CPUOffloadPolicy(pin_memory=not on_cpu)  # pinning needs a device to pin for
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",  # each transformer block, by the model's own `_no_split_modules`
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,  # every rank builds the same weights
        cpu_offload=offload,
        mixed_precision_policy=MixedPrecisionPolicy(param_dtype=forward, reduce_dtype=torch.float32),
    )


def spread(accelerator: Accelerator, model: Any, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
    """Model and optimizer as the strategy has them. Every rank must call this.

    Raises:
        RuntimeError: weights that were one are several now.
    """
    tied = tied_names(model)
    sharded = accelerator.distributed_type == DistributedType.FSDP
    with _shared_weights_stay_together(model) if sharded else contextlib.nullcontext():
        model, optimizer = accelerator.prepare(model, optimizer)
    if tied != tied_names(unwrapped(model)):
        raise RuntimeError(f"{accelerator.distributed_type} has untied weights that were one: {tied}")
    return model, optimizer


@contextlib.contextmanager
def _shared_weights_stay_together(model: Any) -> Iterator[None]:
    """Let Accelerate make no units in two of which there would be the same weight: torch refuses it, or unties it.

    Its units are blocks and, since 1.15 (`fsdp2_prepare_model`), embeddings and head. An encoder-decoder has its
    embeddings in two more places; those of BERT are part of a block of their own, which a masked language model's head
    shares a weight with.
    """
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    names = getattr(model, "_no_split_modules", None)
    blocks = [module for module in model.modules() if type(module).__name__ in (names or ())]
    parts = {block: {id(part) for part in block.modules()} for block in blocks}
    sharing = {block for block in blocks if any(owners[id(weight)] - parts[block] for weight in block.parameters())}
    kept = {type(block).__name__ for block in blocks} - {type(block).__name__ for block in sharing}
    in_blocks = {part for block in blocks if type(block).__name__ in kept for part in parts[block]}
    alone = all(len(modules) == 1 or modules <= ends for modules in owners.values()) and not ends & in_blocks
    find_final_norm = fsdp_utils._find_final_norm
    if sharing:
        model._no_split_modules = kept
    if not alone:
        fsdp_utils._find_final_norm = lambda model: None
        model.get_input_embeddings = model.get_output_embeddings = lambda: None
    try:
        yield
    finally:
        if sharing:
            model._no_split_modules = names
        if not alone:
            fsdp_utils._find_final_norm = find_final_norm
            del model.get_input_embeddings, model.get_output_embeddings


@contextlib.contextmanager
def _gloo_counts_as_a_device(wanted: bool) -> Iterator[None]:
    """Let Accelerate shard over CPU processes.

    Accelerate 1.15 gives FSDP to GPUs and their like only: over CPU processes AcceleratorState ignores the plugin
    without a word and trains with DDP. `_check` sees to it that this still works as it did.
    """
    original = PartialState._prepare_backend
    if wanted:
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    try:
        yield
    finally:
        PartialState._prepare_backend = original


def tied_names(model: torch.nn.Module) -> list[list[str]]:
    """Groups of names under which one and the same weight is known."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def unwrapped(model: torch.nn.Module) -> Any:
    """The recipe's model inside what DDP or DeepSpeed made of it.

    Not `accelerator.unwrap_model`, which imports DeepSpeed wherever it is installed, and that prints to stdout.
    """
    wrapped = isinstance(model, DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine"
    return model.module if wrapped else model


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """Torch's own optimizer inside what Accelerate and DeepSpeed made of it."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer
