"""Carries a plan out on this machine: starts the workers, waits, stops them, says how they ended."""

from __future__ import annotations

import contextlib
import ctypes
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from launch.errors import INTERRUPTED, TERMINATED
from launch.plan import Plan
from launch.record import read_json
from launch.topology import worker_environment

GRACE_SECONDS = 10.0
"""How long stopped workers may take to leave before they are killed."""


class _Stopped(Exception):  # noqa: N818  (not an error: the user or the system asked for it)
    def __init__(self, number: int) -> None:
        self.exit_code = INTERRUPTED if number == signal.SIGINT else TERMINATED


@dataclass(frozen=True)
class Ending:
    """How the workers ended: an exit code and, unless that is 0, what to tell the user."""

    exit_code: int
    message: str = ""
    traceback: str = ""
    killed: bool = False
    """Whether a worker was ended by SIGKILL, as the kernel does when memory runs out."""

    @property
    def stopped(self) -> bool:
        """Whether the user or the system asked for it."""
        return self.exit_code in (INTERRUPTED, TERMINATED)


def run(plan: Plan, folder: Path) -> Ending:
    """Start the workers of `plan` and wait for their end; none of them outlives this call.

    Their progress appears on our stderr. Library noise and tracebacks go to logs/, complete.
    """
    with (folder / "logs" / "launcher.log").open("wb") as log, _stop_signals():
        try:
            workers = subprocess.Popen(
                plan.command,
                env=worker_environment({**plan.environment, "SHOAL_SUPERVISED": "1"}),
                stdin=subprocess.DEVNULL,
                stdout=_stderr(),
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches the workers through us alone
                preexec_fn=_die_with_parent,
            )
            try:
                exit_code = workers.wait()
            except _Stopped:
                _stop(workers)
                raise
        except _Stopped as stopped:
            name = "Ctrl-C" if stopped.exit_code == INTERRUPTED else "SIGTERM"
            return Ending(stopped.exit_code, f"stopped by {name}; no process is left, the record is in {folder}")
    if exit_code == 0 and (folder / "result.json").is_file():
        return Ending(0)
    return _failure(folder, exit_code)


def _stderr() -> IO[str] | int:
    """Our stderr as the workers' stdout, also where a test has replaced it by something without a descriptor."""
    try:
        sys.stderr.fileno()
    except (OSError, ValueError):
        return subprocess.DEVNULL
    return sys.stderr


@contextlib.contextmanager
def _stop_signals() -> Iterator[None]:
    """While active, SIGINT and SIGTERM raise `_Stopped`, once: a second one does not disturb the stopping."""

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        for each in previous:
            signal.signal(each, signal.SIG_IGN)
        raise _Stopped(number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _die_with_parent() -> None:
    """Ask Linux to send SIGTERM to this process when the launcher dies, even by SIGKILL (prctl(2), option 1)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _stop(workers: subprocess.Popen[bytes]) -> None:
    """End the workers and all their descendants: asked first, killed after the grace.

    torchrun puts each rank into a session of its own, so a signal to our child's group would not reach them.
    """
    try:
        parent = psutil.Process(workers.pid)
        family = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        parent.terminate()
    _, alive = psutil.wait_procs(family, timeout=GRACE_SECONDS)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=GRACE_SECONDS)
    workers.wait()


def _failure(folder: Path, exit_code: int) -> Ending:
    """What went wrong: the failure that a rank wrote down first, else the end of the logs."""
    failures = [read_json(path) for path in folder.glob("failure-*.json")]
    if _was_killed(folder, exit_code):  # what the other ranks say then is only that they have lost it
        return Ending(
            1,
            "a worker was killed by SIGKILL, as the kernel does when the machine's memory runs out; "
            f"logs: {folder / 'logs'}",
            killed=True,
        )
    if failures:
        first = min(failures, key=lambda failure: failure["time"])
        return Ending(first["exit_code"], first["message"], first["traceback"])
    how = f"killed by signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
    tail = "\n".join(f"  {line}" for path in _logs(folder) for line in _last_lines(path))
    return Ending(1, f"the workers ended without a word ({how}); logs: {folder / 'logs'}", tail)


def _was_killed(folder: Path, exit_code: int) -> bool:
    """Whether the worker, or the first rank to fail as torchrun reports it, was ended by SIGKILL."""
    log = (folder / "logs" / "launcher.log").read_text(encoding="utf-8", errors="replace")
    first = re.search(r"failed \(exitcode: (-?\d+)\)", log)
    return exit_code == -signal.SIGKILL or (first is not None and int(first[1]) == -signal.SIGKILL)


def _logs(folder: Path) -> list[Path]:
    return sorted((folder / "logs").glob("*.log"))


def _last_lines(path: Path, count: int = 10) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]
