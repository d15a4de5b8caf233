"""What a rank is doing, told to the launcher every other second by a thread: its update, its stack, and since when.

Nothing in the training loop knows of it: the stack of the main thread is looked at from outside. A rank that cannot
even say so, because it was stopped or something holds Python's lock, is known by its silence.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

BEAT_SECONDS = 2.0
"""How often a rank tells."""

STACK_SECONDS = 2.0
"""How long it must have been where it is before it tells its stack too."""

DEPTH = 14
"""Innermost frames that are told."""

AWAITS = "await_exchange"
"""The function of `launch.engine.meters` in which a rank waits for an exchange."""


@dataclass(frozen=True)
class Beat:
    """What a rank is doing."""

    update: int
    """Updates done."""
    phase: str
    where: str
    """The innermost line of ours, or of the recipe's: `file:line in function`."""
    waits: bool
    """Whether it waits for other ranks."""
    asked_by_recipe: bool
    """Whether the recipe's own code asked for that."""
    seconds: float
    """How long it has been there."""
    stack: tuple[str, ...] = ()
    """Innermost frame last; empty while it moves."""


PHASES = (
    ("launch/engine/keeping.py", "saving"),
    ("launch/engine/checkpoint.py", "saving"),
    ("launch/engine/export.py", "exporting"),
    ("launch/engine/adapters.py", "exporting"),
    ("launch/engine/scoring.py", "evaluating"),
    ("launch/engine/feed.py", "reading data"),
    ("launch/engine/streams.py", "reading data"),
    ("launch/engine/loop.py", "in the training step"),
    ("launch/prepare.py", "preparing"),
    ("launch/train.py", "starting or ending"),
)
"""What the innermost of these files in a stack means."""


def start_pulse(tell: Callable[[Beat], None], updates_done: Callable[[], int]) -> None:
    """Give `tell` a beat every `BEAT_SECONDS` from now on, as long as this process lives; it tells the launcher."""
    main = threading.main_thread().ident
    assert main is not None, "it runs"

    def beat() -> None:
        last, since = None, time.monotonic()
        while True:
            time.sleep(BEAT_SECONDS)
            frame = sys._current_frames().get(main)
            if frame is None:
                return
            found = look(frame)
            now = (updates_done(), found)
            del frame
            if now != last:
                last, since = now, time.monotonic()
            seconds = time.monotonic() - since
            tell(describe(found, now[0], seconds))

    threading.Thread(target=beat, name="pulse", daemon=True).start()


Frame = tuple[str, int, str]
"""File, line and function."""


def look(frame: FrameType) -> tuple[Frame, ...]:
    """The stack of a frame, innermost last."""
    frames: list[Frame] = []
    at: FrameType | None = frame
    while at is not None:
        frames.append((at.f_code.co_filename, at.f_lineno, at.f_code.co_name))
        at = at.f_back
    return tuple(reversed(frames))


def describe(frames: tuple[Frame, ...], update: int, seconds: float) -> Beat:
    """What a stack means."""
    ours = [frame for frame in frames if not is_foreign(frame)]
    waiting = next((index for index, frame in enumerate(frames) if _waits(frame)), None)
    caller = None
    if waiting is not None:
        caller = next((frame for frame in reversed(frames[:waiting]) if not is_foreign(frame)), None)
    phase = "working"
    for file, _, _ in frames:
        phase = next((name for end, name in PHASES if file.endswith(end)), phase)
    return Beat(
        update=update,
        phase=phase,
        where=shown(ours[-1] if ours else frames[-1]),
        waits=waiting is not None,
        asked_by_recipe=caller is not None and "/launch/engine/" not in caller[0] and "/launch/train" not in caller[0],
        seconds=seconds,
        stack=tuple(map(shown, frames[-DEPTH:])) if seconds >= STACK_SECONDS else (),
    )


def _waits(frame: Frame) -> bool:
    """Whether it is in an exchange, or in a backward pass, which ends with one."""
    file, _, function = frame
    return "/torch/distributed/distributed_c10d.py" in file or function in ("_engine_run_backward", AWAITS)


def is_foreign(frame: Frame) -> bool:
    """Whether it is neither of ours nor of a recipe's; the clock around exchanges counts as torch's."""
    file, _, function = frame
    return function == AWAITS or "/site-packages/" in file or "/lib/python" in file or file.startswith("<")


def shown(frame: Frame) -> str:
    """`file:line in function`."""
    file, line, function = frame
    path = Path(file)
    return f"{'/'.join(path.parts[-3:])}:{line} in {function}"
