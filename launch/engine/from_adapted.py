"""Makes folders of a checkpoint of a model with adapters (PEFT): the merged model, or the adapter alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from launch.checkpoints import read_state
from launch.engine.adapters import merged_weights, unlike_merged, write_adapter, write_merged
from launch.engine.export import plain_name
from launch.engine.exported import load_exported
from launch.engine.frozen import contradiction, hashes
from launch.engine.sharding import tied_names
from launch.engine.shards import Stored
from launch.errors import ExportError


def export(checkpoint: Path, model: Any, tokenizer: Any, folder: Path, *, adapter: bool) -> dict[str, Any]:
    """Write a folder, whole or not at all, from `model` as its recipe builds it; what was compared.

    Raises:
        DataError: the base is not the one that the adapters were trained on.
        ExportError: the checkpoint is of another model, or what was written does not load as what is stored.
    """
    _load(checkpoint, model)
    trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    expected = merged_weights(model)  # before merging, which changes the model
    write_adapter(model, tokenizer, folder) if adapter else write_merged(model, tokenizer, folder)
    loaded, _ = load_exported(folder)
    if adapter:
        found = dict(loaded.named_parameters())
        wrong = [name for name, value in trained.items() if name not in found or not torch.equal(found[name], value)]
    else:
        wrong = unlike_merged(loaded, expected)
    if wrong:
        shutil.rmtree(folder)
        raise ExportError(f"{folder}: {', '.join(wrong[:3])} load with other values than those that are stored")
    compared = trained if adapter else expected
    return {
        "tensors": len(compared),
        "parameters": sum(value.numel() for value in (trained.values() if adapter else loaded.parameters())),
        "tied": [] if adapter else [[str(plain_name(name)) for name in group] for group in tied_names(loaded)],
    }


def _load(checkpoint: Path, model: Any) -> None:
    """Put what is stored into the model."""
    if problem := contradiction(checkpoint, read_state(checkpoint), hashes(model)):
        raise problem
    stored = Stored(checkpoint)
    state = {key.partition("/")[2]: stored.whole(key) for key in stored.shapes if key.startswith(("model/", "buffer/"))}
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wanted = {name for name, value in model.named_parameters() if value.requires_grad}
    others = sorted((wanted - state.keys()) | {name for name in state if shapes.get(name) != tuple(state[name].shape)})
    if others:
        raise ExportError(f"{checkpoint}: holds another model than its recipe builds now: {', '.join(others[:3])}")
    model.load_state_dict(state, strict=False)
