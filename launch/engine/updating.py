"""What becomes of gradients: summed over ranks, clipped and made into other weights, as each strategy does it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
)
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from launch.engine.devices import Devices, is_xla
from launch.engine.precision import LossScale, names, optimizer_dtypes
from launch.engine.sharding import innermost, unwrapped
from launch.errors import ConfigError
from launch.strategy import Dtypes


class Updates:
    """What becomes of gradients, where forward and backward leave that to us: one process, DDP, FSDP2."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float | None,
        scale: LossScale | None = None,
        devices: Devices | None = None,
    ) -> None:
        self._devices = devices or Devices()
        self.optimizer = optimizer
        self._accelerator, self._model, self._max_grad_norm = accelerator, model, max_grad_norm
        self._scale = scale
        # Accelerate's looks twice in each step for lomo_optim, in all folders of sys.path (1.15, `is_lomo_available`),
        # and has Python take apart the signature of `zero_grad`. On XLA devices it adds up gradients over them.
        self._stepper = optimizer if is_xla(accelerator) else innermost(optimizer)
        self._clips_by_torch = not isinstance(model, FSDPModule) and not is_xla(accelerator)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._used = not isinstance(model, DistributedDataParallel)
        # DDP's gradients stay where its buckets are: made anew, they would lie beside them until the last micro-batch.
        self._forget_gradients = not isinstance(model, DistributedDataParallel)
        self.gathers = isinstance(model, FSDPModule)
        """Whether a forward pass waits for other ranks."""

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch; only the `last` of an update exchanges gradients.

        Of FSDP2 each does: until they are, every rank holds all of the gradient, which sharding is to avoid.
        """
        exchanges = last or isinstance(self._model, FSDPModule)
        with contextlib.nullcontext() if exchanges else self._accelerator.no_sync(self._model):
            yield
        self._devices.settle()

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
            torch._foreach_mul_(self._gradients(), 1.0 / self._scale.value)
        norm = self._clip()
        if math.isfinite(norm):
            self._stepper.step()
            if self._scale:
                self._scale.after_update()
        self._stepper.zero_grad(set_to_none=self._forget_gradients)
        self._devices.settle()
        return norm

    def _gradients(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def _clip(self) -> float:
        """The global norm of the gradient, which is shortened if it is too long."""
        most = self._max_grad_norm or math.inf
        if not self._clips_by_torch:
            norm = self._accelerator.clip_grad_norm_(self._model.parameters(), most)
            return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # host sync
        norm = torch.nn.utils.get_total_norm(self._gradients())
        found = float(norm)  # host sync
        if found + 1e-6 > most:  # else torch would multiply all of it by one
            torch.nn.utils.clip_grads_with_norm_(self._parameters, most, norm)
        return found

    def discard(self) -> None:
        """Forget the gradients, and change nothing."""
        self._stepper.zero_grad(set_to_none=self._forget_gradients)

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
        self.gathers = int(engine.zero_optimization_stage()) == 3

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

    def discard(self) -> None:
        """As above, by what DeepSpeed 0.19 does after an overflow, without a change of its loss scale."""
        zero = self._engine.optimizer

        def overflow(*_: Any, **__: Any) -> bool:
            zero.overflow = True
            return True

        # Stages 1 and 2 ask the second only where the first says so, stage 3 asks the third.
        changed = {"check_grad_overflow": True, "check_overflow": overflow, "_update_scale": lambda *_: None}
        if hasattr(zero, "_overflow_check_and_loss_scale_update"):
            changed["_overflow_check_and_loss_scale_update"] = overflow
        with _replaced(zero, changed):
            self._engine.step()

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


@contextlib.contextmanager
def _replaced(thing: Any, attributes: dict[str, Any]) -> Iterator[None]:
    """An object with other attributes of its own, for a while."""
    before = {name: vars(thing)[name] for name in attributes if name in vars(thing)}
    vars(thing).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del vars(thing)[name]
        vars(thing).update(before)


def updates(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float | None,
    scale: LossScale | None = None,
    devices: Devices | None = None,
) -> Updates:
    """How this accelerator's engine makes updates of the prepared `model`; DeepSpeed has a loss scale of its own."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return DeepSpeedUpdates(accelerator, model, optimizer)
    return Updates(accelerator, model, optimizer, max_grad_norm, scale, devices)


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
