"""Real ranks for tests: processes of a gloo group, forked from a server that has imported the heavy packages once."""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

from launch.engine.leaving import leave

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preload"])


def run_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, timeout_seconds: float = 120
) -> list[Any]:
    """Call `function(*arguments)` on every rank of a new group; its results by rank.

    A rank that raises, dies or does not answer in time fails the test, with the rank's own traceback.
    """
    port = _free_port()
    answers: Any = _context.Queue()
    ranks = [
        _context.Process(target=_rank, args=(rank, world_size, port, function, arguments, answers))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    results: dict[int, Any] = {}
    try:
        while len(results) < world_size:
            rank, result, trace = answers.get(timeout=timeout_seconds)
            if trace:
                raise AssertionError(f"rank {rank} of {world_size} failed:\n{trace}{_others(ranks, rank, results)}")
            results[rank] = result
    except queue.Empty:
        raise AssertionError(f"ranks {set(range(world_size)) - set(results)} did not answer") from None
    finally:
        for process in ranks:
            process.join(timeout=10 if len(results) == world_size else 0)
            process.kill()
    return [results[rank] for rank in range(world_size)]


def _others(ranks: list[Any], failed: int, results: dict[int, Any]) -> str:
    """How the other ranks are, for one that has lost its connection is rarely the one at fault."""
    told = ""
    for rank, process in enumerate(ranks):
        if rank != failed:
            process.join(timeout=1)
            answered = "has answered" if rank in results else "has not answered"
            told += f"rank {rank} {answered}; its exit code is {process.exitcode}\n"
    return told


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _rank(rank: int, world_size: int, port: int, function: Any, arguments: Any, answers: Any) -> None:
    if world_size > 1:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # data workers start as those of any rank do
    try:
        answers.put((rank, function(*arguments), ""))
        failed = False
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
        failed = True
    answers.close()
    answers.join_thread()
    if not failed:  # the others of one that has failed may wait for it for ever; they are ended from outside
        leave()
