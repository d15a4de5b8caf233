"""The one training loop. Sees no files, no environment, no recipe names and no configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from launch.engine.agree import NONE, Requests, raise_if_loss_is_not_finite, raise_if_norm_is_not_finite
from launch.engine.batching import MicroBatch, Window
from launch.engine.loss import Counts, count_batch, count_over_ranks, precise_dtype, weigh
from launch.engine.sharding import Updates
from launch.recipe import Batch


@dataclass(frozen=True)
class StepResult:
    """What one update did, the same on every rank."""

    loss: float
    """Mean over all targets of the update."""
    gradient_norm: float
    """Global L2 norm before clipping."""
    counts: Counts
    overflows: int = 0
    """How often the update was repeated because a gradient overflowed in fp16."""
    requests: Requests = NONE
    """How many ranks wanted what when the update began."""


@dataclass(frozen=True)
class Step:
    """Everything one update needs, besides its data."""

    accelerator: Accelerator
    model: torch.nn.Module
    updates: Updates
    loss: Callable[[torch.nn.Module, Batch], torch.Tensor]
    count: Callable[[Batch], int]
    requests: Callable[[], Requests] = Requests
    """What this rank wants at the moment."""

    def __call__(self, window: Window, batches: list[dict[str, torch.Tensor]]) -> StepResult:
        """Make one update from this rank's micro-batches. Every rank must call this.

        An update whose gradient overflows in fp16 is repeated with half the loss scale rather than skipped: no sample
        is lost, and the learning rate stays the one of its update.

        Raises:
            NonFiniteError: on all ranks, before the weights are touched.
        """
        pairs = list(zip(window.micro_batches, batches, strict=True))
        local_counts = sum((count_batch(*pair, self.count) for pair in pairs), Counts())
        counts, wanted = count_over_ranks(self.accelerator, local_counts, *astuple(self.requests()))
        overflows = 0
        while True:
            total = self._forward_and_backward(window, pairs, counts)
            norm = self.updates.apply()
            if math.isfinite(norm) or not self.updates.may_repeat():
                break
            overflows += 1
        raise_if_norm_is_not_finite(window, norm)
        return StepResult(total / max(counts.targets, 1), norm, counts, overflows, Requests(*wanted))

    def _forward_and_backward(
        self, window: Window, pairs: list[tuple[MicroBatch, dict[str, torch.Tensor]]], counts: Counts
    ) -> float:
        """Add up gradients; the summed loss of the update, over all ranks."""
        sums = []
        for position, (micro_batch, batch) in enumerate(pairs):
            with self.updates.micro_batch(last=position == len(pairs) - 1):
                on_device = send_to_device(batch, self.accelerator.device, non_blocking=True)
                summed = self.loss(self.model, on_device)
                if micro_batch.filler:
                    summed = summed * 0.0
                self.updates.backward(weigh(summed, counts, self.accelerator.num_processes))
            sums.append(summed.detach())
        local = torch.stack(sums).to(precise_dtype(self.accelerator.device))
        total = float(self.accelerator.reduce(local.sum(), "sum"))  # host sync
        raise_if_loss_is_not_finite(self.accelerator, window, local, total)
        return total


def fit(
    step: Step,
    work: Iterable[tuple[Window, list[dict[str, torch.Tensor]]]],
    learning_rate: Callable[[int], float],
    after_update: Callable[[Window, StepResult], bool],
) -> None:
    """Train on windows and this rank's batches of each, until they end or `after_update` returns True.

    Every rank must call this.
    """
    step.model.train()
    for window, batches in work:
        set_learning_rate(step.updates.optimizer, learning_rate(window.update))
        if after_update(window, step(window, batches)):
            return


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the rate of all parameter groups."""
    groups: list[dict[str, Any]] = optimizer.param_groups
    for group in groups:
        group["lr"] = value
