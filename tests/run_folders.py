"""Run folders made by hand: a real plan, and records as a run writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from launch.config import load
from launch.plan import make_plan
from launch.recipe import Preview
from launch.record import create_run_folder
from launch.topology import Machine, World

BEGAN = 1_700_000_000.0
"""When the first update of a folder was recorded; seconds since 1970."""


def run_folder(folder: Path, *overrides: str, updates: int = 0, devices: int = 2) -> Path:
    """A run of causal_lm of a hundred updates, of which so many are recorded."""
    wanted = ["recipe=causal_lm", "train.max_steps=100", "parallel.device=cpu", f"parallel.devices={devices}"]
    plan = make_plan(load(None, [*wanted, *overrides]), Machine("here", 2, 0), World(), Preview(), folder)
    create_run_folder(plan)
    content = json.loads((folder / "plan.json").read_text())
    started = datetime.fromtimestamp(BEGAN - 10, UTC).strftime("%Y-%m-%dT%H:%M:%S%z")
    (folder / "plan.json").write_text(json.dumps({**content, "started": started}))
    write_records(folder, (update(number) for number in range(1, updates + 1)))
    return folder


def update(number: int, loss: float | None = None, **more: Any) -> dict[str, Any]:
    """The record of an update: three seconds each, a tenth of that for data."""
    return {
        **{"kind": "train", "update": number, "epoch": 0, "consumed": 4 * number},
        **{"loss": 5 - number / 100 if loss is None else loss, "learning_rate": 1e-3 / number, "gradient_norm": 1.5},
        **{"samples": 4, "targets": 400, "tokens": 500 * number, "tokens_per_second": 170.0},
        **{"seconds": {"data": 0.3, "compute": 2.0, "sync": 0.7, "save": 0.0, "evaluate": 0.0, "other": 0.0}},
        **{"time": BEGAN + 3 * number, **more},
    }


def evaluation(number: int, loss: float, *, best: bool, **metrics: float) -> dict[str, Any]:
    """The record of an evaluation."""
    counts = {"samples": 10, "targets": 1000, "best": best, "time": BEGAN + 3 * number + 1}
    return {"kind": "eval", "update": number, "loss": loss, **metrics, **counts}


def write_records(folder: Path, records: Iterable[dict[str, Any]], name: str = "metrics.jsonl") -> None:
    """Add lines to a file of records."""
    with (folder / name).open("a", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(record)}\n" for record in records)
