"""What the strategies are called and made of, and the DeepSpeed configuration that follows from a plan. Pure."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

Kind = Literal["single", "ddp", "fsdp2", "zero"]


class Strategy(StrEnum):
    """How weights, gradients and optimizer state are spread over the processes of a run."""

    SINGLE = "single"
    """One process."""
    DDP = "ddp"
    """Everything on every process, gradients averaged."""
    FSDP2 = "fsdp2"
    """Weights, gradients and optimizer state sharded (torch `fully_shard`)."""
    FSDP2_OFFLOAD = "fsdp2_offload"
    """The same, kept in CPU memory between uses."""
    ZERO1 = "zero1"
    """Optimizer state sharded (DeepSpeed)."""
    ZERO2 = "zero2"
    """Optimizer state and gradients sharded."""
    ZERO3 = "zero3"
    """Optimizer state, gradients and weights sharded."""
    ZERO2_OFFLOAD = "zero2_offload"
    """ZeRO-2 with the optimizer in CPU memory."""
    ZERO3_OFFLOAD = "zero3_offload"
    """ZeRO-3 with optimizer and weights in CPU memory."""

    @property
    def kind(self) -> Kind:
        """The engine that carries it out."""
        if self.value.startswith("zero"):
            return "zero"
        if self.value.startswith("fsdp2"):
            return "fsdp2"
        return "single" if self is Strategy.SINGLE else "ddp"

    @property
    def stage(self) -> int:
        """ZeRO stage; 0 for what is not ZeRO."""
        return int(self.value[4]) if self.kind == "zero" else 0

    @property
    def offload(self) -> bool:
        """Whether state lies in CPU memory between uses."""
        return self.value.endswith("_offload")

    @property
    def shards(self) -> bool:
        """Whether its engine places the weights itself."""
        return self.kind in ("fsdp2", "zero")


def zero_strategy(stage: int, offload: bool) -> Strategy:
    """The strategy of a ZeRO stage.

    Raises:
        ValueError: there is none.
    """
    return Strategy(f"zero{stage}{'_offload' if offload else ''}")


def strategy_with_offload(stage: int, optimizer_on: str, weights_on: str) -> Strategy | None:
    """The strategy of a ZeRO stage with its optimizer and its weights on these devices (none, cpu, nvme), if any."""
    for strategy in Strategy:
        offloads = ("cpu" if strategy.offload else "none", "cpu" if strategy.offload and stage == 3 else "none")
        if strategy.kind == "zero" and strategy.stage == stage and offloads == (optimizer_on, weights_on):
            return strategy
    return None


ZERO_STRATEGIES = (
    "zero1, zero2, zero3, zero2_offload (the optimizer on the CPU) and zero3_offload (optimizer and weights on the CPU)"
)
"""What there is, for messages."""


def deepspeed_config(
    strategy: Strategy,
    micro_batch_size: int,
    accumulation: int,
    world_size: int,
    max_grad_norm: float | None,
    precision: str,
) -> dict[str, Any]:
    """A complete DeepSpeed configuration: nothing in it is `auto`."""
    zero: dict[str, Any] = {"stage": strategy.stage}
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
        # torch's AdamW, so that every strategy uses the same optimizer and nothing is compiled at the first start
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
