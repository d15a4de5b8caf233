"""Samples that can only be read from the first on, in the windows that samples by index would have.

Every rank, and every worker process of it, reads the whole stream and keeps its own share. So all ranks see its end
at the same window without asking each other, and the windows are the same for any number of ranks, workers and any
micro-batch size. No sample is dropped, and none repeated: the last window of an epoch may be short, and its empty
cells are filled with a sample that counts for nothing (see `batching`). The price is that a stream is read as often
as there are ranks and workers; workers save time where collating is the larger part of the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils import worker as torch_worker

from launch.engine.batching import Collate, MicroBatch, Window, Work, deal
from launch.engine.feed import Feed
from launch.errors import DataError, LaunchError
from launch.recipe import Samples, Stream

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Cell = tuple[Window, dict[str, torch.Tensor]]
"""A window and one of this rank's batches of it."""


def is_stream(data: Samples | Stream) -> TypeIs[Stream]:
    """Whether samples can only be read in order. torch's IterableDataset has a `__getitem__`, but it does not work."""
    return isinstance(data, IterableDataset) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__"))


def size_of(data: Samples | Stream) -> int | None:
    """How many samples there are; None of a stream."""
    return None if is_stream(data) else len(data)


def amount_of(data: Samples | Stream) -> str:
    """The same for people."""
    return "streamed" if is_stream(data) else f"{len(data):,}"


def first_samples(data: Samples | Stream, wanted: int) -> list[Any]:
    """The first `wanted` samples, or as many as there are."""
    if is_stream(data):
        _set_epoch(data, 0)
        return list(islice(data, wanted))
    return [data[index] for index in range(min(wanted, len(data)))]


def _set_epoch(stream: Stream, epoch: int) -> None:
    if hasattr(stream, "set_epoch"):
        stream.set_epoch(epoch)


class Reader:
    """Reads this rank's share of a stream, pass after pass. Every rank must read as far as the others."""

    def __init__(
        self,
        name: str,
        stream: Stream,
        window_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        collate: Collate,
        workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        self._name = name
        """What messages call the stream: training or validation."""
        self._window_size = window_size
        self._stream = stream
        cells = _Cells(stream, window_size, micro_batch_size, rank, world_size, collate)
        self.feed = Feed(cells, workers, pin_memory, seed)
        self._passes = 0

    def windows(self, updates: int, done: int = 0, epoch: int = 0, consumed: int = 0) -> Work:
        """The first `updates` windows, epoch after epoch; or those that follow on `done` of them.

        The last of these was in `epoch` and ended at its sample `consumed`.
        """
        while done < updates:
            for window, batches in self.epoch(epoch, done, consumed + (updates - done) * self._window_size, consumed):
                yield window, batches
                done = window.update
            epoch, consumed = epoch + 1, 0

    def epoch(self, epoch: int = 0, updates_done: int = 0, most: int | None = None, skip: int = 0) -> Work:
        """The windows of one epoch, or of its first `most` samples, after `updates_done` windows.

        The first `skip` samples are read and dropped: a stream knows no other way to its middle.

        Raises:
            DataError: there is no sample.
        """
        self._passes += 1
        task = _Pass(self._passes, epoch, updates_done, most, skip)
        cells, window = _until_end(self.feed(_tasks(self._stream, task))), None
        for window, batch in cells:
            yield window, [batch, *(next(cells)[1] for _ in window.micro_batches[1:])]
        if window is None and not skip:
            raise DataError(
                f"the {self._name} stream gives no sample in epoch {epoch + 1}; it must hold at least one, and begin "
                "with the first each time it is read"
            )


class _Pass(NamedTuple):
    """One reading of a stream: its first `most` samples, of which `skip` are dropped."""

    number: int
    """Counted from 1."""
    epoch: int
    updates_done: int
    most: int | None
    skip: int


def _tasks(stream: Stream, task: _Pass) -> Iterator[_Pass]:
    """The task over and over. Begun when all workers are done with the pass before."""
    _set_epoch(stream, task.epoch)
    yield from repeat(task)


class _Cells:
    """Gives one cell after the other of a pass. Runs where batches are made: in each worker, or in the rank itself."""

    def __init__(
        self, stream: Stream, window_size: int, micro_batch_size: int, rank: int, world_size: int, collate: Collate
    ) -> None:
        self._stream, self._window_size, self._micro_batch_size = stream, window_size, micro_batch_size
        self._rank, self._world_size, self._collate = rank, world_size, collate
        self._worker: tuple[int, int] | None = None
        self._pass: _Pass | None = None
        self._cells: Iterator[Cell | LaunchError] = iter(())

    def __call__(self, task: _Pass) -> Cell | LaunchError | None:
        """The next cell of the pass; None after the last."""
        if task != self._pass:
            self._pass, self._cells = task, self._read(task)
        return next(self._cells, None)

    def _read(self, task: _Pass) -> Iterator[Cell | LaunchError]:
        """Every so many-th of this rank's cells, for DataLoader asks the workers in turn.

        An error meant for the user is handed over, since DataLoader would wrap its message in a traceback.
        """
        self._worker = self._worker or _hide_worker()
        worker, workers = self._worker
        if workers:  # which has a copy; those of `datasets` share their epoch, which the rank has set already: two
            _set_epoch(self._stream, task.epoch)  # workers at once could set it wrongly (`IterableDataset.set_epoch`)
        cells = ((window, samples) for window, shares in self._windows(task) for samples in shares)
        try:
            for window, samples in islice(cells, worker, None, workers or 1):
                yield window, self._collate(samples)
        except LaunchError as error:
            yield error

    def _windows(self, task: _Pass) -> Iterator[tuple[Window, list[list[Any]]]]:
        """Each window with the samples of this rank's cells."""
        samples = islice(self._stream, task.skip, task.most)
        update, consumed = task.updates_done, task.skip
        while rows := list(self._rows(samples, consumed)):
            cells, shares, ends = zip(*rows, strict=True)
            update, consumed = update + 1, ends[-1]
            yield Window(update, task.epoch, consumed, cells), list(shares)

    def _rows(self, samples: Iterator[Any], start: int) -> Iterator[tuple[MicroBatch, list[Any], int]]:
        """Of the window that begins at `start`: each cell of this rank, its samples, and where its row ends.

        A row has one cell per rank; no more than one is held whole.
        """
        end = start
        while wanted := min(self._micro_batch_size * self._world_size, start + self._window_size - end):
            row = list(islice(samples, wanted))
            if not row:
                return
            begin, end = end, end + len(row)
            (cell,) = deal(range(begin, end), self._micro_batch_size, self._rank, self._world_size)
            yield cell, [row[index - begin] for index in cell.samples], end


def _hide_worker() -> tuple[int, int]:
    """Number of this worker process and how many there are, 0 in the rank; from now on a stream cannot see either.

    Streams such as those of `datasets` share themselves out over the workers that torch tells of, but each of ours
    needs the whole. To tell them of a single worker would not do: `datasets` then shuffles in another order than
    outside of a worker.
    """
    information = get_worker_info()
    if information is None:
        return 0, 0
    torch_worker._worker_info = None
    if get_worker_info() is not None:
        raise RuntimeError(f"torch {torch.__version__} cannot hide its workers; use parallel.data_workers=0")
    return information.id, information.num_workers


def _until_end(cells: Iterator[Cell | LaunchError | None]) -> Iterator[Cell]:
    for cell in cells:
        if cell is None:
            return
        if isinstance(cell, LaunchError):
            raise cell
        yield cell
