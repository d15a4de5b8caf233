"""Saving on real ranks: what was there when it began, whole or not at all, whatever fails and whoever dies."""

from __future__ import annotations

import os
import random
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.checkpoints import DamagedError, checkpoint_folder, damage, listed, newest_complete, prune, update_of
from launch.engine.pieces import Piece
from launch.engine.randomness import random_states, restore_random_states
from launch.engine.shards import Stored, parts, write_shard
from tests.gloo import run_ranks
from tests.killed_saver import Fate

ROWS = 7


def held(rank: int, world_size: int, value: float = 0.0) -> list[Piece]:
    """A matrix of which each rank has rows, a vector that all have, a counter, and something of each rank's own."""
    first, last = ROWS * rank // world_size, ROWS * (rank + 1) // world_size
    matrix = torch.arange(ROWS * 4, dtype=torch.float32).reshape(ROWS, 4) + value
    return [
        Piece("model/matrix", matrix[first:last].clone(), first * 4, (ROWS, 4), shared=False),
        Piece("model/vector", torch.arange(5, dtype=torch.bfloat16) + value, 0, (5,), shared=True),
        Piece("optimizer/step/vector", torch.tensor(3.0 + value), 0, (), shared=True),
        Piece(f"random/{rank}", torch.tensor([rank]), 0, (1,), shared=False),
    ]


def threaten(fate: Fate) -> None:
    """Kill this process before so many calls that change the disk; a write of 16 bytes is one."""
    from launch import checkpoints

    checkpoints._CHUNK_BYTES = 16
    for name in ("fsync", "mkdir", "rename", "rmdir", "unlink", "open"):
        fate.threaten(name)
    checkpoints.memoryview = lambda part: (fate(), memoryview(part))[1]  # type: ignore[attr-defined]


def saved(
    folder: str,
    updates: list[int],
    asynchronous: bool,
    limit_of_rank_1: int | None = None,
    killed: tuple[int, int] | None = None,
) -> list[Any]:
    """Save after each of `updates`, with live values that go on changing; how each save ended."""
    from accelerate import Accelerator

    from launch.engine.checkpoint import Checkpointer

    accelerator = Accelerator(cpu=True)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    checkpointer = Checkpointer(accelerator, Path(folder), {"config.json": b"{}"}, asynchronous=asynchronous)
    endings = []
    for update in updates:
        if rank == 1 and limit_of_rank_1 is not None and update == updates[-1]:
            signal.signal(
                signal.SIGXFSZ, signal.SIG_IGN
            )  # then a write beyond the limit is an error, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_of_rank_1, resource.RLIM_INFINITY))
        if killed is not None and rank == killed[0] and update == updates[-1]:
            threaten(Fate(killed[1]))
        live = held(rank, world_size, float(update))
        failed = checkpointer.begin(update, live, {"position": {"update": update}})
        assert failed is None
        if asynchronous:
            for piece in live:
                piece.values.fill_(-1)
        ending = checkpointer.finish()
        endings.append((ending.folder, ending.problem))
    return endings


def assert_holds(folder: Path, value: float) -> None:
    assert damage(folder) is None
    stored = Stored(folder)
    for piece in held(0, 1, value):
        if not piece.name.startswith("random"):
            assert torch.equal(stored.whole(piece.name), piece.values), piece.name


@pytest.mark.dist
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_checkpoint_holds_what_was_there_when_its_save_began(
    world_size: int, asynchronous: bool, tmp_path: Path
) -> None:
    """Also where the values change while it is written, and the copy of the save before is written over."""
    for endings in run_ranks(world_size, saved, str(tmp_path), [4, 8], asynchronous):
        assert endings == [(checkpoint_folder(tmp_path, 4), ""), (checkpoint_folder(tmp_path, 8), "")]
    for update in (4, 8):
        folder = checkpoint_folder(tmp_path, update)
        assert_holds(folder, update)
        assert len(list(folder.glob("state-*"))) == world_size
        stored = Stored(folder)
        assert [stored.whole(f"random/{rank}").item() for rank in range(world_size)] == list(range(world_size))


@pytest.mark.dist
@pytest.mark.parametrize("asynchronous", [False, True])
def test_where_one_rank_cannot_write_there_is_no_checkpoint_and_the_older_one_stays(
    asynchronous: bool, tmp_path: Path
) -> None:
    for endings in run_ranks(2, saved, str(tmp_path), [4, 8], asynchronous, 100):
        (first, nothing), (second, problem) = endings
        assert (first, nothing) == (checkpoint_folder(tmp_path, 4), "")
        assert second is None
        assert problem.endswith("state-00001-of-00002.safetensors: File too large")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000004"]
    assert_holds(checkpoint_folder(tmp_path, 4), 4)


def killed(folder: str, moments: list[int], asynchronous: bool) -> list[tuple[bool, list[int]]]:
    """A save once a moment, each in a child that is killed before that many calls that change the disk."""
    from accelerate import Accelerator

    from launch.engine.checkpoint import Checkpointer

    accelerator, run = Accelerator(cpu=True), Path(folder)
    outcomes = []
    for moment in moments:
        child = os.fork()
        if not child:
            threaten(Fate(moment))
            checkpointer = Checkpointer(accelerator, run, {"config.json": b"{}"}, asynchronous=asynchronous)
            update = 1 + max((update_of(folder) for folder in listed(run)), default=0)
            checkpointer.begin(update, held(0, 1, float(update)), {"position": {"update": update}})
            checkpointer.finish()
            prune(run, 2, [])
            os._exit(0)
        _, status = os.waitpid(child, 0)
        good = [update_of(folder) for folder in listed(run) if damage(folder) is None]
        outcomes.append((os.WIFSIGNALED(status), good))
    return outcomes


@pytest.mark.dist
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rank_may_be_killed_at_any_moment_of_a_save(asynchronous: bool, tmp_path: Path) -> None:
    draw = random.Random(int(asynchronous))
    moments = [100_000, 100_000, *(draw.randrange(50) for _ in range(50)), 100_000]
    (outcomes,) = run_ranks(1, killed, str(tmp_path), moments, asynchronous)
    assert sum(died for died, _ in outcomes) >= 25
    assert not outcomes[-1][0]
    newest = 0
    for (died, good), before in zip(outcomes[2:], outcomes[1:], strict=False):
        assert len(good) >= 2, "two were good before, and two are good after"
        assert good[0] > before[1][0] or (died and good[0] == before[1][0])
        newest = good[0]
    assert newest > 5
    whole = newest_complete(tmp_path)
    assert whole is not None
    assert_holds(whole, newest)


@pytest.mark.dist
@pytest.mark.parametrize(("rank", "moment"), [(0, 3), (0, 10), (0, 15), (0, 19), (0, 20), (1, 3), (1, 5)])
def test_one_rank_of_two_may_be_killed_in_a_save(rank: int, moment: int, tmp_path: Path) -> None:
    """The other one loses it, and what was there before stays; what is there under its name is whole."""
    with pytest.raises(AssertionError, match=r"failed|did not answer"):
        run_ranks(2, saved, str(tmp_path), [4, 8], False, None, (rank, moment), timeout_seconds=15)
    assert_holds(checkpoint_folder(tmp_path, 4), 4)
    for folder in listed(tmp_path):
        assert damage(folder) in (None, "its save was cut off (no COMPLETE)")


def test_a_range_that_nobody_has_written_is_missed(tmp_path: Path) -> None:
    first = Piece("model/matrix", torch.arange(8.0), 0, (4, 4), shared=False)
    write_shard(tmp_path / "state-00000-of-00002.safetensors", list(parts([first], 0, 2)))
    stored = Stored(tmp_path)
    assert torch.equal(stored.read("model/matrix", 2, 6), torch.arange(2.0, 8.0))
    with pytest.raises(DamagedError, match="model/matrix lacks elements from 8 on"):
        stored.read("model/matrix", 2, 7)
    with pytest.raises(DamagedError, match=r"has shape \(4, 4\) instead of \(16,\)"):
        stored.load(Piece("model/matrix", torch.empty(16), 0, (16,), shared=False))
    with pytest.raises(DamagedError, match="model/other has shape None"):
        stored.load(Piece("model/other", torch.empty(1), 0, (1,), shared=False))


def test_ranges_may_overlap(tmp_path: Path) -> None:
    """As counters do, which every rank writes whole."""
    for rank, first in enumerate((0, 4)):
        values = torch.arange(first, first + 8.0)
        piece = Piece("model/vector", values, first, (12,), shared=False)
        write_shard(tmp_path / f"state-0000{rank}-of-00002.safetensors", list(parts([piece], rank, 2)))
    assert torch.equal(Stored(tmp_path).whole("model/vector"), torch.arange(12.0))


def test_other_readers_of_the_format_can_read_a_shard(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = tmp_path / "state-00000-of-00001.safetensors"
    record = write_shard(path, list(parts(held(0, 1), 0, 1)))
    assert record.bytes == path.stat().st_size
    loaded = load_file(path)
    assert torch.equal(loaded["model/matrix"], torch.arange(28.0))
    assert loaded["model/vector"].dtype == torch.bfloat16
    assert loaded["optimizer/step/vector"].tolist() == [3.0]


def test_random_generators_go_on_where_they_were() -> None:
    def draw() -> list[Any]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(2).tolist()]

    draw()  # of a pair of normal numbers one is kept for later
    states = random_states()
    drawn = draw()
    assert draw() != drawn
    restore_random_states(states)
    assert draw() == drawn
