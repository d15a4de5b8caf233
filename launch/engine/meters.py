"""Where the time of a run goes, and how fast it is. Every moment of the training thread is accounted for once."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import Work

PHASES = ("data", "compute", "sync", "save", "evaluate", "other")
"""Waiting for a batch; computing; waiting for other ranks, and exchanging with them, in an update; the rest by name."""


class Clock:
    """Seconds by phase. A phase inside another one takes its time from it."""

    def __init__(self, device: str = "cpu", ranks: int = 1) -> None:
        """`device` is the kind of device that computes, `ranks` how many processes train together."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        """Since the clock was made."""
        self.alone_seconds = 0.0
        """That a GPU among others has spent on computing without an exchange inside."""
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._phases = ["other"]
        self._since = time.perf_counter()
        self._alone, self._cuda = ranks == 1, device == "cuda" and ranks > 1
        self._own = _OwnTime() if device == "cpu" and ranks > 1 else None

    def read(self) -> dict[str, float]:
        """Seconds by phase up to now."""
        self._turn()
        return dict(self.seconds)

    def _turn(self) -> None:
        now = time.perf_counter()
        self.seconds[self._phases[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What happens inside belongs to this phase."""
        self._turn()
        self._phases.append(name)
        try:
            yield
        finally:
            self._turn()
            self._phases.pop()

    @contextlib.contextmanager
    def exchange(self) -> Iterator[None]:
        """Around an exchange alone; what a GPU still has to compute before is not waiting for others.

        A process on its own exchanges nothing: its GPU is waited for only where a number of it is wanted.
        """
        if self._cuda:
            torch.cuda.current_stream().synchronize()  # the exchange would wait for it too
            self.alone_seconds += sum(before.elapsed_time(after) for before, after in self._events) / 1000
            self._events.clear()
        with self.phase("compute" if self._alone else "sync"):
            yield

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Around computing; what the thread was blocked in exchanges inside is `sync`.

        So on CPUs. On GPUs such exchanges go on beside computing, and no clock of the CPU can tell what they cost.
        """
        if self._own is None:
            with self.phase("compute"):
                yield
            return
        began, own = time.perf_counter(), self._own.read()
        with self.phase("compute"):
            yield
        self._was_waiting(time.perf_counter() - began - (self._own.read() - own))

    @contextlib.contextmanager
    def forward(self, *, gathers: bool) -> Iterator[None]:
        """Around a forward pass, and all else that the recipe does in its loss; `gathers`: it waits for weights.

        On CPUs only the waiting in its exchanges is `sync`: sleeping, or reading a file, is the rank's own time. A GPU
        is timed where it gathers nothing; otherwise its queue waits for others in between, and nothing is told of it.
        """
        if self._own is None:
            with self.phase("compute"), contextlib.nullcontext() if gathers else self._timed():
                yield
            return
        exchanges = _exchange_time()
        before = exchanges.seconds
        with self.phase("compute"):
            yield
        self._was_waiting(exchanges.seconds - before)

    def _was_waiting(self, seconds: float) -> None:
        """So much of the computing just now was waiting for others."""
        waited = max(0.0, seconds)
        self.seconds["compute"] -= waited
        self.seconds["sync"] += waited

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        """Also by the GPU, which computes later."""
        if not self._cuda:
            yield
            return
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record()
        yield
        after.record()
        self._events.append((before, after))

    def own_compute(self) -> float:
        """Seconds of computing in which no other rank can have had a part, as far as that can be told."""
        return self.alone_seconds if self._cuda else self.seconds["compute"]


class _OwnTime:
    """Seconds that the calling thread has run, or was ready to but for want of a core: not those it was blocked."""

    def __init__(self) -> None:
        # Linux' Documentation/scheduler/sched-stats.rst: time on the CPU, time waiting for one, in ns. The first is as
        # old as the last tick of the scheduler, thread_time() is not.
        self._file = None
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                self._file = os.open("/proc/thread-self/schedstat", os.O_RDONLY)

    def read(self) -> float:
        waited = 0 if self._file is None else int(os.pread(self._file, 64, 0).split()[1])
        return time.thread_time() + waited / 1e9


class _ExchangeTime:
    """Seconds that the calling thread has waited in `Work.wait`, by which Python code awaits the end of an exchange.

    So FSDP2 and ZeRO-3 await the weights of a forward pass (torch 2.13, `_fsdp_collectives.py`; DeepSpeed 0.19,
    `AllGatherHandle`), and recipes what they exchange themselves. C++ code does not pass here: DDP's in a backward
    pass, and DTensor's.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        thread, wait = threading.get_ident(), Work.wait

        def await_exchange(work: Work, *arguments: Any, **options: Any) -> Any:
            if threading.get_ident() != thread:
                return wait(work, *arguments, **options)
            began = time.perf_counter()
            try:
                return wait(work, *arguments, **options)
            finally:
                self.seconds += time.perf_counter() - began

        Work.wait = await_exchange  # type: ignore[assignment, method-assign]


@functools.cache
def _exchange_time() -> _ExchangeTime:
    """The one of this process."""
    return _ExchangeTime()


@dataclass(frozen=True)
class Reading:
    """What happened between two readings of a meter."""

    seconds: dict[str, float]
    """By phase; together all of the time."""
    tokens_per_second: float
    """Without saves and evaluations."""


class Meter:
    """Counts tokens by the clock."""

    def __init__(self, clock: Clock) -> None:
        self.tokens = 0
        """Tokens, without padding, since the beginning of the run."""
        self._clock = clock
        self._then = clock.read()
        self._tokens_then = 0
        self._before: dict[str, float] = {}

    def add(self, tokens: int) -> None:
        """Count the tokens of one update."""
        self.tokens += tokens

    def resume(self, tokens: int, seconds: dict[str, float]) -> None:
        """Go on from what an earlier attempt has counted."""
        self.tokens = self._tokens_then = tokens
        self._before = seconds

    def totals(self) -> dict[str, float]:
        """Seconds by phase of all attempts, up to now."""
        return {phase: self._before.get(phase, 0.0) + spent for phase, spent in self._clock.read().items()}

    def read(self) -> Reading:
        """What happened since the last reading."""
        now = self._clock.read()
        seconds = {phase: now[phase] - self._then[phase] for phase in PHASES}
        training = sum(seconds.values()) - seconds["save"] - seconds["evaluate"]
        rate = (self.tokens - self._tokens_then) / max(training, 1e-9)
        self._then, self._tokens_then = now, self.tokens
        return Reading(seconds, rate)
