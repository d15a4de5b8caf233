"""Exact evaluation over all ranks: each sample once, summed losses divided by the number of targets.

Metrics are not averages over ranks either: what was predicted of every sample is brought together, in the order of the
samples, and one rank measures it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator

from launch.engine.agree import any_rank, from_main, gathered, raise_together, summed
from launch.engine.batching import Loader, Order, Work
from launch.engine.devices import Devices
from launch.engine.loss import Counts, count_batch, count_over_ranks, precise_dtype
from launch.engine.streams import Reader
from launch.errors import ConfigError, LaunchError
from launch.recipe import Batch, Inference, Metrics, Scoring

ASK_EVERY = 8
"""Batches between two questions whether to break off: the answer is an exchange between ranks."""


@dataclass(frozen=True)
class Score:
    """The validation loss and what it is a mean of; the same on every rank."""

    loss: float
    counts: Counts
    metrics: dict[str, float] = field(default_factory=dict)
    """What the recipe has measured, as far as it is numbers."""
    details: dict[str, Any] = field(default_factory=dict)
    """What else it has found out; on rank 0 only."""


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
    scoring: Scoring | None = None
    inference: Callable[[torch.nn.Module], Inference] | None = None
    """The model as the recipe uses it to predict; needed where there is a scoring."""
    devices: Devices = field(default_factory=Devices)

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
        total: float | torch.Tensor = 0.0
        predictions: list[tuple[int, Any]] = []
        counted = Counts()
        was_training = model.training
        model.eval()
        finished = 0
        with torch.no_grad():
            for number, (window, (batch,)) in enumerate(self._work(), 1):
                (cell,) = window.micro_batches
                sum_of_batch, predicted = self._predict(model, self.devices.place(accelerator, batch))
                if not cell.filler:
                    total = total + self.devices.precise([sum_of_batch])[0]
                    predictions += self._numbered(cell.samples, predicted)
                counted += count_batch(cell, batch, self.count)
                advance(window.consumed - finished)
                finished = window.consumed
                if number % ASK_EVERY == 0 and any_rank(accelerator, interrupted()):
                    model.train(was_training)
                    return None
        model.train(was_training)
        device = accelerator.device
        total = summed(accelerator, torch.as_tensor(total, dtype=precise_dtype(device), device=device))
        counts, _ = count_over_ranks(accelerator, counted)
        return Score(float(total) / max(counts.targets, 1), counts, *self._measure(predictions))

    def _predict(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[Any]]:
        if self.scoring is None:
            return self.loss(model, batch), []
        assert self.inference is not None, "a scoring comes with it"
        return self.scoring.predict(self.inference(model), batch)

    def _numbered(self, samples: tuple[int, ...], predicted: list[Any]) -> list[tuple[int, Any]]:
        """What was predicted, with the positions of the samples.

        Raises:
            ConfigError: not one prediction for each sample.
        """
        if self.scoring is None:
            return []
        if self.devices.fills:
            predicted = predicted[: len(samples)]
        if len(predicted) != len(samples):
            raise ConfigError(
                f"the recipe's Scoring.predict gave {len(predicted)} predictions for a batch of "
                f"{len(samples)} samples; it must give one for each, in their order"
            )
        return list(zip(samples, predicted, strict=True))

    def _measure(self, predictions: list[tuple[int, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
        """Metrics of the predictions of all ranks, the same on each; details on rank 0."""
        if self.scoring is None:
            return {}, {}
        together = gathered(predictions)
        found: Metrics = {}
        problem: LaunchError | None = None
        if self.accelerator.is_main_process:
            in_order = [prediction for _, prediction in sorted(together, key=lambda pair: pair[0])]
            try:
                found = self.scoring.measure(in_order)
            except LaunchError as error:
                problem = error
        raise_together(self.accelerator, problem)
        numbers = {name: float(value) for name, value in found.items() if _is_number(value)}
        return from_main(self.accelerator, numbers), {k: v for k, v in found.items() if k not in numbers}

    def _work(self) -> Work:
        """The samples as they lie, or by length, the longest first; in windows of one batch per rank."""
        if isinstance(self.data, Reader):
            return self.data.epoch(most=self.max_samples)
        accelerator, size = self.accelerator, self.size
        assert size is not None, "samples by index are counted"
        rank, world_size = accelerator.process_index, accelerator.num_processes
        order = Order(size, self.batch_size * world_size, self.batch_size, None, rank, world_size, self.data.lengths)
        return self.data.load(lambda: order.windows(1, order.per_epoch))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
