"""A run in TensorBoard, MLflow or Trackio, through Accelerate's trackers. In a process of its own, which is no rank."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.tracking import MLflowTracker, TensorBoardTracker, TrackioTracker

from launch.dotted import leaves
from launch.history import Row


class OtherTracker:
    """One run in one of them, open.

    TensorBoard's files are in the run folder, and written anew at each start: what a killed process wrote there may
    reach too far, or not far enough. MLflow and Trackio keep runs elsewhere (MLFLOW_TRACKING_URI, TRACKIO_DIR), in the
    experiment or project `track.project`; how far a run was sent there is noted in the run folder after each row.
    """

    def __init__(
        self,
        name: str,
        run: Path,
        config: dict[str, Any],
        state: dict[str, Any],
        note: Callable[[dict[str, Any]], None],
    ) -> None:
        """`state` is what an earlier start has noted last by `note`, or empty."""
        PartialState(cpu=True)  # a world of this process alone
        self.starts_over = name == "tensorboard"
        """Whether all rows are sent again at each start; else more may come to the newest one."""
        self._state, self._note = {"sent": -1, **state}, note
        project = config["track"]["project"]
        if name == "tensorboard":
            shutil.rmtree(run / name, ignore_errors=True)
            self._tracker = TensorBoardTracker(name, run)
        elif name == "mlflow":
            self._tracker = MLflowTracker(project, run_id=state.get("run_id"), run_name=run.name)
        else:
            # By its name alone a run is known there, and folders of others may be called the same.
            self._state.setdefault("name", f"{run.name}-{secrets.token_hex(4)}")
            self._tracker = TrackioTracker(project, name=self._state["name"], resume="allow")
        self._tracker.start()
        if name == "mlflow":
            self._state["run_id"] = self._tracker.tracker.info.run_id
        if name != "mlflow" or not state:  # Trackio forgets them when a run goes on, and MLflow lets none change
            self._tracker.store_init_configuration(
                {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in leaves(config)}
            )
        self._remember()
        self.first = 0 if self.starts_over else self._state["sent"] + 1
        """The first update that is not there yet."""

    def _remember(self) -> None:
        if not self.starts_over:
            self._note(self._state)

    def send(self, row: Row) -> None:
        """Add a row; a later one must be of a later update."""
        self._tracker.log(row.numbers, step=row.update)
        self._state["sent"] = row.update
        self._remember()

    def finish(self, newest: Row | None, complete: bool) -> None:  # noqa: ARG002
        """Close it."""
        self._tracker.finish()
