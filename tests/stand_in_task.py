"""A task of a SLURM job that only writes down what happens to it: in a file of its own, one line per signal.

`python stand_in_task.py FOLDER [stays | EXIT_CODE]`: a file in FOLDER per task and attempt. A task ends on its first
SIGTERM or SIGUSR1, unless it stays. Once all tasks are there, the last one ends with EXIT_CODE; if it is negative, by
that signal.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType


def main(folder: Path, then: str) -> None:
    rank, tasks = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
    file = folder / f"attempt-{attempt}-task-{rank}"

    def note(number: int, _: FrameType | None) -> None:
        if then != "stays":
            for each in (signal.SIGTERM, signal.SIGUSR1):  # SLURM may send one twice, the second while we write
                signal.signal(each, signal.SIG_IGN)
        with file.open("a") as output:
            output.write(f"{signal.Signals(number).name}\n")
        if then != "stays":
            sys.exit(0)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, note)
    file.touch()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.05)
        if then not in ("", "stays") and rank == tasks - 1 and len([*folder.glob(f"attempt-{attempt}-*")]) == tasks:
            if int(then) < 0:
                os.kill(os.getpid(), -int(then))
            sys.exit(int(then))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "")
