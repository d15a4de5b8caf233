"""A process that we have started and everything below it: who is there, and that nobody is left."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterable

import psutil

_POLL_SECONDS = 0.02


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended; of one that nobody has waited for, only its number is left."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def below(process: psutil.Process) -> list[psutil.Process]:
    """All descendants of a process."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill(process: psutil.Process) -> None:
    """End a process and all below it at once, and see that none of them is left.

    Whoever shares a session with one of them belongs to it, also when he has lost his parent: torchrun puts each rank
    into a session of its own. So the process must not be in ours.
    """
    members = {process, *below(process)}
    sessions = {session_of(member.pid) for member in members} - {None}
    assert session_of(os.getpid()) not in sessions, "started with a session of its own"
    while True:
        # Again and again: one may have been forked in that moment.
        members |= {other for other in psutil.process_iter() if session_of(other.pid) in sessions}
        left = alive(members)
        if not left:
            return
        for member in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        time.sleep(_POLL_SECONDS)


def gone(processes: Iterable[psutil.Process], seconds: float) -> bool:
    """Wait until none of them is left; False after so long."""
    until = time.monotonic() + seconds
    while alive(processes):
        if time.monotonic() > until:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def die_with_parent() -> None:
    """Ask Linux to send SIGTERM to this process when its parent dies, even by SIGKILL (prctl(2), option 1)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def session_of(pid: int) -> int | None:
    """None where the process is gone."""
    try:
        return os.getsid(pid)
    except OSError:
        return None
