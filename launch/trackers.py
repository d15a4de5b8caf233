"""The trackers that a run can be shown in: their names, and that their packages are there."""

from __future__ import annotations

import importlib.util

from launch.config import Loaded
from launch.errors import ConfigError
from launch.sections import TrackSection

SPOKEN = {"wandb": "Weights & Biases", "tensorboard": "TensorBoard", "mlflow": "MLflow", "trackio": "Trackio"}
"""What people call them; the keys are the names of their packages too."""


def trackers(track: TrackSection) -> list[str]:
    """Where a run is shown besides metrics.jsonl."""
    return [*(["wandb"] if track.wandb != "off" else []), *dict.fromkeys(track.also)]


def check_trackers(loaded: Loaded) -> None:
    """See that their packages are installed.

    Raises:
        ConfigError: one line for each that is missing.
    """
    lines = []
    for name in trackers(loaded.config.track):
        if importlib.util.find_spec(name) is not None:
            continue
        key = "track.wandb" if name == "wandb" else "track.also"
        stated, without = (loaded.config.track.wandb, "track.wandb=off") if name == "wandb" else (name, "leave it out")
        lines.append(
            f"{loaded.place(key)}: {key} = {stated}: the package {name} is not installed; pip install "
            f"'shoal[{name}]', or {without}"
        )
    if lines:
        raise ConfigError("\n".join(lines))
