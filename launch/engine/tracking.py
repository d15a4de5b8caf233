"""Where the numbers of a run go: always metrics.jsonl, and Weights & Biases when asked. Rank 0 only."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from launch.errors import ConfigError


class Tracker:
    """Writes records, one JSON object a line, at once: a killed run keeps every line it wrote.

    A full disk does not end a run: lines wait in memory until they can be written.
    """

    def __init__(
        self,
        folder: Path,
        wandb_mode: Literal["off", "offline", "online"],
        project: str,
        config: Any,
        resumed: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """`resumed` is the `state` of an earlier attempt: what it wrote after that is put aside."""
        self._path = folder / "metrics.jsonl"
        self._forget_after(resumed.get("bytes", 0))
        self._file = self._path.open("ab", buffering=0)
        self._waiting = b""
        self._size = self._path.stat().st_size
        identity = resumed.get("wandb")
        self._wandb = None if wandb_mode == "off" else _start_wandb(folder, wandb_mode, project, config, identity)

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same records."""
        return {"bytes": self._size, "wandb": None if self._wandb is None else self._wandb.id}

    def _forget_after(self, size: int) -> None:
        """Move the records of updates that will be made again to metrics-discarded.jsonl."""
        records = self._path.read_bytes() if self._path.exists() else b""
        if len(records) <= size:
            return
        with self._path.with_name("metrics-discarded.jsonl").open("ab") as discarded:
            discarded.write(records[size:])
        os.truncate(self._path, size)

    def write(self, kind: str, update: int, **values: Any) -> None:
        """Record `values` of one update; `kind` is train, eval, save, save_failed, resume or export."""
        record = {"kind": kind, "update": update, **values, "time": round(time.time(), 3)}
        line = (json.dumps(record) + "\n").encode()
        self._waiting += line
        self._size += len(line)
        with contextlib.suppress(OSError):  # the disk is full: with the next record, or at the end
            self._write_waiting()
        if self._wandb is not None:
            numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
            self._wandb.log({f"{kind}/{name}": value for name, value in numbers.items()} | {"update": update})

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

    def close(self) -> None:
        """Finish what is open.

        Raises:
            OSError: lines that could not be written before still cannot.
        """
        self._write_waiting()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(
    folder: Path, mode: Literal["offline", "online"], project: str, config: Any, identity: str | None
) -> Any:
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
        id=identity,
        resume="allow" if identity else None,
        settings=wandb.Settings(console="off", silent=True, disable_git=True),
    )
    run.define_metric("*", step_metric="update")
    return run
