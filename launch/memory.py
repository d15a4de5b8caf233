"""Bytes that a rank needs, by what they are for, for each strategy. Pure.

An update is gone through moment by moment: the loss, the backward pass of each unit from the last to the first, the
step of the optimizer. The need is that of the moment that needs most. docs/memory.md compares it with what runs needed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from launch.outline import Outline
from launch.recipe import LOSS_BYTES, LOSS_BYTES_CPU
from launch.render import BUCKET
from launch.strategy import Strategy
from launch.tape import FULL, LOW, Numbers, Unit, Weight

Optimizer = Literal["adamw", "adafactor", "sgd"]

PREFETCHED = 50_000_000
"""Numbers of weights that ZeRO-3 fetches before they are needed (its default of `stage3_prefetch_bucket_size`)."""


@dataclass(frozen=True)
class Setting:
    """All that the need of memory depends on, besides the model and the strategy."""

    world_size: int
    micro_batch_size: int
    accumulation: int
    numbers_low: bool
    """Whether products are in 2 bytes."""
    on_cpu: bool
    optimizer: Optimizer = "adamw"
    momentum: bool = False
    """Of sgd."""
    checkpointing: bool = False
    bucket: int = BUCKET
    """Numbers in a buffer of DeepSpeed's, in which gradients are summed."""


@dataclass(frozen=True)
class Need:
    """Bytes of a rank at the moment that needs most, on its device; `host` is main memory besides."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    logits: int = 0
    """Of the loss: what the activations of the model's last product need until it is left behind."""
    buffers: int = 0
    """For exchanges between ranks, and to work in."""
    host: int = 0
    moment: str = field(default="", compare=False)

    @property
    def total(self) -> int:
        """On the device."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.logits + self.buffers

    def parts(self) -> dict[str, int]:
        """By name, those on the device; without what is nothing."""
        names = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers")
        return {name: value for name in names if (value := getattr(self, name))}


def numbers_of(strategy: Strategy, low: bool) -> Numbers:
    """In what numbers a strategy keeps the weights that it computes with."""
    if not low:
        return "fp32"
    return "low" if strategy.shards else "autocast"


def need(outline: Outline, strategy: Strategy, setting: Setting) -> Need:
    """What a rank of a run needs; `outline` is in the numbers of that strategy (`numbers_of`)."""
    return max(_moments(outline, strategy, setting), key=lambda moment: moment.total)


def optimizer_bytes(outline: Outline, setting: Setting) -> int:
    """What the optimizer remembers, of all ranks together where it is sharded."""
    if setting.optimizer == "adamw":
        return 2 * FULL * outline.trained
    if setting.optimizer == "sgd":
        return FULL * outline.trained if setting.momentum else 0
    rows_and_columns = (
        sum(weight.shape[:-1]) + weight.numel // max(math.prod(weight.shape[:-1]), 1)
        if len(weight.shape) > 1
        else weight.numel
        for weight in outline.weights
        if weight.trained
    )
    return FULL * sum(rows_and_columns)


def checkpoint_bytes(outline: Outline, setting: Setting) -> int:
    """A checkpoint on the disk: weights in fp32 and the optimizer's memory; of adapters, these alone."""
    frozen = outline.parameters - outline.trained
    weights = outline.trained if frozen else outline.parameters
    return FULL * weights + optimizer_bytes(outline, setting)


def training_flops(outline: Outline, *, checkpointing: bool) -> int:
    """Operations for one sample: forward, twice as many backward, and blocks once more where they are checkpointed."""
    forward = sum(unit.flops for unit in outline.units)
    again = sum(unit.flops for unit in outline.units if unit.block) if checkpointing else 0
    return 3 * forward + again


# --- moments ---------------------------------------------------------------------------------------------


def _moments(outline: Outline, strategy: Strategy, setting: Setting) -> Iterator[Need]:
    spread = _SPREADS[strategy.kind](outline, strategy, setting)
    units, size, last = outline.units, setting.micro_batch_size, len(outline.units) - 1
    again = [setting.checkpointing and unit.block for unit in units]
    kept = [
        unit.entry * size if twice else unit.kept * size + unit.casts for unit, twice in zip(units, again, strict=True)
    ]
    ordinary = outline.fused is None or strategy.kind == "xla"
    of_loss, of_head = (_all_logits if ordinary else _some_logits)(outline, strategy, setting)
    tied = FULL * units[-1].tied  # the gradient of a head that shares its weight waits for that of the embeddings

    def moment(name: str, gradients: int, activations: int, of_logits: int, buffers: int) -> Need:
        held = spread.held
        return replace(
            held,
            gradients=held.gradients + gradients,
            activations=activations,
            logits=of_logits,
            buffers=held.buffers + buffers,
            moment=name,
        )

    yield moment("loss", spread.gradients(last), sum(kept), of_loss, spread.forward(last))
    for position in range(last, -1, -1):
        unit, activations, own = units[position], sum(kept[: position + 1]), 0
        if position == last:
            own = of_head
        else:
            activations += 2 * unit.widest * size
        if again[position]:
            activations += unit.kept * size + unit.casts
        gradients = spread.gradients(position - 1) + tied
        yield moment(f"backward of {unit.name}", gradients, activations, own, spread.backward(position))
    gradients, buffers = spread.step()
    yield moment("step", gradients, 0, 0, buffers)


def _all_logits(outline: Outline, _: Strategy, setting: Setting) -> tuple[int, int]:
    """Bytes of what the loss needs, and the backward pass of the head, with the logits of all tokens at once."""
    logits = outline.targets * setting.micro_batch_size * outline.classes
    # In fp32: logarithms of the probabilities, their gradient, and that of the logits.
    return 3 * FULL * logits, (FULL + LOW * setting.numbers_low) * logits


def _some_logits(outline: Outline, strategy: Strategy, setting: Setting) -> tuple[int, int]:
    """The same where the loss is found some tokens at a time (`recipes.head_loss`), with the gradients of the head."""
    fused = outline.fused
    assert fused, "else there are all logits"
    low, tokens = setting.numbers_low, outline.targets * setting.micro_batch_size
    piece = min(tokens * FULL * outline.classes, LOSS_BYTES_CPU if setting.on_cpu else LOSS_BYTES)
    weight, given = outline.classes * fused.width, tokens * fused.width * outline.product
    gradient = FULL * weight * fused.trained
    # Of the weight in low numbers a copy beside one in fp32, and its part of the gradient before that is added.
    copies = LOW * weight * (numbers_of(strategy, low) == "autocast") + LOW * weight * (low and fused.trained)
    in_pieces = piece + piece * outline.product // FULL  # logits, and logarithms of the probabilities in fp32
    # The gradient of the weight is handed on, in low numbers as a copy.
    handed_on = gradient * (numbers_of(strategy, low) == "low")
    return in_pieces + gradient + copies + 2 * given, handed_on + 3 * given


class _Spread(ABC):
    """What a strategy holds all the time, and what comes and goes."""

    def __init__(self, outline: Outline, setting: Setting, held: Need) -> None:
        self.units, self.setting, self.held = outline.units, setting, held
        self.compute = LOW if setting.numbers_low else FULL

    @abstractmethod
    def gradients(self, after: int) -> int:
        """Bytes of gradients, once those of the units behind `after` have been found."""

    def forward(self, position: int) -> int:  # noqa: ARG002 (of most strategies it is the same for all units)
        """Bytes to work in while a unit is in its forward pass."""
        return 0

    @abstractmethod
    def backward(self, position: int) -> int:
        """The same in its backward pass."""

    def step(self) -> tuple[int, int]:
        """Bytes of gradients, and to work in, while the weights are changed; a fused AdamW needs nothing for that."""
        return self.gradients(-1), 0


class _Whole(_Spread):
    """One process, or DDP: each rank has all of it."""

    def __init__(self, outline: Outline, strategy: Strategy, setting: Setting) -> None:
        # DDP's gradients lie in its buckets; the others are made anew in each update.
        self._stay = setting.accumulation > 1 or strategy is Strategy.DDP
        gradients = FULL * outline.trained if self._stay else 0
        super().__init__(
            outline, setting, Need(FULL * outline.parameters, gradients, optimizer_bytes(outline, setting))
        )

    def gradients(self, after: int) -> int:
        return 0 if self._stay else FULL * sum(map(_trained, self.units[after + 1 :]))

    def backward(self, position: int) -> int:
        """One is found before it is added to the one that is there."""
        return FULL * _largest(self.units[position]) if self._stay else 0


class _Sharded(_Spread):
    """FSDP2: rows of each weight on each rank; a unit is whole while it is computed with."""

    def __init__(self, outline: Outline, strategy: Strategy, setting: Setting) -> None:
        self._world = setting.world_size
        parameters = FULL * sum(_rows(weight, self._world) for weight in outline.weights)
        self._trained = FULL * sum(_rows(weight, self._world) for weight in outline.weights if weight.trained)
        optimizer = optimizer_bytes(outline, setting) * self._trained // max(FULL * outline.trained, 1)
        # What is no block stays whole from its forward pass to its backward pass.
        whole = sum(_all(unit) for unit in outline.units if not unit.block)
        self._alone = outline.units[0].weights[0].numel if outline.embeddings_alone else 0
        buffers = (LOW if setting.numbers_low else FULL) * (whole - self._alone)
        self._parked = strategy.offload and not setting.on_cpu
        if self._parked:
            held = Need(buffers=buffers, host=parameters + self._trained + optimizer)
        else:
            held = Need(parameters, 0, optimizer, buffers=buffers)
        super().__init__(outline, setting, held)

    def gradients(self, after: int) -> int:
        """This rank's rows; they are summed after each micro-batch."""
        if self._parked:
            return 0
        if self.setting.accumulation > 1:
            return self._trained
        weights = (weight for unit in self.units[after + 1 :] for weight in unit.weights)
        return FULL * sum(_rows(weight, self._world) for weight in weights if weight.trained)

    def forward(self, position: int) -> int:
        """This block, and the next one on its way; or embeddings that are by themselves."""
        near = [unit for unit in self.units[max(position - 1, 0) : position + 1] if unit.block]
        return self.compute * (sum(map(_all, near)) + (self._alone if position == 0 else 0))

    def backward(self, position: int) -> int:
        """The whole gradient too, and once more in fp32 to be summed."""
        return self.forward(position) + (self.compute + FULL) * _trained(self.units[position])


class _Zero(_Spread):
    """DeepSpeed ZeRO: each rank a flat piece of all weights together."""

    def __init__(self, outline: Outline, strategy: Strategy, setting: Setting) -> None:
        compute = LOW if setting.numbers_low else FULL
        self._stage, self._parameters, self._all_trained = strategy.stage, outline.parameters, outline.trained
        self._part = -(-outline.trained // setting.world_size)
        self._bucket = min(setting.bucket, outline.trained)
        weights, master = compute * outline.parameters, FULL * self._part
        optimizer = -(-optimizer_bytes(outline, setting) // setting.world_size)
        gradients = buffers = 0
        if self._stage == 3:  # which has a place for them all the time
            weights = -(-weights // setting.world_size)
            gradients, buffers = compute * self._part, compute * self._bucket
        self._parked = strategy.offload and not setting.on_cpu
        if self._parked:
            parked = weights if self._stage == 3 else 0
            held = Need(weights - parked, buffers=buffers, host=parked + 2 * master + optimizer)
        else:
            held = Need(weights + master, gradients, optimizer, buffers=buffers)
        super().__init__(outline, setting, held)

    def gradients(self, after: int) -> int:
        """Of stage 1 all until the last micro-batch, of stage 2 this rank's part."""
        if self._stage == 3 or self._parked:
            return 0
        if self.setting.accumulation > 1:
            return self.compute * (self._all_trained if self._stage == 1 else self._part)
        return self.compute * min(sum(map(_trained, self.units[after + 1 :])), self._part)

    def forward(self, position: int) -> int:
        """Of stage 3 weights that are whole for now."""
        if self._stage < 3:
            return 0
        return self.compute * min(self._parameters, _all(self.units[position]) + PREFETCHED)

    def backward(self, position: int) -> int:
        """Gradients on their way too, where they are gathered to be summed in fp32."""
        gathered = (self.compute if self._stage < 3 else FULL) + FULL * self.setting.numbers_low
        return self.forward(position) + gathered * self._bucket + self.compute * _largest(self.units[position])

    def step(self) -> tuple[int, int]:
        """The gradients of this part, and once more in fp32."""
        if self._parked:
            return 0, 0
        gradients = self.compute * self._part if self._stage < 3 else 0
        return gradients, FULL * self._part


_SPREADS: Mapping[str, type[_Whole] | type[_Sharded] | type[_Zero]] = {
    "single": _Whole,
    "ddp": _Whole,
    "xla": _Whole,
    "fsdp2": _Sharded,
    "zero": _Zero,
}


def _all(unit: Unit) -> int:
    return sum(weight.numel for weight in unit.weights)


def _trained(unit: Unit) -> int:
    return sum(weight.numel for weight in unit.weights if weight.trained)


def _largest(unit: Unit) -> int:
    return max((weight.numel for weight in unit.weights if weight.trained), default=0)


def _rows(weight: Weight, world: int) -> int:
    """Numbers of the largest part where rows are dealt out."""
    return -(-weight.shape[0] // world) * math.prod(weight.shape[1:])
