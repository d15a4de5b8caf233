"""How ranks leave: no connection is closed while one may still have something to receive."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch.distributed as dist

from launch.engine import leaving
from tests.gloo import run_ranks

SLOW = 1.5
"""Seconds that one rank needs after the last exchange, as one does whose processor has other work."""


def left(slow_rank: int, what: str) -> tuple[float, float]:
    """When this rank has left the last exchange, and when the group; the slow one says late that it is out or gone."""
    dist.init_process_group("gloo")
    dist.barrier()
    out, count = time.time(), leaving._count

    def count_late(store: Any, name: str, size: int) -> None:
        time.sleep(SLOW if name == what else 0)
        count(store, name, size)

    if dist.get_rank() == slow_rank:
        leaving._count = count_late
    leaving.leave()
    assert not dist.is_initialized()
    return out, time.time()


@pytest.mark.dist
@pytest.mark.parametrize("slow_rank", [0, 2])
def test_no_rank_leaves_before_all_are_out_of_the_last_exchange(slow_rank: int) -> None:
    times = run_ranks(3, left, slow_rank, leaving.OUT)
    assert min(gone for _, gone in times) >= times[slow_rank][0] + SLOW


@pytest.mark.dist
def test_the_rank_that_serves_the_store_waits_for_those_who_still_ask_it() -> None:
    times = run_ranks(3, left, 2, leaving.GONE)
    assert times[0][1] >= times[2][0] + SLOW > times[1][1]


def test_a_process_on_its_own_has_none_to_wait_for() -> None:
    leaving.leave()
    assert not dist.is_initialized()
