"""How long a rank waits for the others in an exchange: long while one may save or evaluate alone, else less."""

from __future__ import annotations

import time
from datetime import timedelta

from torch.distributed import distributed_c10d

from launch.sections import ParallelSection

LATER = 2.0
"""So many times what the hang watch allows, which is to strike first and says more, or what the first update took."""

MARGIN = 12.0
"""Seconds more: it takes the hang watch 8 to be sure that a rank tells nothing any more (`launch.hangs`)."""


def wait_at_most(seconds: float) -> None:
    """Of all exchanges that begin from now on, in all process groups of this rank.

    Source: `_set_pg_timeout` of torch 2.13, which `torch.distributed.breakpoint` uses so; gloo and NCCL read the value
    at the beginning of each exchange.
    """
    for group, (backend, _) in distributed_c10d._world.pg_map.items():
        if "gloo" not in backend and "nccl" not in backend:
            continue
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


class Waiting:
    """Shortens the time-out after the first update, and lengthens it around whatever a rank may do alone.

    Ranks part after a save or an evaluation without an exchange, so the update after one has the long time-out too.
    """

    def __init__(self, parallel: ParallelSection) -> None:
        self._longest, self._hang = parallel.timeout_seconds, parallel.hang_seconds
        self._begun = time.monotonic()
        self._usual: float | None = None

    def long(self) -> None:
        """Something may follow that takes a rank long."""
        wait_at_most(self._longest)

    def after_update(self, *, plain: bool) -> None:
        """An update is done; it was a `plain` one where all ranks go on at once."""
        if self._hang is None:
            return
        if self._usual is None:
            self._usual = min(self._longest, LATER * max(self._hang, time.monotonic() - self._begun) + MARGIN)
        wait_at_most(self._usual if plain else self._longest)
