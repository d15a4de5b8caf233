"""How long a run is and which learning rate each update has: pure functions, used by plan and engine alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from launch.errors import ConfigError

if TYPE_CHECKING:
    from launch.sections import RunConfig


def updates_per_epoch(samples: int, global_batch_size: int) -> int:
    """Updates in one pass over `samples`; the last one may hold fewer than `global_batch_size`."""
    return math.ceil(samples / global_batch_size)


def total_updates(samples: int, global_batch_size: int, epochs: float | None, max_steps: int | None) -> int:
    """Updates of the whole run, from the one of `epochs` and `max_steps` that is given."""
    if max_steps is not None:
        return max_steps
    assert epochs is not None, "the configuration states one of the two"
    return math.ceil(_as_written(epochs) * updates_per_epoch(samples, global_batch_size))


def warmup_updates(total: int, warmup_ratio: float | None, warmup_steps: int | None) -> int:
    """Updates spent warming up, never more than there are."""
    if warmup_steps is not None:
        return min(warmup_steps, total)
    return math.floor(_as_written(warmup_ratio or 0.0) * total)


def check_stream(config: RunConfig, place: Callable[[str], str] | None = None) -> None:
    """See that nothing of a run over a stream depends on how many samples there are.

    Raises:
        ConfigError: a key counts in epochs; `place` says where it is stated.
    """
    for key, value, instead in (
        ("eval.every_epochs", config.eval.every_epochs, "eval.every_steps"),
        ("train.epochs", config.train.epochs, "train.max_steps"),
    ):
        if value is not None:
            where = f"{place(key)}: " if place else ""
            raise ConfigError(
                f"{where}{key} = {value:g}: the training data of {config.recipe} is a stream, of which only the end "
                f"tells the length; state {instead} instead"
            )


def _as_written(value: float) -> Fraction:
    """The decimal a user wrote: 1.1 epochs of 100 updates are 110, though 1.1 * 100 is a little more in binary."""
    return Fraction(repr(value))


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the update, and of nothing else.

    Updates are counted from 1. The peak is at update `max(warmup, 1)`; linear and cosine reach 0 one update
    after the last, so neither the first nor the last update is spent at a rate of 0.
    """

    kind: Literal["linear", "cosine", "constant"]
    peak: float
    warmup: int
    total: int

    def learning_rate(self, update: int) -> float:
        """Learning rate of `update`, in 1..total."""
        if update < self.warmup:
            return self.peak * update / self.warmup
        if self.kind == "constant":
            return self.peak
        top = max(self.warmup, 1)
        progress = (update - top) / (self.total - top + 1)
        if self.kind == "linear":
            return self.peak * (1.0 - progress)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * progress))
