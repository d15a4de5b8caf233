"""Runs one recipe over strategies and numbers of processes on this machine, and compares what came out.

Each is a run like any other, in a folder of its own; the first is the one that the others are compared with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import local
from launch.errors import LaunchError
from launch.plan import decide
from launch.record import create_run_folder
from launch.strategy import Strategy
from launch.topology import World

LOSS = 1e-5
"""Largest difference of a loss that still counts as the same, in fp32."""
WEIGHT = 1e-4
METRIC = 1e-6
"""The same, relative, of what an evaluation computes from its loss."""


@dataclass(frozen=True)
class Outcome:
    """One run beside the first one; None where there is nothing to compare."""

    strategy: Strategy
    world_size: int
    problem: str = ""
    loss: float | None = None
    """Largest difference of a training or validation loss."""
    weight: float | None = None
    """Largest difference of an exported weight."""
    same_rates: bool = True
    same_metrics: bool = True
    same_samples: bool = True

    @property
    def equal(self) -> bool:
        """Whether this run is the first one, sharded differently."""
        return (
            not self.problem
            and (self.loss or 0.0) <= LOSS
            and (self.weight or 0.0) <= WEIGHT
            and self.same_rates
            and self.same_metrics
            and self.same_samples
        )


def compare(
    file: str,
    overrides: list[str],
    strategies: list[Strategy],
    world_sizes: list[int],
    folder: Path,
    said: Callable[[str], None],
) -> Iterator[Outcome]:
    """Run one process, then every strategy at every number of processes above one that was asked for."""
    cases = [(Strategy.SINGLE, 1)] if 1 in world_sizes else []
    cases += [(strategy, size) for size in world_sizes if size > 1 for strategy in strategies]
    first: Path | None = None
    for strategy, size in cases:
        own = folder / f"{strategy}-{size}"
        said(f"{strategy} on {size} process{'es' if size > 1 else ''}")
        stated = [*overrides, f"parallel.strategy={strategy}", f"parallel.devices={size}"]
        try:
            plan = decide(file, stated, own, World()).plan
            ending = local.run(plan, create_run_folder(plan))
        except LaunchError as error:
            yield Outcome(strategy, size, str(error))
            continue
        if ending.stopped:
            return
        if ending.exit_code:
            yield Outcome(strategy, size, ending.message)
            continue
        if first is None:
            first = own
            yield Outcome(strategy, size)
        else:
            yield _beside(strategy, size, own, first)


def _beside(strategy: Strategy, size: int, own: Path, first: Path) -> Outcome:
    pairs = list(zip(_records(own), _records(first), strict=False))
    losses = [abs(a["loss"] - b["loss"]) for a, b in pairs if "loss" in a and "loss" in b]
    return Outcome(
        strategy,
        size,
        loss=max(losses, default=None),
        weight=_weight_difference(own, first),
        same_rates=all(a.get("learning_rate") == b.get("learning_rate") for a, b in pairs),
        same_metrics=all(_same_metrics(a, b) for a, b in pairs if a["kind"] == "eval"),
        same_samples=len(_records(own)) == len(_records(first)) and all(_cursor(a) == _cursor(b) for a, b in pairs),
    )


def _records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _cursor(record: dict[str, Any]) -> list[Any]:
    """Which samples a record is about, and how many."""
    return [record.get(name) for name in ("kind", "update", "epoch", "consumed", "samples", "targets", "tokens")]


def _same_metrics(record: dict[str, Any], other: dict[str, Any]) -> bool:
    names = set(other) - {"kind", "update", "samples", "targets", "time", "loss"}
    return all(abs(record[name] - other[name]) <= METRIC * abs(other[name]) for name in names)


def _weight_difference(own: Path, first: Path) -> float | None:
    """Over all exported weights; None where nothing was exported."""
    from safetensors.numpy import load_file

    files = sorted(path.name for path in (first / "export").glob("*.safetensors"))
    largest: float | None = None
    for name in files:
        ours, theirs = load_file(own / "export" / name), load_file(first / "export" / name)
        if set(ours) != set(theirs):
            return float("inf")
        differences = [float(abs(ours[key] - theirs[key]).max()) for key in theirs if theirs[key].size]
        largest = max([largest or 0.0, *differences])
    return largest
