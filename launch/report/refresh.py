"""Keeps the page of a run up to date while its launcher waits for the ranks. Should it fail, the run goes on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from launch.errors import RunFolderError
from launch.printing import complain
from launch.recorded import size_in_bytes
from launch.report.page import REPORT, has_room, write_page
from launch.status import by_folder

EVERY_SECONDS = 30.0
"""The page is written no oftener."""

SHARE = 0.02
"""Of its time, at most, a launcher writes pages: those of long runs take seconds."""


LAST_SECONDS = 30.0
"""How long a launcher that is done waits for its last page, at most."""


@contextlib.contextmanager
def kept_reported(folder: Path) -> Iterator[None]:
    """Keep RUN/report.html up to date while inside, and write it a last time at the end, unless that is an error.

    A thread does it, so that a file system that hangs delays nobody: neither signals to the launcher nor the end.
    """
    reporter = _Reporter(folder)
    reporter.start()
    try:
        yield
    except BaseException:
        reporter.leave()
        raise
    reporter.finish()


class _Reporter(threading.Thread):
    """Writes the page when there is news."""

    def __init__(self, folder: Path) -> None:
        super().__init__(name="report", daemon=True)  # the process does not wait for it
        self._folder = folder
        self._left = threading.Event()
        self._last_one = False
        self._told = False
        self._seen = size_in_bytes(folder)

    def leave(self) -> None:
        """Write nothing any more, but what has begun."""
        self._left.set()

    def finish(self) -> None:
        """Write the page a last time, and wait for that, but not for long."""
        self._last_one = True
        self._left.set()
        self.join(timeout=LAST_SECONDS)

    def run(self) -> None:
        """Look for news until the end."""
        pause = EVERY_SECONDS
        while not self._left.wait(pause):
            size = size_in_bytes(self._folder)
            if size != self._seen:
                self._seen, began = size, time.monotonic()
                self._write()
                pause = max(EVERY_SECONDS, (time.monotonic() - began) / SHARE)
        if self._last_one:
            self._write()

    def _write(self) -> None:
        try:
            if not has_room(self._folder):
                raise RunFolderError(f"{self._folder}: no {REPORT} is written: the disk is nearly full")
            write_page([by_folder(self._folder)], self._folder / REPORT)
        except Exception as error:  # whatever it is, the run is not to suffer
            if not self._told:
                self._told = True
                complain(f"{error}; that does the run no harm, and `shoal report {self._folder}` writes it")
