"""The profiler traces the updates it was asked for, and no others."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from launch.config import load
from launch.engine.profiling import SKIPPED, memory_noted, profiler, snapshot_file
from launch.errors import ConfigError, TopologyError
from launch.plan import make_plan
from launch.recipe import Preview
from launch.topology import Machine, World

GPUS = Machine("box", 8, 2)


def train(folder: Path, updates: int, traced: int, rank: int = 0) -> list[int]:
    """After which updates, each of one product of matrices, the trace was written."""
    written = []
    with profiler(folder, rank, [0], traced, torch.device("cpu")) as found:
        for update in range(1, updates + 1):
            torch.ones(2, 2).mm(torch.ones(2, 2))
            written += [update] if found.after_update() else []
    return written


def products(folder: Path) -> int:
    trace = json.loads(gzip.decompress((folder / "profile/rank-0.json.gz").read_bytes()))
    return sum(event.get("name") == "aten::mm" for event in trace["traceEvents"])


def test_so_many_updates_are_traced_after_the_first_ones(tmp_path: Path) -> None:
    assert train(tmp_path, 10, traced=2) == [SKIPPED + 2]
    assert products(tmp_path) == 2
    assert "aten::mm" in (tmp_path / "profile/rank-0.txt").read_text()


def test_a_run_that_ends_before_leaves_what_there_is(tmp_path: Path) -> None:
    assert train(tmp_path, SKIPPED + 1, traced=5) == []
    assert products(tmp_path) == 1


def test_nothing_is_traced_unless_asked_for(tmp_path: Path) -> None:
    assert train(tmp_path, 6, traced=0) == train(tmp_path, 6, traced=2, rank=1) == []
    assert not (tmp_path / "profile").exists()


def test_a_disk_that_takes_no_trace_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    assert train(tmp_path, 6, traced=2) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_held_a_gpu_s_memory_when_it_ran_out_is_written(tmp_path: Path) -> None:
    held = []

    def fill() -> None:
        with memory_noted(tmp_path, 1, wanted=True):
            while True:
                held.append(torch.empty(2**30, dtype=torch.uint8, device="cuda"))

    with pytest.raises(torch.OutOfMemoryError) as caught:
        fill()
    file = snapshot_file(tmp_path, 1)
    assert file.stat().st_size > 1000
    assert str(file) in caught.value.__notes__[0]


def test_without_a_gpu_nothing_is_told_of_its_memory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="of its own"), memory_noted(tmp_path, 0, wanted=False):
        raise ValueError("of its own")
    loaded = load(None, ["recipe=causal_lm", "parallel.device=cpu", "track.memory_snapshot=true"])
    with pytest.raises(TopologyError) as caught:
        make_plan(loaded, Machine("box", 2, 0), World(), Preview(32), tmp_path)
    assert str(caught.value) == (
        "command line: track.memory_snapshot = true: is told by torch's allocator of GPUs, and this run is on cpu; "
        "leave it out: what held the memory is written without it"
    )
    make_plan(load(None, ["recipe=causal_lm", "track.memory_snapshot=true"]), GPUS, World(), Preview(32), tmp_path)


def test_a_rank_that_is_not_there_is_refused(tmp_path: Path) -> None:
    stated = ["recipe=causal_lm", "parallel.device=cpu", "parallel.devices=2", "track.profile_ranks=[0,2]"]
    make_plan(load(None, stated), Machine("box", 2, 0), World(), Preview(32), tmp_path)
    loaded = load(None, [*stated, "track.profile=2"])
    with pytest.raises(ConfigError, match=r"track.profile_ranks = \[0, 2\]: there is no rank 2; 2 processes are the"):
        make_plan(loaded, Machine("box", 2, 0), World(), Preview(32), tmp_path)
