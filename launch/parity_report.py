"""What `shoal parity` leaves in its folder: parity.json, with every number, and parity.png."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch import __version__
from launch.errors import RunFolderError
from launch.parity import Outcome
from launch.parity_plot import draw
from launch.record import read_plan, surroundings, write_json
from launch.sections import RunConfig


def write_report(folder: Path, config: RunConfig, outcomes: list[Outcome], *, complete: bool) -> dict[str, Any]:
    """Write both files and return what is in the first; without a reference there is nothing to draw.

    Raises:
        RunFolderError: the folder cannot be written.
    """
    plotted = bool(outcomes and outcomes[0].losses)
    report = {
        "shoal": __version__,
        "folder": str(folder),
        "data": str(folder / "parity.json"),
        "plot": str(folder / "parity.png") if plotted else None,
        "complete": complete,
        "tolerances": asdict(outcomes[0].tolerances) if outcomes else None,
        "outcomes": [as_json(outcome) for outcome in outcomes],
        "config": config.model_dump(mode="json"),
        **surroundings(),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "parity.json", report)
        if plotted:
            draw(folder / "parity.png", *_titles(folder, config, outcomes[0], report["versions"]), outcomes)
    except OSError as error:
        raise RunFolderError(f"{folder}: cannot be written: {error.strerror or error}") from None
    return report


def _titles(folder: Path, config: RunConfig, reference: Outcome, versions: dict[str, str]) -> tuple[str, str]:
    """What was run, and with what."""
    train = config.train
    title = f"{Path(config.recipe).stem}, global batch {train.global_batch_size} samples, {train.precision}"
    used = [f"{name} {versions[name]}" for name in ("torch", "accelerate", "deepspeed") if name in versions]
    device = read_plan(folder / reference.folder).processes.device
    return title, ", ".join([f"on {device}", *used, f"seed {train.seed}"])


def as_json(outcome: Outcome) -> dict[str, Any]:
    """An outcome as plain data; JSON knows no infinity, so that a difference beyond all bounds is null there."""
    return {
        "strategy": str(outcome.strategy),
        "world_size": outcome.world_size,
        "verdict": outcome.verdict,
        "problem": outcome.problem,
        "loss_difference": _finite(outcome.loss),
        "weight_difference": _finite(outcome.weight),
        "same_tensors": outcome.same_tensors,
        "same_learning_rates": outcome.same_rates,
        "same_metrics": outcome.same_metrics,
        "same_samples": outcome.same_samples,
        "updates": list(outcome.losses),
        "training_losses": [_finite(loss) for loss in outcome.losses.values()],
        "training_loss_differences": [_finite(outcome.differences.get(update)) for update in outcome.losses],
        "seconds": round(outcome.seconds, 1),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
