"""Things made ahead of time by worker processes, which are forked once, before the rank has threads."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory as pinned

from launch.stop import ignore_signals


class Feed:
    """Applies a function to tasks, in their order; with `workers` processes ahead of time.

    The workers are forked here and then serve pass after pass. Once there is a process group no fork is safe: a thread
    of gloo makes itself known to Python whenever it frees a tensor, and CPython before 3.11.10 forks a child that waits
    for ever if that happens just then (github.com/python/cpython/issues/112275, seen at the start of an evaluation).
    Nothing is pickled on Linux, so `make` may hold whatever it likes. Each worker has a copy of it.
    """

    def __init__(self, make: Callable[[Any], Any], workers: int = 0, pin_memory: bool = False, seed: int = 0) -> None:
        self._make, self._pin_memory = make, pin_memory
        self._tasks = _Tasks()
        self._loader: DataLoader[Any] | None = None
        if workers:
            if torch.distributed.is_initialized():
                raise RuntimeError("data workers must be started before the process group")
            self._loader = DataLoader(
                _Made(make),  # type: ignore[arg-type]  # any object with __getitem__ serves
                sampler=self._tasks,
                batch_size=None,
                collate_fn=_as_it_is,
                num_workers=workers,
                persistent_workers=True,
                worker_init_fn=ignore_signals,
                generator=torch.Generator().manual_seed(seed),  # leaves the rank's own random numbers alone
                multiprocessing_context="fork" if sys.platform == "linux" else None,  # Python 3.14 would pickle
            )
            iterator: Any = iter(self._loader)  # starts them; there is no task yet
            # Not left to its __del__: of an iterator in a cycle the queues are gone first, and each worker that does
            # not hear of the end costs 5 s. When Python ends, this must come before it closes queues (priority 10) and
            # waits for its children, which ignore the SIGTERM that it sends them; and in a process that is not a child
            # itself, before torch's own handler, after which workers are left alone.
            self._end = Finalize(self, iterator._shutdown_workers, exitpriority=100)
            atexit.register(self._end)

    def __call__(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """What `make` gives for each task. Ends the pass before, whether or not all of it was taken."""
        if self._loader is None:
            made: Iterator[Any] = map(self._make, tasks)
        else:
            self._tasks.given = tasks
            made = iter(self._loader)
        return map(self._finished, made)  # a method, so that a pass keeps its workers

    def _finished(self, made: Any) -> Any:
        # By the rank itself: DataLoader would start a thread for it on the device that is current before there is a
        # process group, which is the first one on every rank.
        return pinned(made) if self._pin_memory else made  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """End the workers."""
        if self._loader is not None:
            self._loader = None
            self._end()
            atexit.unregister(self._end)


class _Tasks:
    """A sampler: DataLoader iterates over it, in this process, to learn what comes next."""

    def __init__(self) -> None:
        self.given: Iterable[Any] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.given)


class _Made:
    """A dataset whose indices are tasks."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make = make

    def __getitem__(self, task: Any) -> Any:
        return self._make(task)


def _as_it_is(made: Any) -> Any:
    """What DataLoader does with the result, instead of making tensors of its numbers."""
    return made
