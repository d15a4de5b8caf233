"""Puts the weights of a checkpoint, or of an exported model, into a model that a recipe has built."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from launch.checkpoints import read_state
from launch.engine.frozen import contradiction, hashes
from launch.engine.shards import Stored
from launch.errors import RunFolderError


def load_weights(model: Any, folder: Path) -> None:
    """Give the model, on the CPU and not sharded yet, the weights that `folder` holds.

    Raises:
        RunFolderError: they are those of another model.
        DataError: they are of adapters on another base.
    """
    from_checkpoint = (folder / "state.json").is_file()
    if from_checkpoint and (problem := contradiction(folder, read_state(folder), hashes(model))):
        raise problem
    found = dict(_checkpoint(folder) if from_checkpoint else _exported(folder))
    own = {**dict(model.named_buffers()), **dict(model.named_parameters(remove_duplicate=False))}
    names = dict(model.named_parameters())  # of tied weights the first name
    lacking = [name for name, weight in names.items() if weight.requires_grad and not _known(name, weight, found, own)]
    other = [name for name in found if name in own and own[name].shape != found[name].shape]
    if lacking or other or not found.keys() & own.keys():
        what = f"has no {lacking[0]}" if lacking else f"has {(other or list(found))[0]} of another shape or name"
        raise RunFolderError(f"{folder}: {what}: it is of another model than the recipe builds with these settings")
    with torch.no_grad():
        for name, values in found.items():
            if name in own:
                own[name].copy_(values)


def _known(name: str, weight: torch.Tensor, found: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether it is there, under this name or that of a weight it is tied to."""
    return name in found or any(other is weight and tied in found for tied, other in own.items())


def _checkpoint(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    stored = Stored(folder)
    for key in stored.shapes:
        kind, _, name = key.partition("/")
        if kind in ("model", "buffer"):
            yield name, stored.whole(key)


def _exported(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        yield from load_file(path).items()
