"""Exact evaluation over all ranks: each sample once, summed losses divided by the number of targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from launch.engine.agree import any_rank
from launch.engine.batching import Loader, Order, Work
from launch.engine.loss import Counts, count_batch, count_over_ranks, precise_dtype
from launch.engine.streams import Reader
from launch.recipe import Batch

ASK_EVERY = 8
"""Batches between two questions whether to break off: the answer is an exchange between ranks."""


@dataclass(frozen=True)
class Score:
    """The validation loss and what it is a mean of; the same on every rank."""

    loss: float
    counts: Counts


@dataclass(frozen=True)
class Evaluation:
    """How to evaluate a model on one dataset."""

    accelerator: Accelerator
    data: Loader | Reader
    """A Reader must give one batch of `batch_size` per rank and window."""
    loss: Callable[[torch.nn.Module, Batch], torch.Tensor]
    count: Callable[[Batch], int]
    batch_size: int
    max_samples: int | None = None

    @property
    def size(self) -> int | None:
        """Samples that are evaluated; None where only the end of a stream will tell."""
        if isinstance(self.data, Reader):
            return None
        samples = len(self.data.samples)
        return min(samples, self.max_samples or samples)

    def __call__(
        self,
        model: torch.nn.Module,
        advance: Callable[[int], None] = lambda samples: None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Score | None:
        """Mean loss over all targets, in float64 sums. Every rank must call this; leaves the model's mode alone.

        `advance` hears, after each batch, how many samples all ranks together have finished since the last. Where
        `interrupted`, asked every few batches, is true of any rank, there is no score.
        """
        accelerator = self.accelerator
        precise = precise_dtype(accelerator.device)
        total = torch.zeros((), dtype=precise, device=accelerator.device)
        counted = Counts()
        was_training = model.training
        model.eval()
        finished = 0
        with torch.no_grad():
            for number, (window, (batch,)) in enumerate(self._work(), 1):
                (cell,) = window.micro_batches
                summed = self.loss(model, send_to_device(batch, accelerator.device, non_blocking=True))
                if not cell.filler:
                    total += summed.to(precise)
                counted += count_batch(cell, batch, self.count)
                advance(window.consumed - finished)
                finished = window.consumed
                if number % ASK_EVERY == 0 and any_rank(accelerator, interrupted()):
                    model.train(was_training)
                    return None
        model.train(was_training)
        total = accelerator.reduce(total, "sum")
        counts, _ = count_over_ranks(accelerator, counted)
        return Score(float(total) / max(counts.targets, 1), counts)

    def _work(self) -> Work:
        """The samples as they lie, in windows of one batch per rank."""
        if isinstance(self.data, Reader):
            return self.data.epoch(most=self.max_samples)
        accelerator, size = self.accelerator, self.size
        assert size is not None, "samples by index are counted"
        rank, world_size = accelerator.process_index, accelerator.num_processes
        order = Order(size, self.batch_size * world_size, self.batch_size, None, rank, world_size)
        return self.data.load(lambda: order.windows(1, order.per_epoch))
