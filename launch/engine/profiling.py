"""A trace of a few updates by torch's profiler: where the time of a rank goes, operator by operator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile, schedule

SKIPPED = 3
"""Updates that are made before, in each start: allocators, kernels and buckets find their sizes in the first ones."""

ROWS = 40
"""Operators in the table."""


class Profiler:
    """Traces updates; told of each update that is done. Without updates to trace it does nothing."""

    def __init__(self, folder: Path, rank: int, updates: int, *, device: str = "cpu") -> None:
        """Trace `updates` of them, into `folder`; 0: none."""
        self.folder, self._rank = folder, rank
        self.written = False
        """Whether the trace is there."""
        self._profile: Any = None
        if updates:
            on_device = [ProfilerActivity.CUDA] if device == "cuda" else []
            self._profile = profile(
                activities=[ProfilerActivity.CPU, *on_device],
                schedule=schedule(skip_first=SKIPPED - 1, wait=0, warmup=1, active=updates, repeat=1),
                on_trace_ready=self._write,
                record_shapes=False,  # they would take as much memory as all the rest
                profile_memory=True,
            )

    def __enter__(self) -> Self:
        """Begin to count updates."""
        if self._profile:
            self._profile.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what has been traced, though the updates were fewer."""
        if self._profile:
            self._profile.stop()

    def after_update(self) -> bool:
        """Whether the trace has been written after this one."""
        before = self.written
        if self._profile:
            self._profile.step()
        return self.written > before

    def _write(self, found: Any) -> None:
        with contextlib.suppress(OSError):  # a full disk costs a trace, not a run
            self.folder.mkdir(exist_ok=True)
            name = f"rank-{self._rank}"
            found.export_chrome_trace(str(self.folder / f"{name}.json.gz"))
            by = "self_cuda_time_total" if ProfilerActivity.CUDA in found.activities else "self_cpu_time_total"
            table = found.key_averages().table(sort_by=by, row_limit=ROWS)
            (self.folder / f"{name}.txt").write_text(table, encoding="utf-8")
            self.written = True


MOST_NOTED = 100_000
"""Allocations that are remembered: the last ones, with the lines they were asked for in."""


@contextlib.contextmanager
def memory_noted(folder: Path, rank: int, *, wanted: bool) -> Iterator[None]:
    """Note who takes a GPU's memory inside; where it runs out, `profile/memory-rank-N.pickle` has that history.

    Source: PyTorch's documentation, Understanding CUDA Memory Usage; both functions have been there since torch 2.1.
    """
    if not wanted:
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=MOST_NOTED)
    try:
        yield
    except torch.OutOfMemoryError as error:
        path = snapshot_file(folder, rank)
        with contextlib.suppress(OSError):  # a full disk too
            path.parent.mkdir(exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]
            error.add_note(f"who took the memory, and when: {path}; load it in https://pytorch.org/memory_viz")
        raise
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def snapshot_file(folder: Path, rank: int) -> Path:
    """Where it is written in a run folder."""
    return folder / "profile" / f"memory-rank-{rank}.pickle"


def profiler(folder: Path, rank: int, ranks: list[int], updates: int, device: torch.device) -> Profiler:
    """That of this rank, into the folder `profile` of the run folder; it traces only on `ranks`."""
    return Profiler(folder / "profile", rank, updates if rank in ranks else 0, device=device.type)
