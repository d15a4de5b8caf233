"""Finds out from what ranks tell of themselves that a run hangs, and which rank keeps the others waiting. Pure."""

from __future__ import annotations

from collections import Counter
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
    elsewhere: str = ""
    """Where one of them does, if this rank waits too: for another exchange then."""

    def __str__(self) -> str:
        who = f"rank {self.rank} ({self.host})"
        others = f"; {self.waiting} other{'s' if self.waiting > 1 else ''} wait{'' if self.waiting > 1 else 's'} for it"
        if self.elsewhere:
            others = f", and waits there itself; elsewhere {self.elsewhere}"
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
    others = sorted(waiting - {culprit})
    elsewhere = ""
    if beat.waits and culprit not in silent and others:
        first = heard[others[0]]
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        elsewhere = f"rank {others[0]} ({first.host}){more}: {first.beat.where}"
    return Hang(culprit, heard[culprit].host, beat, culprit in silent, still[culprit], len(others), elsewhere)


def _still_for(heard: Heard, now: float) -> float:
    """How long a rank has not moved, as far as is known."""
    return heard.beat.seconds + (now - heard.time)


def who_works(heard: Mapping[int, Heard]) -> int | None:
    """The first rank that does not wait for others, if there is one."""
    return min((rank for rank, each in heard.items() if not each.beat.waits), default=None)


def _culprit(heard: Mapping[int, Heard], silent: set[int], waiting: set[int]) -> int:
    """Who is silent; else who does not wait; else who waits elsewhere than most; else who is ahead.

    Of as many here as there: who waits for what the recipe asked for, an exchange too many rather than one too few.
    """
    if silent:
        return min(silent, key=lambda rank: heard[rank].time)
    if working := sorted(set(heard) - waiting):
        return working[0]
    places = Counter(heard[rank].beat.where for rank in waiting)
    if len(places) > 1:
        return min(sorted(waiting), key=lambda rank: _oddity(heard[rank].beat, places))
    return max(sorted(waiting), key=lambda rank: heard[rank].beat.update)


def _oddity(beat: Beat, places: Counter[str]) -> tuple[int, bool, int]:
    return places[beat.where], not beat.asked_by_recipe, -beat.update
