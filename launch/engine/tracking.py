"""Where the numbers of a run go: always metrics.jsonl, which other processes follow for trackers. Rank 0 only."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from launch.follower import Follower, wait_for


class Tracker:
    """Writes records, one JSON object a line, at once: a killed run keeps every line it wrote.

    A full disk does not end a run: lines wait in memory until they can be written.
    """

    def __init__(
        self,
        folder: Path,
        resumed: Mapping[str, Any] = MappingProxyType({}),
        trackers: Sequence[str] = (),
        say: Callable[[str], None] = print,
    ) -> None:
        """`resumed` is the `state` of an earlier attempt: what it wrote after that is put aside.

        `trackers` are followers of the records; what one has to tell is said.
        """
        self._path = folder / "metrics.jsonl"
        self._forget_after(resumed.get("bytes", 0))
        self._file = self._path.open("ab", buffering=0)
        self._waiting = b""
        self._size = self._path.stat().st_size
        self._say = say
        self._followers: list[Follower] = []
        for name in trackers:
            try:
                self._followers.append(Follower(folder, name))
            except OSError as error:
                say(f"{name}: its process cannot be started: {error.strerror or error}; metrics.jsonl has all")

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same records."""
        return {"bytes": self._size}

    def _forget_after(self, size: int) -> None:
        """Move the records of updates that will be made again to metrics-discarded.jsonl."""
        records = self._path.read_bytes() if self._path.exists() else b""
        if len(records) <= size:
            return
        with self._path.with_name("metrics-discarded.jsonl").open("ab") as discarded:
            discarded.write(records[size:])
        os.truncate(self._path, size)

    def write(self, kind: str, update: int, **values: Any) -> None:
        """Record `values` of one update; `kind` is train, eval, save, save_failed, resume, export …."""
        record = {"kind": kind, "update": update, **values, "time": round(time.time(), 3)}
        line = (json.dumps(record) + "\n").encode()
        self._waiting += line
        self._size += len(line)
        with contextlib.suppress(OSError):  # the disk is full: with the next record, or at the end
            self._write_waiting()
        for follower in self._followers:
            for news in follower.news():
                self._say(news)

    def keep_evaluation(self, update: int, found: Mapping[str, Any]) -> None:
        """Write all that an evaluation found to eval/step-000100.json, figures and details alike."""
        path = self._path.parent / "eval" / f"step-{update:06d}.json"
        with contextlib.suppress(OSError):  # the disk is full; the figures are in metrics.jsonl too
            path.parent.mkdir(exist_ok=True)
            aside = path.with_suffix(".writing")
            aside.write_text(json.dumps({"update": update, **found}, indent=2, ensure_ascii=False) + "\n", "utf-8")
            aside.replace(path)

    def _write_waiting(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def close(self, seconds: float = 0.0) -> None:
        """Finish what is open; trackers may take so long, and are ended then.

        Raises:
            OSError: lines that could not be written before still cannot.
        """
        try:
            self._write_waiting()
        finally:
            self._file.close()
            wait_for(self._followers, seconds)
            for follower in self._followers:
                for news in follower.end():
                    self._say(news)
