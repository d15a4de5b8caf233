"""Finds out from what ranks tell of themselves that a run hangs, and which rank keeps the others waiting. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launch.pulse import BEAT_SECONDS, Beat

SLOW_PHASES = ("saving", "exporting", "preparing", "starting or ending")
"""What may take long, for all ranks or for one alone, without anything being wrong."""

PATIENCE = 6.0
"""How many times as long the first update and the slow phases may take."""

SILENT_BEATS = 4
"""So many beats that do not come are silence."""


@dataclass(frozen=True)
class Heard:
    """The last beat of a rank, and when it came, in seconds of the launcher's clock."""

    host: str
    beat: Beat
    time: float


@dataclass(frozen=True)
class Hang:
    """A rank that keeps the others waiting."""

    rank: int
    host: str
    beat: Beat
    """The last that it told."""
    silent: bool
    """Whether it does not even tell any more."""
    seconds: float
    waiting: int
    """How many others wait."""

    def __str__(self) -> str:
        who = f"rank {self.rank} ({self.host})"
        others = f"; {self.waiting} other{'s' if self.waiting > 1 else ''} wait{'' if self.waiting > 1 else 's'} for it"
        at = f"after update {self.beat.update}, {self.beat.phase}, {self.beat.where}"
        if self.silent:
            return f"{who} has told nothing for {self.seconds:.0f} s, and was last seen {at}{others}"
        return f"{who} hangs: for {self.seconds:.0f} s it has been where it is, {at}{others}"


def find_hang(heard: Mapping[int, Heard], ranks: int, now: float, limit: float) -> Hang | None:
    """The rank that hangs, of those that are there; None while any of them moves, or may well take so long."""
    if not heard or len(heard) < ranks:
        return None
    still = {rank: _still_for(each, now) for rank, each in heard.items()}
    silent = {rank for rank, each in heard.items() if now - each.time > SILENT_BEATS * BEAT_SECONDS}
    waiting = {rank for rank, each in heard.items() if each.beat.waits and rank not in silent}
    if not waiting and not silent:
        return None
    culprit = _culprit(heard, silent, waiting)
    beat = heard[culprit].beat
    slow = beat.phase in SLOW_PHASES or min(each.beat.update for each in heard.values()) == 0
    if min(still.values()) < limit * (PATIENCE if slow and culprit not in silent else 1.0):
        return None
    others = len(waiting - {culprit})
    return Hang(culprit, heard[culprit].host, beat, culprit in silent, still[culprit], others)


def _still_for(heard: Heard, now: float) -> float:
    """How long a rank has not moved, as far as is known."""
    return heard.beat.seconds + (now - heard.time)


def _culprit(heard: Mapping[int, Heard], silent: set[int], waiting: set[int]) -> int:
    """Who is silent; else who does not wait; else who waits for what the recipe asked for; else who is ahead."""
    if silent:
        return min(silent, key=lambda rank: heard[rank].time)
    if working := sorted(set(heard) - waiting):
        return working[0]
    asked = [rank for rank in sorted(waiting) if heard[rank].beat.asked_by_recipe]
    if asked and len(asked) < len(waiting):
        return asked[0]
    return max(sorted(waiting), key=lambda rank: heard[rank].beat.update)
