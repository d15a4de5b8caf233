"""Data workers: the same processes from before the process group to the end, whatever they are asked for."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import psutil
import pytest
import torch

from launch.engine.feed import Feed
from tests.commands import ROOT
from tests.gloo import run_ranks


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_serve_pass_after_pass(workers: int) -> None:
    feed = Feed(lambda task: (task, os.getpid()), workers)  # a lambda: nothing is pickled
    made = [list(feed(range(count))) for count in (7, 0, 1, 20)]
    assert [[task for task, _ in one] for one in made] == [list(range(count)) for count in (7, 0, 1, 20)]
    everyone = {process for one in made for _, process in one}
    assert len(everyone) == workers
    assert os.getpid() not in everyone


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_pass_may_be_left_early(workers: int) -> None:
    feed = Feed(lambda task: -task, workers)
    for _ in range(3):
        assert list(itertools.islice(feed(itertools.count()), 3)) == [0, -1, -2]
    assert list(feed([5, 6])) == [-5, -6]


def test_the_random_numbers_of_the_rank_do_not_depend_on_workers() -> None:
    before = torch.get_rng_state()
    for workers in (0, 2):
        feed = Feed(lambda task: task, workers)
        for _ in range(2):
            assert list(feed([1, 2])) == [1, 2]
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_draw_other_random_numbers_with_another_seed() -> None:
    drawn = [
        [number for _ in range(2) for number in Feed(lambda task: torch.rand(()).item(), 2, seed=seed)(range(4))]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1]
    assert not set(drawn[0]) & set(drawn[2])
    assert len(set(drawn[0][:4])) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_where_its_task_is_taken(workers: int) -> None:
    made = Feed(lambda task: 6 // task, workers)([1, 2, 0])
    assert [next(made), next(made)] == [6, 3]
    with pytest.raises(ZeroDivisionError):
        next(made)


def test_its_end_ends_the_workers_also_where_a_pass_is_not_over() -> None:
    feed = Feed(lambda task: os.getpid(), 2)
    made = feed(itertools.count())
    processes = {next(made), next(made)}
    assert all(psutil.pid_exists(process) for process in processes)
    feed.close()
    assert not any(psutil.pid_exists(process) for process in processes)


def too_late() -> list[Any]:
    torch.distributed.init_process_group("gloo")
    found: list[Any] = list(Feed(abs, 0)([-1]))
    try:
        Feed(abs, 1)
    except RuntimeError as error:
        found.append(str(error))
    return found


@pytest.mark.dist
def test_no_worker_is_forked_beside_the_threads_of_a_process_group() -> None:
    expected = [1, "data workers must be started before the process group"]
    assert run_ranks(2, too_late) == [expected, expected]


def test_a_process_that_forgets_its_workers_ends_all_the_same() -> None:
    """They ignore the SIGTERM by which Python ends children that are left over."""
    script = "from launch.engine.feed import Feed; feed = Feed(str, 2); print(*feed(range(3)))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "0 1 2\n"
