"""Curves over the updates of a run, and how a long one is drawn with few points. Pure."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field


@dataclass
class Curve:
    """One quantity over the updates of a run, as far as it was recorded."""

    # Arrays, for there may be a million points.
    updates: MutableSequence[int] = field(default_factory=lambda: array("q"))
    values: MutableSequence[float] = field(default_factory=lambda: array("d"))

    def add(self, update: int, value: float) -> None:
        """Append what was recorded of an update."""
        self.updates.append(update)
        self.values.append(value)

    @property
    def finite(self) -> list[tuple[int, float]]:
        """Updates and values, without those that are NaN or infinite."""
        return [pair for pair in zip(self.updates, self.values, strict=True) if math.isfinite(pair[1])]

    def thinned(self, most: int) -> tuple[list[int], list[float | None]]:
        """At most so many points to draw; None where a value is not finite, so that the line has a gap there.

        A long curve is cut into equal parts, of which each keeps its lowest and its highest value where they are: a
        spike of a single update stays what it was. So do the first value and the last.
        """
        kept = thin(self.values, most)
        shown = (self.values[place] for place in kept)
        return [self.updates[place] for place in kept], [value if math.isfinite(value) else None for value in shown]


@dataclass
class Split:
    """Seconds by phase that went by up to each recorded update, since the one before."""

    updates: MutableSequence[int] = field(default_factory=lambda: array("q"))
    seconds: dict[str, MutableSequence[float]] = field(default_factory=dict)

    def add(self, update: int, spent: Mapping[str, float]) -> None:
        """Append what was recorded of an update; a phase that others have and it has not took no time."""
        for phase in spent:
            if phase not in self.seconds:
                self.seconds[phase] = array("d", bytes(8 * len(self.updates)))
        for phase, column in self.seconds.items():
            column.append(spent.get(phase, 0.0))
        self.updates.append(update)


def thin(values: Sequence[float], most: int) -> list[int]:
    """The places, ascending, that `Curve.thinned` keeps of a sequence; all where they are few enough.

    `most` is at least 4.
    """
    size = len(values)
    if size <= most:
        return list(range(size))
    parts = max(1, (most - 2) // 2)
    kept = {0, size - 1}
    for part in range(parts):
        places = range(size * part // parts, size * (part + 1) // parts)
        finite = [place for place in places if math.isfinite(values[place])] or [places[0]]
        kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
    return sorted(kept)
