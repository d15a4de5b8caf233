"""Numbers, times and lengths as people read them."""

from __future__ import annotations

import math
import time

NOTHING = "–"
"""In place of what is not known."""


def figure(value: float | None) -> str:
    """A measured number, to four places or four digits."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "not finite"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.4f}" if 1e-3 <= abs(value) < 1e7 else f"{value:.3e}"


def count(number: float | None) -> str:
    """A whole number."""
    return NOTHING if number is None or not math.isfinite(number) else f"{number:,.0f}"


def share(part: float) -> str:
    """Of a whole, 0 to 1."""
    return f"{100 * part:.1f} %"


def duration(seconds: float | None) -> str:
    """`2 h 05 min`, `3 min 20 s`, `4.5 s`."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def date(seconds: float) -> str:
    """A moment, by the clock of the machine that writes the page."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def roughly(seconds: float) -> str:
    """A duration as one would say it: `40 s`, `4 min`, `2 h 05 min`, `3 d 4 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
