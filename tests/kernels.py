"""A real kernel of a notebook, its cells, what they show, and its stop button."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jupyter_client.manager import KernelManager

from tests.commands import ROOT


@dataclass
class Cell:
    """What a cell has shown."""

    printed: str = ""
    value: dict[str, str] = field(default_factory=dict)
    """Of its last expression, by MIME type."""
    error: dict[str, Any] | None = None
    """ename, evalue and traceback."""


class Kernel:
    """A kernel whose working directory is `folder`."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.manager = KernelManager()
        self.manager.start_kernel(
            cwd=str(folder),
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "SHOAL_CACHE": str(folder / "cache"),
                "IPYTHONDIR": str(folder / "ipython"),
                **environment,
            },
        )
        self._client = self.manager.client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=60)

    def run(self, code: str, meanwhile: Callable[[Cell], bool] | None = None, seconds: float = 120) -> Cell:
        """Run a cell to its end; `meanwhile` sees what it has shown so far, until it answers True."""
        asked = self._client.execute(code)
        cell, until = Cell(), time.monotonic() + seconds
        while time.monotonic() < until:
            if meanwhile and meanwhile(cell):
                meanwhile = None
            try:
                message = self._client.get_iopub_msg(timeout=0.1)
            except queue.Empty:
                continue
            if message["parent_header"].get("msg_id") != asked:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                cell.printed += content["text"]
            elif kind == "execute_result":
                cell.value = content["data"]
            elif kind == "error":
                cell.error = content
            elif kind == "status" and content["execution_state"] == "idle":
                return cell
        raise AssertionError(f"not done after {seconds} s: {cell}")

    def kill(self) -> None:
        """End the kernel as the system does that has no memory left; its manager would send SIGINT first."""
        os.kill(self.manager.provisioner.pid, signal.SIGKILL)


@contextlib.contextmanager
def kernel(folder: Path, **environment: str) -> Iterator[Kernel]:
    """A kernel for as long as it is used."""
    started = Kernel(folder, **environment)
    try:
        yield started
    finally:
        started.manager.shutdown_kernel(now=True)
