"""The trackers that a run can be shown in: their names, and that their packages are there."""

from __future__ import annotations

import importlib.util
import re

from launch.config import Loaded
from launch.errors import ConfigError
from launch.sections import TrackSection
from launch.source import shown

SPOKEN = {"wandb": "Weights & Biases", "tensorboard": "TensorBoard", "mlflow": "MLflow", "trackio": "Trackio"}
"""What people call them; the keys are the names of their packages too."""


def trackers(track: TrackSection) -> list[str]:
    """Where a run is shown besides metrics.jsonl."""
    return [*(["wandb"] if track.wandb != "off" else []), *dict.fromkeys(track.also)]


def check_trackers(loaded: Loaded) -> None:
    """See that their packages are installed, and that Weights & Biases takes the name of the project.

    Raises:
        ConfigError: one line for each that is missing, and for the name.
    """
    lines = []
    track = loaded.config.track
    if track.wandb != "off" and (len(track.project) > 128 or re.search(r"[/\\#?%:]", track.project)):
        lines.append(
            f"{loaded.place('track.project')}: track.project = {shown(track.project)}: for Weights & Biases it has at "
            "most 128 characters, none of them / \\ # ? % or :; a team is stated by track.entity"
        )
    for name in trackers(track):
        if importlib.util.find_spec(name) is not None:
            continue
        key = "track.wandb" if name == "wandb" else "track.also"
        stated, without = (track.wandb, "track.wandb=off") if name == "wandb" else (name, "leave it out")
        lines.append(
            f"{loaded.place(key)}: {key} = {stated}: the package {name} is not installed; pip install "
            f"'shoal[{name}]', or {without}"
        )
    if lines:
        raise ConfigError("\n".join(lines))
