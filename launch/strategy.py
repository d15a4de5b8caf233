"""What the strategies are called and made of, and the number formats they train in. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Kind = Literal["single", "ddp", "fsdp2", "zero", "xla"]


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
    XLA = "xla"
    """One process for all TPU devices of a host: everything on each of them, gradients averaged by the compiler."""

    @property
    def kind(self) -> Kind:
        """The engine that carries it out."""
        if self.value.startswith("zero"):
            return "zero"
        if self.value.startswith("fsdp2"):
            return "fsdp2"
        return {Strategy.SINGLE: "single", Strategy.XLA: "xla"}.get(self, "ddp")  # type: ignore[return-value]

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


Precision = Literal["fp32", "bf16", "fp16"]

_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Dtypes:
    """Number formats of a run, by their names in torch. Planned before it starts, and looked at once it has."""

    forward: str
    """What matrix products are computed in."""
    parameter: str
    """The weights that forward and backward use."""
    reduction: str
    """What gradients are added up in over processes."""
    master: str
    """The weights that the optimizer changes."""
    optimizer: str
    """What the optimizer remembers."""


def planned_dtypes(strategy: Strategy, precision: Precision) -> Dtypes:
    """Mixed precision is in the products alone: gradients are summed, and weights kept, in fp32.

    DeepSpeed holds a second, low-precision image of the weights for forward and backward.
    """
    low = _TORCH_NAMES[precision]
    parameter = low if strategy.kind == "zero" else "float32"
    return Dtypes(forward=low, parameter=parameter, reduction="float32", master="float32", optimizer="float32")
