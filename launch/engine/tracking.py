"""Where the numbers of a run go: always metrics.jsonl, and Weights & Biases when asked. Rank 0 only."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

from launch.errors import ConfigError


class Tracker:
    """Writes records, one JSON object a line, flushed at once: a killed run keeps every line it wrote."""

    def __init__(
        self, folder: Path, wandb_mode: Literal["off", "offline", "online"], project: str, config: Any
    ) -> None:
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._wandb = None if wandb_mode == "off" else _start_wandb(folder, wandb_mode, project, config)

    def write(self, kind: str, update: int, **values: Any) -> None:
        """Record `values` of one update; `kind` is train, eval, save or export."""
        record = {"kind": kind, "update": update, **values, "time": round(time.time(), 3)}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._wandb is not None:
            numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
            self._wandb.log({f"{kind}/{name}": value for name, value in numbers.items()} | {"update": update})

    def close(self) -> None:
        """Finish what is open."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(folder: Path, mode: Literal["offline", "online"], project: str, config: Any) -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            f"track.wandb = {mode}: the package wandb is not installed; pip install 'shoal[wandb]', or track.wandb=off"
        ) from None
    run = wandb.init(
        project=project,
        name=folder.name,
        dir=str(folder),
        mode=mode,
        config=config,
        settings=wandb.Settings(console="off", silent=True, disable_git=True),
    )
    run.define_metric("*", step_metric="update")
    return run
