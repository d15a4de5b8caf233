"""How weights, gradients and optimizer state are spread over ranks: one Accelerator and one way to update per strategy.

The only place that knows DDP from FSDP2 from DeepSpeed ZeRO, and the CPU from a GPU under them.
"""

from __future__ import annotations

import contextlib
import math
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    fsdp_utils,
    patch_environment,
)
from torch.distributed import Store, TCPStore, distributed_c10d  # type: ignore[attr-defined]
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers.integrations import unset_hf_deepspeed_config

from launch.engine.precision import LossScale, names, optimizer_dtypes
from launch.errors import ConfigError, TopologyError
from launch.plan import Plan
from launch.strategy import Dtypes, Strategy


def make_accelerator(plan: Plan) -> Accelerator:
    """The planned process group and sharding, and nothing else. Every rank must call this.

    Raises:
        TopologyError: Accelerate understood its environment differently, or the devices cannot do it.
    """
    processes, train = plan.processes, plan.config.train
    strategy, on_cpu = processes.strategy, processes.device == "cpu"
    _check_precision(processes.device, train.precision)
    options: dict[str, Any] = {"kwargs_handlers": [_process_group(plan)]}
    environment: dict[str, str] = {}
    if strategy.kind == "zero":
        options["deepspeed_plugin"] = _deepspeed_plugin(plan)
        if on_cpu:
            environment = {"accelerate_use_cpu": "false", "ds_accelerator": "cpu"}
    elif strategy.kind == "fsdp2":
        options["fsdp_plugin"] = _fsdp_plugin(strategy, on_cpu, getattr(torch, plan.dtypes.forward))
        if on_cpu:
            environment = {"accelerate_use_cpu": "false", "accelerate_torch_device": "cpu"}
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


# --- updates ---------------------------------------------------------------------------------------------


class Updates:
    """What becomes of gradients, where forward and backward leave that to us: one process, DDP, FSDP2."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float | None,
        scale: LossScale | None = None,
    ) -> None:
        self.optimizer = optimizer
        self._accelerator, self._model, self._max_grad_norm = accelerator, model, max_grad_norm
        self._scale = scale
        self._used = not isinstance(model, DistributedDataParallel)

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch; only the `last` of an update exchanges gradients."""
        with contextlib.nullcontext() if last else self._accelerator.no_sync(self._model):
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss`, as the loss scale has it."""
        (loss * self._scale.value if self._scale else loss).backward()  # type: ignore[no-untyped-call]

    def apply(self) -> float:
        """Clip, change the weights, forget the gradients; the global L2 norm of the gradient before clipping.

        A norm that is not finite leaves the weights alone.

        Raises:
            ConfigError: DDP waits for gradients that never come.
        """
        if not self._used:
            _refuse_unused(self._model)
            self._used = True
        if self._scale:
            gradients = [parameter.grad for parameter in self._model.parameters() if parameter.grad is not None]
            torch._foreach_mul_(gradients, 1.0 / self._scale.value)
        norm = self._accelerator.clip_grad_norm_(self._model.parameters(), self._max_grad_norm or math.inf)
        value = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # host sync
        if math.isfinite(value):
            self.optimizer.step()
            if self._scale:
                self._scale.after_update()
        self.optimizer.zero_grad()
        return value

    def may_repeat(self) -> bool:
        """After a gradient that is not finite: whether it may only have overflowed, and its scale is halved now.

        The norm is the global one, so every rank finds the same.
        """
        return self._scale is not None and self._scale.after_overflow()

    def scale_state(self) -> dict[str, float]:
        """What a resumed run needs of the fp16 loss scale; empty where there is none."""
        return self._scale.state() if self._scale else {}

    def restore_scale(self, state: dict[str, float]) -> None:
        """Go on from there."""
        if self._scale and state:
            self._scale.restore(state)

    def reduction_dtype(self) -> str:
        """In what gradients are added up over ranks."""
        if isinstance(self._model, FSDPModule):
            policy = self._model._get_fsdp_state()._mp_policy
            return names({policy.reduce_dtype or torch.float32})
        # DDP adds up gradients as they are, and they are what the weights are.
        return names({parameter.dtype for parameter in self._model.parameters() if parameter.requires_grad})


def _refuse_unused(model: torch.nn.Module) -> None:
    """See, after the first backward pass, that every trained weight has a gradient.

    DDP exchanges gradients in groups, and a group that lacks one is never exchanged: the next forward pass would end in
    an error that names numbers only (torch 2.13, reducer.cpp, `ensure_prior_reduction_finished`).
    """
    unused = [name for name, value in unwrapped(model).named_parameters() if value.requires_grad and value.grad is None]
    if unused:
        shown = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
        raise ConfigError(
            f"parallel.strategy = ddp: the loss does not depend on {shown}, and DDP needs a gradient of every trained "
            "weight; set requires_grad_(False) on them in the recipe's build_model, or use parallel.strategy=fsdp2"
        )


class DeepSpeedUpdates(Updates):
    """The same where DeepSpeed's engine, which the prepared model is, does all of it."""

    def __init__(self, accelerator: Accelerator, engine: Any, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(accelerator, engine, optimizer, None)
        self._engine = engine

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Say which micro-batch is the last: the last window of an epoch has fewer than DeepSpeed was told."""
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss`, which is divided by the targets of the whole update already."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def apply(self) -> float:
        """As above; `gradient_clipping` in the engine's configuration clips."""
        self._engine.step()
        # An update that is not finite is skipped, and the norm is then the one of the update before.
        return math.nan if self._engine.optimizer.overflow else float(self._engine.get_global_grad_norm())

    def may_repeat(self) -> bool:
        """As above: DeepSpeed has halved its own scale; at 1 it would raise an exception of its own."""
        return bool(self._engine.fp16_enabled()) and float(self._engine.optimizer.loss_scaler.loss_scale) > 1.0

    def scale_state(self) -> dict[str, float]:
        """As above, in the terms of `precision.LossScale`: another strategy may go on from it."""
        if not self._engine.fp16_enabled():
            return {}
        scaler = self._engine.optimizer.loss_scaler
        return {
            "value": scaler.cur_scale,
            "since_overflow": scaler.cur_iter - scaler.last_overflow_iter - 1,
            "hysteresis": scaler.cur_hysteresis,
        }

    def restore_scale(self, state: dict[str, float]) -> None:
        """As above."""
        if self._engine.fp16_enabled() and state:
            scaler = self._engine.optimizer.loss_scaler
            scaler.cur_scale = state["value"]
            scaler.cur_iter = scaler.last_overflow_iter + 1 + int(state["since_overflow"])
            scaler.cur_hysteresis = int(state.get("hysteresis", scaler.cur_hysteresis))

    def reduction_dtype(self) -> str:
        """As above."""
        return names({self._engine.communication_data_type})


def updates(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float | None,
    scale: LossScale | None = None,
) -> Updates:
    """How this accelerator's engine makes updates of the prepared `model`; DeepSpeed has a loss scale of its own."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return DeepSpeedUpdates(accelerator, model, optimizer)
    return Updates(accelerator, model, optimizer, max_grad_norm, scale)


def seen_dtypes(made: Updates, model: torch.nn.Module, forward: set[torch.dtype]) -> Dtypes:
    """The number formats in use after an update; `forward` is what `precision.forward_dtypes` collected."""
    master, remembered = optimizer_dtypes(innermost(made.optimizer))
    parameters = unwrapped(model).parameters()
    return Dtypes(
        forward=names(forward),
        parameter=names({parameter.dtype for parameter in parameters if parameter.requires_grad}),
        reduction=made.reduction_dtype(),
        master=master,
        optimizer=remembered,
    )


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
