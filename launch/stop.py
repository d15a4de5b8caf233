"""Signals that ask a run to stop: what a worker does with them, and how it writes down that it has stopped."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from launch.errors import INTERRUPTED, PREEMPTED, with_causes
from launch.record import write_json

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""What asks for a stop: systems and schedulers (TERM, USR1, USR2), a person (INT), a terminal that closes (HUP)."""

STOPPED = "stopped.json"
"""How a run was stopped, in its folder."""

LOST_SECONDS = 0.02
"""How soon a signal is sent again whose exception could not be raised: what Python was in has ended by then."""


class StopSignal(BaseException):
    """Ends a preparation, wherever it is; no `except Exception` may keep it."""

    def __init__(self, number: int) -> None:
        super().__init__(spoken(number))
        self.number = number


class StopRequest:
    """Whether this process was asked to stop. While there is nothing to save yet, that ends it at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        """The first signal; torchrun and SLURM may deliver it once more each."""
        self.immediate = True
        """Whether the signal raises `StopSignal`; False: it only leaves its number here."""
        self.honoured = False
        """Whether training has stopped for it."""

    def install(self) -> None:
        """Receive the signals from now on. In the main thread."""
        self._process = os.getpid()
        _keep_while_forking()
        self._unraisable = sys.unraisablehook
        sys.unraisablehook = self._take_back
        for number in receivable():
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if os.getpid() != self._process:  # a forked child, of a pool say, which its parent ends by SIGTERM
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if self.number is None:
            self.number = number
            if self.immediate:
                raise StopSignal(number)

    def _take_back(self, lost: sys.UnraisableHookArgs) -> None:
        """Have a signal arrive once more that came where Python only prints what is raised.

        So it does in what it calls around a fork (`os.register_at_fork`), in `__del__` and in callbacks of weakref.
        """
        if not isinstance(lost.exc_value, StopSignal):
            self._unraisable(lost)
            return
        self.number = None
        with contextlib.suppress(RuntimeError):  # Python is ending, and starts no thread any more
            again = threading.Timer(LOST_SECONDS, os.kill, (self._process, lost.exc_value.number))
            again.daemon = True
            again.start()


@functools.cache
def _keep_while_forking() -> None:
    """Have a forked child receive the SIGTERM that its parent sends before it has come to itself.

    Python forgets in a child what has arrived until then (`PyOS_AfterFork_Child`), and a pool that is closed as soon as
    it is there would wait for ever for a worker that it has ended. So the signal is held back meanwhile.
    """
    held = threading.local()

    def hold() -> None:
        held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def release() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, held.mask)

    os.register_at_fork(before=hold, after_in_parent=release, after_in_child=release)


@contextlib.contextmanager
def uncovered() -> Iterator[None]:
    """Raise the `StopSignal` that an error inside goes back to, instead of the error.

    Compiled code that a signal finds at work reports it as an error of its own: pybind11's start of a module as
    `ImportError: initialization failed`, which `transformers` wraps once more.
    """
    try:
        yield
    except Exception as error:
        for behind in with_causes(error):
            if isinstance(behind, StopSignal):
                raise behind from None
        raise


def receivable() -> list[signal.Signals]:
    """The signals to handle: all, but SIGHUP stays ignored where `nohup` has seen to that."""
    return [each for each in SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]


def ignore_signals(worker: int = 0) -> None:  # noqa: ARG001
    """In a child that its rank needs until its work is done, a data worker or the export check: ignore the signals."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def exit_code(number: int) -> int:
    """What a process stopped by this signal ends with."""
    return INTERRUPTED if number == signal.SIGINT else PREEMPTED


def spoken(number: int) -> str:
    """What a person calls it."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def write_stopped(folder: Path, number: int, update: int, checkpoint: Path | None) -> None:
    """Write down that all ranks have stopped after this update, and the checkpoint they have left, if any."""
    content = {
        "signal": signal.Signals(number).name,
        "update": update,
        "checkpoint": checkpoint.relative_to(folder).as_posix() if checkpoint else None,
        "time": time.time(),
    }
    write_json(folder / STOPPED, content)
