"""What this rank takes of its machine: memory at the highest point, as planned memory is compared with, and load."""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import time
from pathlib import Path

import psutil
import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Bytes at the highest point since it was last told to forget.

    On a GPU what torch's allocator has handed out; of a TPU what its runtime tells. On a CPU the resident memory of
    this process, libraries included, of which Linux keeps the highest value (proc(5): VmHWM) and begins anew on demand
    (5, written to clear_refs); elsewhere it is not known.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def forget(self) -> None:
        """Begin anew: a peak before this moment does not count."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            with contextlib.suppress(OSError):
                _CLEAR.write_text("5", encoding="ascii")

    def read(self) -> int | None:
        """The peak, in bytes; None where it cannot be known."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if self._device.type == "xla":
            from launch.engine.xla import peak_memory

            return peak_memory()
        if sys.platform != "linux" or self._device.type != "cpu":
            return None
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


class Load:
    """What this rank takes of its machine at a moment, for curves beside the loss; reading it takes microseconds."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._process = device, psutil.Process()
        self._statm = os.open("/proc/self/statm", os.O_RDONLY) if sys.platform == "linux" else None
        self._then = time.monotonic(), time.process_time()

    def read(self) -> dict[str, float]:
        """Resident memory, per cent of a core since the last reading, and what torch has handed out of a GPU."""
        before, self._then = self._then, (time.monotonic(), time.process_time())
        passed, spent = (now - then for now, then in zip(self._then, before, strict=True))
        found = {"memory_bytes": self._resident(), "cpu_percent": round(100 * spent / passed, 1) if passed else 0.0}
        if self._device.type == "cuda":
            found["gpu_memory_bytes"] = torch.cuda.memory_allocated(self._device)
        return found

    def _resident(self) -> int:
        """Bytes; by psutil, which opens and takes apart two files, it takes seven times as long."""
        if self._statm is None:
            return int(self._process.memory_info().rss)
        return int(os.pread(self._statm, 64, 0).split()[1]) * mmap.PAGESIZE
