"""Reads what a run has recorded of itself, metrics.jsonl, also while it is written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
"""One object a line, in the run folder."""

DISCARDED = "metrics-discarded.jsonl"
"""Lines of updates that were made again after an interruption."""

LARGEST = 10**300
"""Whole numbers beyond have no place among those with a point."""


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The records in a file, in their order; none where there is no file.

    What is no record is left out: the last line while it is written, or what a power cut has left.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                yield record


def size_in_bytes(run: Path) -> int:
    """How much a run has recorded; 0 where that cannot be seen."""
    try:
        return (run / METRICS).stat().st_size
    except OSError:
        return 0


def number(value: Any) -> float | None:
    """A number as it is, also one that is not finite; None of anything else."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    return float(value) if abs(value) < LARGEST or not isinstance(value, int) else math.inf


def whole(value: Any) -> int | None:
    """A whole number, such as that of an update; None of anything else."""
    found = number(value)
    return int(found) if found is not None and math.isfinite(found) else None
