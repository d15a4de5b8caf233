"""Which samples each update consumes and which rank handles them: a function of seed and update alone.

One update consumes one *window* of `global_batch_size` samples, in an order that does not depend on the number of
processes. A window is dealt out to (step, rank) cells of `micro_batch_size` samples. The last window of an epoch
may be short; cells left empty are filled with a sample that counts for nothing, so every rank makes the same
number of forward and backward passes: with sharded weights each pass is a collective. No sample is dropped, none is
repeated within an epoch.

Which samples are together in a window decides what an update is; which cell of it a sample is in does not. So where
their lengths are known those of like length share a step, on all ranks, and little is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import tee
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from launch.engine.cutting import parts
from launch.engine.feed import Feed
from launch.recipe import Samples

if TYPE_CHECKING:
    from launch.recipe import Lengths

Indices = range | np.ndarray[Any, np.dtype[np.int64]]
Collate = Callable[[list[Any]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class MicroBatch:
    """What one rank handles at once."""

    samples: tuple[int, ...]
    """Indices into the dataset; of a stream, positions in its epoch."""
    filler: bool = False
    """Whether it only keeps this rank in step: its samples count for nothing."""


@dataclass(frozen=True)
class Window:
    """The samples of one update, as far as this rank is concerned."""

    update: int
    """Counted from 1 over the whole run."""
    epoch: int
    """Counted from 0."""
    consumed: int
    """Samples of this epoch consumed once the update is done, over all ranks."""
    micro_batches: tuple[MicroBatch, ...]


@dataclass(frozen=True)
class Position:
    """How far a run is."""

    update: int = 0
    epoch: int = 0
    """Of the last update."""
    consumed: int = 0
    """Samples of this epoch that all ranks together have consumed."""


Work = Iterator[tuple[Window, list[dict[str, torch.Tensor]]]]
"""Window after window, each with this rank's micro-batches, collated, on the CPU."""


def epoch_order(samples: int, seed: int, epoch: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """A permutation of `range(samples)`, shape `(samples,)`.

    `RandomState` because numpy guarantees its streams to stay as they are in all versions (NEP 19); newer
    generators and torch.randperm give no such promise, and a resumed run must find the same order.
    """
    return np.random.RandomState([seed, epoch]).permutation(samples)


def deal(indices: Indices, micro_batch_size: int, rank: int, world_size: int) -> tuple[MicroBatch, ...]:
    """This rank's share of `indices`; every rank gets the same number of micro-batches."""
    assert len(indices), "a window holds at least one sample"
    row = micro_batch_size * world_size
    dealt = []
    for start in range(0, len(indices), row):
        own = indices[start + rank * micro_batch_size : min(start + (rank + 1) * micro_batch_size, start + row)]
        if len(own):
            dealt.append(MicroBatch(tuple(int(index) for index in own)))
        else:
            dealt.append(MicroBatch((int(indices[start]),), filler=True))
    return tuple(dealt)


def longest_first(indices: Indices, lengths: Lengths) -> np.ndarray[Any, np.dtype[np.int64]]:
    """`indices` in the order of their lengths; of equal ones, as they were."""
    found = np.asarray(indices)
    return found[np.argsort(-lengths[found], kind="stable")]


def deal_by_length(
    indices: Indices, lengths: Lengths, micro_batch_size: int, rank: int, world_size: int, turn: int, *, cut: bool
) -> tuple[MicroBatch, ...]:
    """The same as `deal`, but the longest samples in the first step; in each step all ranks have such of like length.

    With `cut`, steps are cut further where that saves padding. `lengths` are of all samples, shape `(samples,)`. Ranks
    take turns at the longest sample of a step, beginning with rank `turn`: all of its cell is padded to that.
    """
    ordered = longest_first(indices, lengths)
    dealt: list[MicroBatch] = []
    for start in range(0, len(ordered), micro_batch_size * world_size):
        row = ordered[start : start + micro_batch_size * world_size]
        for rows in parts(lengths[row[::world_size]]) if cut else [micro_batch_size]:
            step, row = row[: rows * world_size], row[rows * world_size :]
            own = step[(rank - turn - len(dealt)) % world_size :: world_size]
            dealt.append(MicroBatch(tuple(own.tolist()) or (int(step[-1]),), filler=not len(own)))
    return tuple(dealt)


@dataclass(frozen=True)
class Order:
    """The windows of a run, reached at any update without walking through those before it."""

    samples: int
    global_batch_size: int
    micro_batch_size: int
    seed: int | None
    """None: the samples as they lie, unshuffled, or the longest first where lengths are known."""
    rank: int
    world_size: int
    lengths: Lengths | None = None
    """Tokens of each sample, or of more, the same on every rank; None: samples are dealt out as they come."""
    cut: bool = False
    """Whether micro-batches are cut further where that saves padding."""

    @property
    def per_epoch(self) -> int:
        """Windows in one pass over the samples."""
        return -(-self.samples // self.global_batch_size)

    def windows(self, first_update: int, last_update: int) -> Iterator[Window]:
        """Windows `first_update..last_update`, both included, counted from 1."""
        order: Indices = range(self.samples)
        if self.seed is None and self.lengths is not None:
            order = longest_first(order, self.lengths)
        order_epoch = -1
        for update in range(first_update, last_update + 1):
            epoch, position = divmod(update - 1, self.per_epoch)
            if self.seed is not None and order_epoch != epoch:
                order, order_epoch = epoch_order(self.samples, self.seed, epoch), epoch
            start = position * self.global_batch_size
            indices = order[start : start + self.global_batch_size]
            yield Window(update, epoch, start + len(indices), self._deal(indices, update))

    def _deal(self, indices: Indices, update: int) -> tuple[MicroBatch, ...]:
        sizes = (self.micro_batch_size, self.rank, self.world_size)
        if self.lengths is None:
            return deal(indices, *sizes)
        return deal_by_length(indices, self.lengths, *sizes, turn=update, cut=self.cut)


class Loader:
    """Batches of samples by index; with `workers` processes, forked here, they come ahead of time."""

    def __init__(
        self,
        samples: Samples,
        collate: Collate,
        workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
        lengths: Lengths | None = None,
    ) -> None:
        self.samples = samples
        self.lengths = lengths
        """Tokens of each sample; None: they are dealt out as they come."""
        self.feed = Feed(_Batches(samples, collate), workers, pin_memory, seed)

    def load(self, windows: Callable[[], Iterable[Window]]) -> Work:
        """Each of `windows()` with its batches."""
        ahead, now = tee(windows())  # data workers are ahead; a window is dealt out once
        batches = self.feed((window.epoch, each.samples) for window in ahead for each in window.micro_batches)
        return ((window, [next(batches) for _ in window.micro_batches]) for window in now)


@dataclass(frozen=True)
class _Batches:
    """Makes a batch of samples by their epoch and indices."""

    samples: Samples
    collate: Collate

    def __call__(self, task: tuple[int, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        epoch, indices = task
        if hasattr(self.samples, "set_epoch"):  # with each task, for each data worker has samples of its own
            self.samples.set_epoch(epoch)
        # As torch's fetcher does: `datasets` reads many rows at once much faster than one after the other.
        if getattr(self.samples, "__getitems__", None):
            return self.collate(self.samples.__getitems__(list(indices)))  # type: ignore[attr-defined]
        return self.collate([self.samples[index] for index in indices])
