"""Which rank keeps the others waiting, and by what. What each spends travels with the counts of every tenth update."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

REASONS = ("data", "compute", "save")

EVERY = 10
"""Updates from one telling to the next."""

WINDOW_SECONDS = 15.0
"""How long is judged at once; twice in a row the same must come out."""

CLEARLY = 1.3
"""How many times as long as the others' median a slow rank takes."""

COST = 0.1
"""Share of the time that the others must lose by it."""

REMINDER_SECONDS = 1800.0
"""After so long it is said again."""


@dataclass(frozen=True)
class Straggler:
    """A rank that the others wait for."""

    rank: int
    reason: str
    seconds: float
    """That it spends on this, per update."""
    others: float
    """Median of what the others do."""
    cost: float
    """Share of the time that the others lose."""


def find_straggler(spent: Sequence[Sequence[float]], updates: int, seconds: float) -> Straggler | None:
    """The rank by which most time is lost, if it is clearly slower; all took `seconds` for so many updates.

    `spent[rank]` are the seconds that a rank spent on each of `REASONS`, itself. Every update all wait for the slowest
    to have its data, and again for the slowest to have computed, so one cannot make up for the other.
    """
    found = []
    for place, reason in enumerate(REASONS):
        own = [each[place] for each in spent]
        rank = max(range(len(own)), key=own.__getitem__)
        others = statistics.median(own[:rank] + own[rank + 1 :])
        cost = (own[rank] - others) / seconds
        if own[rank] > CLEARLY * others and cost > COST:
            found.append(Straggler(rank, reason, own[rank] / updates, others / updates, cost))
    return max(found, key=lambda straggler: straggler.cost, default=None)


class Pace:
    """Tells what this rank spends, and judges on rank 0 what it hears. Every rank must have one."""

    def __init__(
        self, rank: int = 0, hosts: Sequence[str] = ("",), spent: Callable[[], Sequence[float]] = tuple
    ) -> None:
        """`hosts` by rank; `spent` gives the seconds that this rank has spent on each of `REASONS` up to now."""
        self._rank, self._hosts, self._spent = rank, hosts, spent
        self._then: Sequence[float] | None = None
        self._sums = [[0.0] * len(REASONS) for _ in hosts]
        self._updates = 0
        self._since: float | None = None
        self._last: tuple[int, str] | None = None
        self._told: tuple[int, str] | None = None
        self._told_at = 0.0

    def tell(self, update: int) -> list[int]:
        """Microseconds since the last telling, in the places of this rank; most updates nothing."""
        if len(self._hosts) == 1 or update % EVERY:
            return []
        now = self._spent()
        then, self._then = self._then or now, now
        numbers = [0] * (len(self._hosts) * len(REASONS))
        for place, (before, after) in enumerate(zip(then, now, strict=True)):
            numbers[self._rank * len(REASONS) + place] = round(1e6 * (after - before))
        return numbers

    def hear(self, numbers: Sequence[int]) -> tuple[str, Straggler | None] | None:
        """Take note of what all ranks together have told; what to say of it, if there is anything new. Rank 0."""
        if not numbers:
            return None
        now = time.monotonic()
        if self._since is None:  # the first updates are slow in ways of their own
            self._since = now
            return None
        self._updates += EVERY
        for place, number in enumerate(numbers):
            self._sums[place // len(REASONS)][place % len(REASONS)] += number / 1e6
        seconds = now - self._since
        if seconds < WINDOW_SECONDS:
            return None
        found = find_straggler(self._sums, self._updates, seconds)
        self._since, self._updates = now, 0
        self._sums = [[0.0] * len(REASONS) for _ in self._hosts]
        return self._news(found, now)

    def _news(self, found: Straggler | None, now: float) -> tuple[str, Straggler | None] | None:
        who = (found.rank, found.reason) if found else None
        again, self._last = who == self._last, who
        if not again or (who == self._told and (who is None or now - self._told_at < REMINDER_SECONDS)):
            return None
        before, self._told, self._told_at = self._told, who, now
        if found is None:
            assert before is not None, "it was told"
            return f"{self._name(before[0])} no longer keeps the others waiting", None
        words = {"data": "data", "compute": "computing", "save": "saving"}[found.reason]
        return (
            f"{self._name(found.rank)} keeps the others waiting: {words} {found.seconds:.3g} s per update, others "
            f"{found.others:.2g} s; it costs {100 * found.cost:.0f} % of the time"
        ), found

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({self._hosts[rank]})"
