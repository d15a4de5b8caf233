"""Whether two runs have left the same numbers, bit for bit: their records, their scores, their exported weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from launch.record import read_json
from launch.recorded import METRICS

KINDS = ("train", "eval", "spike", "skipped", "rewound")

MEASURED = ("time", "tokens_per_second", "mfu", "seconds", "system")
"""Of a record, what is never the same twice."""

SCORES = ("updates", "validation", "best", "dtypes")
"""Of result.json, what a run has computed."""


@dataclass(frozen=True)
class Compared:
    """How much was compared, and what differs."""

    records: int
    """Of training updates."""
    evaluations: int
    tensors: int | None
    """Exported weights; None where nothing was exported."""
    differences: tuple[str, ...]
    """What, and `first → second`; the earliest first."""

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    @property
    def words(self) -> str:
        """How much was compared."""
        tensors = (
            "no weights, because save.export = false" if self.tensors is None else f"{self.tensors} weight tensors"
        )
        return f"{self.records} updates, {self.evaluations} evaluations, the scores, {tensors}"


def compare(first: Path, second: Path) -> Compared:
    """What two finished runs have left."""
    ours, theirs = _records(first), _records(second)
    tensors, weights = _weights(first, second)
    return Compared(
        sum(record["kind"] == "train" for record in ours),
        sum(record["kind"] == "eval" for record in ours),
        tensors,
        (*_of_records(ours, theirs), *_of_scores(first, second), *weights),
    )


def _records(run: Path) -> list[dict[str, Any]]:
    """In their order; one that was written twice is there twice."""
    path = run / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [record for record in map(json.loads, lines) if record["kind"] in KINDS]


def _of_records(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> Iterator[str]:
    for one, other in zip_longest(ours, theirs):
        if one is None or other is None or _place(one) != _place(other):
            # From here on everything is shifted, and one line says it.
            yield f"records: {_place(one)} → {_place(other)}"
            return
        for name in [*one, *(name for name in other if name not in one)]:
            if name not in MEASURED and one.get(name) != other.get(name):
                yield f"{_place(one)}: {name} {one.get(name)!r} → {other.get(name)!r}"


def _place(record: dict[str, Any] | None) -> str:
    return "nothing" if record is None else f"{record['kind']} {record['update']}"


def _of_scores(first: Path, second: Path) -> Iterator[str]:
    one, other = (read_json(run / "result.json") or {} for run in (first, second))
    for name in SCORES:
        if one.get(name) != other.get(name):
            yield f"result: {name} {one.get(name)!r} → {other.get(name)!r}"


def _weights(first: Path, second: Path) -> tuple[int | None, list[str]]:
    """How many tensors were exported, and which are not the same."""
    from safetensors.numpy import load_file

    files, others = ({path.name for path in (run / "export").glob("*.safetensors")} for run in (first, second))
    if files != others:
        return len(files), [f"export: files {sorted(files)} → {sorted(others)}"]
    count, found = 0, []
    for file in sorted(files):
        ours, theirs = load_file(first / "export" / file), load_file(second / "export" / file)
        count += len(ours)
        if ours.keys() != theirs.keys():
            found.append(f"export: names of {file} differ: {', '.join(sorted(ours.keys() ^ theirs.keys())[:3])}")
            continue
        for name, value in ours.items():
            other = theirs[name]
            if (value.shape, value.dtype) != (other.shape, other.dtype):
                found.append(f"export: {name} {value.dtype}{value.shape} → {other.dtype}{other.shape}")
            elif value.tobytes() != other.tobytes():
                found.append(f"export: {name} differs by up to {float(abs(value - other).max()):.1e}")
    return (count if files else None), found
