"""python -m tests.killed_saver RUN MOMENT … : saves and prunes once a moment, each time killed before that many calls.

Prints, for each: the moment, whether it was killed, and the updates of the good checkpoints that are left.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.checkpoints import clean, damage, listed, prune, update_of
from tests.test_checkpoints import save


class Fate:
    """Kills this process once so many calls have been made."""

    def __init__(self, calls: int) -> None:
        self._left = calls

    def __call__(self) -> None:
        """Before a call."""
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= 1

    def threaten(self, name: str) -> None:
        """Make every call of this function of `os` one of them."""
        function: Callable[..., Any] = getattr(os, name)

        def threatened(*arguments: Any, **options: Any) -> Any:
            self()
            return function(*arguments, **options)

        setattr(os, name, threatened)


def main() -> None:
    """A child of its own for each moment."""
    run = Path(sys.argv[1])
    for moment in sys.argv[2:]:
        child = os.fork()
        if not child:
            fate = Fate(int(moment))
            for name in ("fsync", "mkdir", "rename", "rmdir", "unlink", "open"):
                fate.threaten(name)
            clean(run)
            save(run, 1 + max(map(update_of, listed(run))), fate)
            prune(run, 2, [])
            os._exit(0)
        _, status = os.waitpid(child, 0)
        good = [update_of(folder) for folder in listed(run) if damage(folder) is None]
        print(moment, os.WIFSIGNALED(status), *good, flush=True)


if __name__ == "__main__":
    main()
