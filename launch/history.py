"""The records of a run as trackers show them: a row for each update, read while they are written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.dotted import leaves


@dataclass
class Row:
    """All numbers that were recorded of an update: its training, its evaluation, its checkpoint."""

    update: int
    numbers: dict[str, float] = field(default_factory=dict)
    """By `kind/name`, such as `train/loss`, `eval/accuracy` and `train/seconds.data`."""
    evaluated: bool = False
    """Whether there is an evaluation of it, with details in eval/."""


class History:
    """Gives each row of metrics.jsonl once, when it is complete: when a record of a later update is there.

    What becomes known late, such as a checkpoint that was written while training went on, stands in the row of the
    update at which it did. Updates before `first` are left out.
    """

    def __init__(self, path: Path, first: int = 0) -> None:
        self._path, self._first = path, first
        self._read = 0
        self._row: Row | None = None

    def rows(self) -> Iterator[Row]:
        """Those that have become complete since the last call."""
        for record in self._records():
            update = record["update"]
            if self._row is None or update > self._row.update:
                if self._row is not None and self._row.update >= self._first:
                    yield self._row
                self._row = Row(update)
            self._row.numbers |= _numbers(record)
            self._row.evaluated |= record["kind"] == "eval"

    def newest(self) -> Row | None:
        """The row to which more may come."""
        return self._row if self._row is not None and self._row.update >= self._first else None

    def _records(self) -> Iterator[dict[str, Any]]:
        """Whole lines that were not read before; the end of one that is being written is left for later."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._read += len(line)
                yield json.loads(line)


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """What is a number in a record; of a mapping, its entries each: `train/seconds.data`."""
    return {
        f"{record['kind']}/{name}": int(value) if isinstance(value, bool) else value
        for name, value in leaves(dict(record))
        if name not in ("kind", "update", "time") and isinstance(value, (int, float))
    }


def tables(run: Path, update: int) -> dict[str, list[dict[str, Any]]]:
    """What an evaluation keeps as lists of mappings, such as `examples` of predictions, by name."""
    path = run / "eval" / f"step-{update:06d}.json"
    if not path.is_file():
        return {}
    details: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: value
        for name, value in details.items()
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value)
    }
