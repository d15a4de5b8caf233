"""Exact evaluation over all ranks: each sample once, summed losses divided by the number of targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from launch.engine.batching import deal, load
from launch.engine.loss import Counts, count_batch, count_over_ranks, precise_dtype
from launch.recipe import Batch, Samples


@dataclass(frozen=True)
class Score:
    """The validation loss and what it is a mean of; the same on every rank."""

    loss: float
    counts: Counts


@dataclass(frozen=True)
class Evaluation:
    """How to evaluate a model on one dataset."""

    accelerator: Accelerator
    samples: Samples
    collate: Callable[[list[Any]], dict[str, torch.Tensor]]
    loss: Callable[[torch.nn.Module, Batch], torch.Tensor]
    count: Callable[[Batch], int]
    batch_size: int
    max_samples: int | None = None
    workers: int = 0

    @property
    def size(self) -> int:
        """Samples that are evaluated."""
        return min(len(self.samples), self.max_samples or len(self.samples))

    def __call__(self, model: torch.nn.Module, advance: Callable[[int], None] = lambda samples: None) -> Score:
        """Mean loss over all targets, in float64 sums. Every rank must call this; leaves the model's mode alone.

        `advance` hears, after each batch, how many samples all ranks together have finished since the last.
        """
        accelerator = self.accelerator
        cells = deal(range(self.size), self.batch_size, accelerator.process_index, accelerator.num_processes)
        precise = precise_dtype(accelerator.device)
        total = torch.zeros((), dtype=precise, device=accelerator.device)
        counted = Counts()
        was_training = model.training
        model.eval()
        with torch.no_grad():
            batches = load(self.samples, lambda: cells, self.collate, self.workers, accelerator.device.type == "cuda")
            row = self.batch_size * accelerator.num_processes
            for position, (cell, batch) in enumerate(zip(cells, batches, strict=True)):
                summed = self.loss(model, send_to_device(batch, accelerator.device, non_blocking=True))
                if not cell.filler:
                    total += summed.to(precise)
                counted += count_batch(cell, batch, self.count)
                advance(min(row, self.size - position * row))
        model.train(was_training)
        total = accelerator.reduce(total, "sum")
        counts = count_over_ranks(accelerator, counted)
        return Score(float(total) / max(counts.targets, 1), counts)
