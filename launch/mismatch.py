"""Ranks that were in different exchanges at the same time: gloo ends one of them for it, and not the odd one."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from launch.pulse import Frame, is_foreign, shown

MISMATCH = re.compile(r"op\.preamble\.length <= op\.nbytes|distributed collective mismatch")
"""What gloo says of it, in torch 2.13: more bytes have come than were awaited."""

_FRAME = re.compile(r'^ +File "(.+)", line (\d+),? in (.+)$', re.MULTILINE)

LAST_BYTES = 1 << 17
"""Of a log, where the stack is that a rank has ended with."""


def describe_mismatch(logs: Path) -> tuple[int, str] | None:
    """The odd rank, and where it and the others were, by the stacks that they have ended with; None: not to be seen.

    Of as many here as there, who is in an exchange of the recipe's own: one too many rather than one too few.
    """
    places: dict[int, Frame] = {}
    for path in logs.glob("rank-*.log"):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LAST_BYTES))
            place = _last_place(file.read().decode(errors="replace"))
        if place:
            places[int(path.stem.removeprefix("rank-"))] = place
    count = Counter(places.values())
    if len(count) < 2:
        return None
    odd = min(sorted(places), key=lambda rank: (count[places[rank]], "/launch/engine/" in places[rank][0]))
    others = "; ".join(
        f"rank {', '.join(str(rank) for rank in sorted(places) if places[rank] == place)} in {shown(place)}"
        for place in count
        if place != places[odd]
    )
    return odd, f"was in another exchange than the others, in {shown(places[odd])}; {others}"


def _last_place(text: str) -> Frame | None:
    """The innermost line of ours or of the recipe's, of the last traceback or of the stack that a crash has left."""
    crash = text.rfind("Fatal Python error")
    if crash >= 0:  # innermost first, thread by thread
        threads = re.split(r"^(?:Current thread|Thread) .*$", text[crash:], flags=re.MULTILINE)
        frames = next(
            (found for found in map(_FRAME.findall, threads) if any("launch/train" in f[0] for f in found)), []
        )
    else:
        frames = _FRAME.findall(text[max(0, text.rfind("Traceback (most recent call last)")) :])[::-1]
    found = ((file, int(line), where) for file, line, where in frames)
    return next((frame for frame in found if not is_foreign(frame)), None)
