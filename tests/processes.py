"""A launcher as a user starts it, watched from outside: its ranks, signals to any of its processes, what is left."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests.commands import ROOT


class Launcher:
    """`python -m …` in a process of its own, and everything below it."""

    def __init__(self, folder: Path, *arguments: str, **environment: str) -> None:
        self._said = folder / "said.txt"
        with self._said.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=folder,
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "SHOAL_CACHE": str(folder / "cache"),
                    **environment,
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._seen: set[psutil.Process] = set()

    def said(self) -> str:
        """What it has written so far."""
        return self._said.read_text()

    def below(self) -> list[psutil.Process]:
        """All its descendants now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._seen |= {*psutil.Process(self.process.pid).children(recursive=True)}
        return [process for process in self._seen if alive(process)]

    def ranks(self) -> list[psutil.Process]:
        """The workers."""
        return [process for process in self.below() if is_rank(process)]

    def until(self, what: Callable[[], object], seconds: float = 60) -> None:
        """Wait for something that this launcher brings about."""
        deadline = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.said()}"
            assert time.monotonic() < deadline, self.said()
            self.below()
            time.sleep(0.05)

    def signal(self, number: int, to: str = "launcher") -> None:
        """Send a signal to the launcher, to the last of its ranks, or to all processes."""
        if to == "launcher":
            self.process.send_signal(number)
        elif to == "one rank":
            max(self.ranks(), key=lambda rank: rank.pid).send_signal(number)
        else:
            for process in [psutil.Process(self.process.pid), *self.below()]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def end(self, seconds: float = 60) -> int:
        """Wait for its end; its exit code. Nothing of it may be left then."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.said()
            self.below()
            time.sleep(0.05)
        assert self.below() == [], "no process outlives its launcher"
        return self.process.returncode

    def kill(self) -> None:
        """Leave nothing behind, however the test ends."""
        for process in self.below():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def launched(folder: Path, *arguments: str, **environment: str) -> Iterator[Launcher]:
    """A launcher, started in `folder`."""
    launcher = Launcher(folder, *arguments, **environment)
    try:
        yield launcher
    finally:
        launcher.kill()


def alive(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended and that nobody has waited for does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def is_rank(process: psutil.Process) -> bool:
    """Whether it was started as a worker."""
    with contextlib.suppress(psutil.Error):
        command = process.cmdline()
        return "launch.train" in command or (command[1:3] == ["-m", "tests.stand_in"] and len(command) == 4)
    return False
