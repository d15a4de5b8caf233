"""How losses of micro-batches and ranks add up to the loss of one update: the only place that scales a loss.

A recipe's loss is a sum over targets. The gradient of an update is that of (sum over all ranks and micro-batches)
/ (targets over all ranks and micro-batches), whatever the split: a mean of means would weigh a short sample's
targets more than a long one's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from launch.engine.agree import summed
from launch.engine.batching import MicroBatch
from launch.recipe import Batch


@dataclass(frozen=True)
class Counts:
    """Sizes of some batches, without fillers."""

    samples: int = 0
    targets: int = 0
    """What the loss is averaged over."""
    tokens: int = 0
    """Input tokens that are not padding."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.samples + other.samples, self.targets + other.targets, self.tokens + other.tokens)


def count_batch(micro_batch: MicroBatch, batch: Batch, count: Callable[[Batch], int]) -> Counts:
    """The counts of one CPU batch; a filler counts for nothing, nor do rows beyond the samples."""
    if micro_batch.filler:
        return Counts()
    samples = len(micro_batch.samples)
    if any(tensor.dim() and len(tensor) > samples for tensor in batch.values()):
        batch = {name: tensor[:samples] if tensor.dim() else tensor for name, tensor in batch.items()}
    return Counts(samples, count(batch), count_tokens(batch))


def count_over_ranks(accelerator: Accelerator, local: Counts, *others: int) -> tuple[Counts, list[int]]:
    """The sums over all ranks of the counts, and of any `others`, in one exchange. Every rank must call this."""
    numbers = [local.samples, local.targets, local.tokens, *others]
    if accelerator.num_processes > 1:
        numbers = summed(accelerator, torch.tensor(numbers, device=accelerator.device)).tolist()
    samples, targets, tokens, *rest = numbers
    return Counts(samples, targets, tokens), rest


def count_tokens(batch: Batch) -> int:
    """Input tokens of a batch that are not padding."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return batch["input_ids"].numel() if "input_ids" in batch else 0


def weigh(summed: torch.Tensor, counts: Counts, world_size: int) -> torch.Tensor:
    """The loss to call backward on, so that the gradients averaged over ranks are those of the update's mean loss.

    Data-parallel engines average gradients over ranks, hence `world_size`. An update without any target has
    zero gradients.
    """
    return summed * (world_size / max(counts.targets, 1))


def precise_dtype(device: torch.device) -> torch.dtype:
    """The dtype to add up losses in: float64, but float32 on Apple's Metal, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
