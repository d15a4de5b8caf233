"""Carries a plan out on this machine: one process for each rank, started directly."""

from __future__ import annotations

import contextlib
import functools
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import psutil

from launch.out_of_memory import kills_around
from launch.plan import Plan
from launch.processes import alive, die_with_parent, session_of
from launch.rollcall import LOOPBACK, RollCall
from launch.root_cause import End
from launch.supervise import POLL_SECONDS, Ending, Place, supervise
from launch.topology import ANNOUNCED, worker_environment, world_variables

GRACE_SECONDS = 10.0
"""How long stopped workers may take to leave before they are killed."""


def run(plan: Plan, folder: Path, *, restarts: bool = True, quiet: bool = False) -> Ending:
    """Start the workers of `plan` here and see them through, as `launch.supervise` does.

    Their progress appears on our stderr, or, if we are to be `quiet`, in logs/launcher.log. Library noise and
    tracebacks go to logs/, complete.
    """
    begin = functools.partial(start, quiet=quiet)
    return supervise(plan, folder, begin, Place([LOOPBACK]), restarts=restarts)


def start(plan: Plan, folder: Path, roll: RollCall | None, *, quiet: bool = False) -> LocalRanks:
    """Start all ranks here."""
    return LocalRanks(plan, folder, roll.announcement if roll else None, 0, quiet=quiet)


class LocalRanks:
    """Ranks that are children of ours."""

    def __init__(
        self, plan: Plan, folder: Path, announcement: str | None, first_rank: int, *, quiet: bool = False
    ) -> None:
        self.ends: list[End] = []
        self._kills = kills_around()
        self._told: set[int] = set()
        self._ended: set[int] = set()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        with (folder / "logs" / "launcher.log").open("ab") as log:
            for local_rank in range(plan.processes.per_node):
                rank = first_rank + local_rank
                environment = {**plan.environment, "SHOAL_SUPERVISED": "1"}
                if announcement:
                    environment[ANNOUNCED] = announcement
                    processes = plan.processes
                    environment |= world_variables(rank, processes.world_size, local_rank, processes.per_node)
                self._processes[rank] = subprocess.Popen(
                    plan.command,
                    env=worker_environment(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=log if quiet else _stderr(),
                    stderr=log,
                    start_new_session=True,  # Ctrl-C reaches the workers through us alone
                    preexec_fn=die_with_parent,
                )

    def look(self) -> None:
        """Notice who has gone."""
        for rank, process in self._processes.items():
            code = process.poll()
            if code is None or rank in self._ended:
                continue
            self._ended.add(rank)
            if code:
                kills = kills_around()
                known = None if kills is None or self._kills is None else kills - self._kills
                self.ends.append(End(code, rank, socket.gethostname(), known))

    @property
    def left(self) -> int:
        """How many ranks are there still."""
        return len(self._processes) - len(self._ended)

    def tell(self, number: int) -> None:
        """Send a signal to the ranks, once to each."""
        for rank, process in self._processes.items():
            if rank not in self._told:
                self._told.add(rank)
                process.send_signal(number)  # does nothing where it has ended

    def ask_for_stack(self, rank: int) -> None:
        """Have a rank write its stack to its log; one that was stopped has to go on for that."""
        if process := self._processes.get(rank):
            process.send_signal(signal.SIGQUIT)
            process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """See that nothing is left: what is, is asked to leave, and killed after the grace.

        Each rank has a session of its own, which its data workers and other children share, also when they have lost
        it.
        """
        self.look()  # before we kill any
        sessions = {process.pid for process in self._processes.values()}
        family = {process for process in psutil.process_iter() if session_of(process.pid) in sessions}
        for process in self._processes.values():
            if process.poll() is None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    family |= {*psutil.Process(process.pid).children(recursive=True)}
                process.terminate()
        until = time.monotonic() + GRACE_SECONDS
        while alive(family) and time.monotonic() < until:
            time.sleep(POLL_SECONDS / 2)
        for member in alive(family):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        for process in self._processes.values():
            process.wait()
        self._ended.update(self._processes)  # by us: nobody is to count that as a failure


def _stderr() -> IO[str] | int:
    """Our stderr as the workers' stdout, also where a test has replaced it by something without a descriptor."""
    try:
        sys.stderr.fileno()
    except (OSError, ValueError):
        return subprocess.DEVNULL
    return sys.stderr
