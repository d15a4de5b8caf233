"""The processes that show a run in trackers, as rank 0 sees them: it never waits for one while it trains."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from launch.plan import python_environment
from launch.processes import alive, below
from launch.topology import worker_environment
from launch.trackers import SPOKEN

STOP_SECONDS = 10.0
"""How long the last rows may take where the run goes on another time: a job may have little time left."""

END_SECONDS = 60.0
"""The same at the end of a run."""

ARTIFACT_SECONDS = 1800.0
"""The same where models are sent too."""

_POLL_SECONDS = 0.05


class Follower:
    """A process that follows metrics.jsonl: a fresh interpreter, without torch unless the tracker needs it.

    It is in the session of its rank, with which the launcher ends it, and takes no signals.
    """

    def __init__(self, run: Path, tracker: str) -> None:
        """Start it; takes milliseconds.

        Raises:
            OSError: it cannot be started.
        """
        self.tracker = tracker
        (run / "logs").mkdir(exist_ok=True)
        # No preexec_fn: it would have this process forked, with all its threads and sockets.
        with (run / "logs" / f"{tracker}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "launch.follow", str(run), tracker, "--process", str(os.getpid())],
                env=worker_environment(python_environment()),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert self._process.stdout is not None, "it is a pipe"
        os.set_blocking(self._process.stdout.fileno(), False)
        self._text = b""
        self._heard = False

    def news(self) -> list[str]:
        """The lines it has said since: a system call."""
        assert self._process.stdout is not None, "it is a pipe"
        with contextlib.suppress(BlockingIOError):
            self._text += os.read(self._process.stdout.fileno(), 65536)
        *lines, self._text = self._text.split(b"\n")
        self._heard = self._heard or bool(lines)
        return [line.decode(errors="replace") for line in lines]

    def close(self) -> None:
        """Tell it that no more rows will come."""
        assert self._process.stdin is not None, "it is a pipe"
        with contextlib.suppress(OSError):  # it has ended
            self._process.stdin.write(b"\n")  # a child that this process has forked may hold the pipe open
            self._process.stdin.close()

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    def end(self) -> list[str]:
        """See that nothing of it is left; what there is to say."""
        lines = self.news()
        in_time, code = self.ended, self._process.poll()
        if not in_time:
            family = [*below(psutil.Process(self._process.pid)), psutil.Process(self._process.pid)]
            for member in alive(family):
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
        self._process.wait()
        if not self._heard and (not in_time or code):
            why = f"ended with {code}" if in_time else "had not sent all in time"
            way_on = "`shoal sync RUN` sends what is missing" if self.tracker == "wandb" else "metrics.jsonl has all"
            lines.append(f"{SPOKEN[self.tracker]}: its process {why} (see logs/{self.tracker}.log); {way_on}")
        return lines


def wait_for(followers: Sequence[Follower], seconds: float) -> None:
    """Have all of them finish, so long at most."""
    for follower in followers:
        follower.close()
    until = time.monotonic() + seconds
    while not all(follower.ended for follower in followers) and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
