"""Which checkpoint of a run becomes a plain Hugging Face folder, and has it made by a process with torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from launch.checkpoints import checkpoints_folder, damage, listed, read_state
from launch.errors import ExportError, RunFolderError
from launch.inventory import best_first, inventory, newest
from launch.plan import python_environment
from launch.topology import worker_environment


@dataclass(frozen=True)
class Exported:
    """What was made, and from what."""

    folder: Path
    checkpoint: Path
    tensors: int
    """How many were compared with the stored ones after they were loaded again."""
    parameters: int
    tied: list[list[str]]
    """Names of weights that are one."""


def choose(run: Path, which: str) -> Path:
    """The checkpoint called `which`: newest, best, or its name; seen to be good.

    Raises:
        RunFolderError: there is none of that name, or it is not good.
    """
    if which in ("newest", "best"):
        entries = inventory(run, verify=True)
        found = newest(entries) if which == "newest" else next(iter(best_first(entries)), None)
        if found is None:
            lacking = "good checkpoint" if which == "newest" else "good checkpoint with a known validation loss"
            raise RunFolderError(f"{run}: has no {lacking}; see `shoal checkpoints {run}`")
        return found.folder
    names = [folder.name for folder in listed(run)]
    if which not in names:
        allowed = ", ".join(["newest", "best", *names])
        raise RunFolderError(f"{run}: has no checkpoint {which}; --checkpoint is one of {allowed}")
    folder = checkpoints_folder(run) / which
    if problem := damage(folder):
        raise RunFolderError(f"{folder}: is damaged: {problem}; export another one, see `shoal checkpoints {run}`")
    return folder


def export(run: Path, which: str, out: Path | None, *, adapter: bool = False) -> Exported:
    """Make a Hugging Face folder of a checkpoint; with `adapter`, of the adapter alone and not of the merged model.

    Raises:
        RunFolderError: there is no such good checkpoint, or the folder for the model is not empty.
        DataError: the base of an adapter is not the one it was trained on.
        ExportError: the model cannot be made, or does not load as what is stored.
    """
    checkpoint = choose(run, which).absolute()
    folder = (out or run / f"{'adapter' if adapter else 'export'}-{checkpoint.name}").absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise RunFolderError(f"{folder}: is there already; nothing is ever overwritten: choose another --out")
    # What lies beneath adapters is not in the checkpoint: the recipe builds it once more.
    adapted = bool(read_state(checkpoint).get("frozen"))
    if adapter and not adapted:
        raise RunFolderError(f"{checkpoint}: holds no adapters; runs with recipe_args.lora do. Leave --adapter out")
    module = "launch.rebuild" if adapted else "launch.engine.from_checkpoint"
    command = [sys.executable, "-m", module, str(checkpoint), str(folder)]
    command += ["adapter" if adapter else "merged"] if adapted else []
    # A process of its own: this one stays free of torch.
    environment = worker_environment({**python_environment(), "CUDA_VISIBLE_DEVICES": ""})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExportError(f"{checkpoint}: cannot be exported:\n{done.stderr.strip()}")
    answer = json.loads(done.stdout.splitlines()[-1])
    if problem := answer.pop("problem"):
        raise ExportError(problem)
    return Exported(folder, checkpoint, **answer)
