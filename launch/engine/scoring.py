"""Exact evaluation over all ranks: each sample once, summed losses divided by the number of targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from launch.engine.agree import any_rank
from launch.engine.batching import Collate, Order, Work, load
from launch.engine.loss import Counts, count_batch, count_over_ranks, precise_dtype
from launch.engine.streams import Reader, is_stream
from launch.recipe import Batch, Samples, Stream

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
    samples: Samples | Stream
    collate: Collate
    loss: Callable[[torch.nn.Module, Batch], torch.Tensor]
    count: Callable[[Batch], int]
    batch_size: int
    max_samples: int | None = None
    workers: int = 0

    @property
    def size(self) -> int | None:
        """Samples that are evaluated; None where only the end of a stream will tell."""
        if is_stream(self.samples):
            return None
        return min(len(self.samples), self.max_samples or len(self.samples))

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
        samples, size, micro = self.samples, self.size, self.batch_size
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        window, pin_memory = micro * world_size, self.accelerator.device.type == "cuda"
        if is_stream(samples):
            reader = Reader(
                "validation", samples, window, micro, rank, world_size, self.collate, self.workers, pin_memory
            )
            return reader.epoch(most=self.max_samples)
        assert size is not None, "samples by index are counted"
        order = Order(size, window, micro, None, rank, world_size)
        return load(samples, lambda: order.windows(1, order.per_epoch), self.collate, self.workers, pin_memory)
